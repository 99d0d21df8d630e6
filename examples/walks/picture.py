"""A histogram of the numbers in a file."""

import sys

with open(sys.argv[1]) as file:
    distances = [float(line) for line in file]
width = max(distances) / 16
counts = [0] * 17
for distance in distances:
    counts[int(distance / width)] += 1
for number, count in enumerate(counts):
    print(f"{number * width:6.1f} {'#' * round(60 * count / max(counts))}")
print(f"mean {sum(distances) / len(distances):.2f} of {len(distances)} walks")
