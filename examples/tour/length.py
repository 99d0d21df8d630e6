"""Prints how long a tour is."""

import csv
import math
import sys

with open(sys.argv[1]) as file:
    tour = [(float(x), float(y)) for _, x, y in csv.reader(file)]
total = sum(math.dist(a, b) for a, b in zip(tour, tour[1:] + tour[:1], strict=True))
print(f"{len(tour)} cities, {total:.1f} long")
