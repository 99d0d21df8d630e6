"""Random walks on a square grid; writes the distance that each got to distances.csv."""

import argparse
import math
import random


def walk(steps, rng):
    x = y = 0
    for _ in range(steps):
        dx, dy = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
        x, y = x + dx, y + dy
    return math.hypot(x, y)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--walks", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with open("distances.csv", "w") as out:
        for number in range(asked.walks):
            print(f"{walk(asked.steps, rng):.3f}", file=out)
            if number % 50 == 49:
                # The last line counts; whoever runs the job looks at it now and then.
                with open("fraction", "a") as fraction:
                    print((number + 1) / asked.walks, file=fraction)


main()
