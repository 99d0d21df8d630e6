"""Looks for a short tour through cities by turning parts of it round; never ends by itself.

Whenever it finds a better one it replaces the file: whoever ends it finds a whole tour there.
"""

import csv
import math
import os
import random
import sys


def length(tour):
    return sum(math.dist(a[1:], b[1:]) for a, b in zip(tour, tour[1:] + tour[:1], strict=True))


def keep(tour, path):
    with open(path + ".part", "w") as file:
        csv.writer(file).writerows(tour)
    os.replace(path + ".part", path)


def main():
    with open(sys.argv[1]) as file:
        best = [(name, float(x), float(y)) for name, x, y in csv.reader(file)]
    rng = random.Random(7)
    keep(best, sys.argv[2])
    while True:
        first, last = sorted(rng.sample(range(len(best) + 1), 2))
        other = best[:first] + best[first:last][::-1] + best[last:]
        if length(other) < length(best) - 1e-9:
            best = other
            keep(best, sys.argv[2])


main()
