"""How many primes are there below 10, 100, ... and N? Writes primes.csv."""

import sys


def sieve(top):
    """A byte for each number below ``top``: 1 where it is prime."""
    prime = bytearray([1]) * top
    prime[:2] = b"\0\0"
    for number in range(2, int(top ** 0.5) + 1):
        if prime[number]:
            prime[number * number::number] = bytes(len(range(number * number, top, number)))
    return prime


def main():
    top = int(sys.argv[1])
    prime = sieve(top)
    with open("primes.csv", "w") as file:
        print("below,primes", file=file)
        below = 10
        while below <= top:
            print(f"{below},{sum(prime[:below])}", file=file)
            below *= 10
    print(f"{sum(prime)} primes below {top}")


main()
