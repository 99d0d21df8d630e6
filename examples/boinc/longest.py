#!/usr/bin/env python3
"""Finds the number with the longest way to 1: halve an even one, else take three times it plus one.

    longest.py RANGE RESULT

RANGE is a file with two numbers, the first and the last to be tried; RESULT is written. How far it
is stands in the file ``fraction``.
"""

import sys


def length(number):
    """Steps from a number to 1."""
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps


def main():
    with open(sys.argv[1]) as file:
        first, last = map(int, file.read().split())
    print(f"from {first} to {last}", file=sys.stderr)
    best, steps = first, -1
    for number in range(first, last + 1):
        found = length(number)
        if found > steps:
            best, steps = number, found
        if number % 1000 == 0 or number == last:
            with open("fraction", "w") as file:
                file.write(f"{(number - first + 1) / (last - first + 1)}\n")
    with open(sys.argv[2], "w") as file:
        file.write(f"{best} {steps}\n")


main()
