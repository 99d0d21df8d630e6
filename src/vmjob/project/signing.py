"""BOINC's code signing: who may give programs to the volunteers of a project.

A signature is RSA over the 32 hexadecimal digits of a file's MD5, padded as PKCS #1 v1.5 type 1
without the name of a hash (what OpenSSL's RSA_private_encrypt makes). MD5 and 1024 bits are what
every client knows; nothing stronger would be understood.

The text form of keys is what ``crypt_prog -genkey`` writes and the client reads (``lib/crypt.cpp``,
``print_key_hex``): the number of bits, then the bytes of a C structure in hexadecimal, 64 digits
on a line, then a line with a dot.

=====================  =======  ==========================================================
structure              bytes    fields, big-endian, each as wide as given
=====================  =======  ==========================================================
``R_RSA_PUBLIC_KEY``   256      modulus 128, exponent 128
``R_RSA_PRIVATE_KEY``  704      modulus 128, public exponent 128, private exponent 128,
                                primes 2 x 64, exponents modulo the primes 2 x 64,
                                coefficient (inverse of the second prime modulo the first) 64
=====================  =======  ==========================================================
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import KeyFileInvalid, SignatureInvalid
from vmjob.host import durable

__all__ = ["PRIVATE_FILE", "PUBLIC_FILE", "PrivateKey", "PublicKey", "generate", "md5_of",
           "read_key", "read_signature", "write_keys"]

#: What a project calls its two files.
PRIVATE_FILE, PUBLIC_FILE = "code_sign_private", "code_sign_public"

#: BOINC's MAX_RSA_MODULUS_BITS: the structures have room for no more.
BITS = 1024
_BYTES = BITS // 8
_HALF = _BYTES // 2
#: The private key's file has 1450 bytes.
MAX_FILE = 8192

EXPONENT = 65537
#: Of Miller and Rabin's test; a number that is no prime passes all with a chance below 4**-40.
ROUNDS = 40
_SMALL_PRIMES = tuple(p for p in range(3, 2000, 2)
                      if all(p % q for q in range(3, int(p**.5) + 1, 2)))

_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class PublicKey:
    """What a client is given to check signatures with."""

    modulus: int
    exponent: int

    @property
    def text(self) -> str:
        return _key_text(_number(self.modulus, _BYTES) + _number(self.exponent, _BYTES))

    def verifies(self, md5: str, signature: str) -> bool:
        """Whether ``signature`` (in hexadecimal lines) is this key's of a file with this MD5."""
        try:
            data = _unhex(signature)
        except ValueError:
            return False
        if len(data) != _BYTES or (number := int.from_bytes(data)) >= self.modulus:
            return False
        return pow(number, self.exponent, self.modulus) == _padded(md5)


@dataclass(frozen=True)
class PrivateKey:
    """What signs; ``first`` and ``second`` are the primes, ``private`` the exponent."""

    modulus: int
    exponent: int
    private: int
    first: int
    second: int

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.modulus, self.exponent)

    @property
    def text(self) -> str:
        return _key_text(
            b"".join(_number(each, _BYTES)
                     for each in (self.modulus, self.exponent, self.private))
            + b"".join(_number(each, _HALF)
                       for each in (self.first, self.second, self.private % (self.first - 1),
                                    self.private % (self.second - 1),
                                    pow(self.second, -1, self.first))))

    def sign(self, md5: str) -> str:
        """The signature of a file with this MD5 (32 lower-case hexadecimal digits)."""
        number = pow(_padded(md5), self.private, self.modulus)
        signature = _hex(_number(number, _BYTES))
        assert self.public.verifies(md5, signature)  # a slip of the memory would tell the primes
        return signature


def generate() -> PrivateKey:
    """A new key; takes about 0.1 s."""
    while True:
        first, second = sorted((_prime(BITS // 2), _prime(BITS // 2)), reverse=True)
        modulus = first * second
        # Primes that are close to each other are found from their product.
        if modulus.bit_length() == BITS and (first - second).bit_length() > BITS // 2 - 100:
            private = pow(EXPONENT, -1, (first - 1) * (second - 1))
            return PrivateKey(modulus, EXPONENT, private, first, second)


def md5_of(path: Path) -> str:
    """A file's MD5, as BOINC writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read_key(path: Path) -> PrivateKey | PublicKey:
    """A key in BOINC's text form, private or public by its length.

    Raises `KeyFileInvalid` where it is neither, or where a private key's numbers do not belong
    together.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise KeyFileInvalid(f"cannot read the key {str(path)!r}: {error.strerror}") from None
    bits, _, rest = data.decode("ascii", "replace").partition("\n")
    try:
        raw = _unhex(rest)
    except ValueError:
        raise KeyFileInvalid(f"{str(path)!r} is no key of BOINC's") from None
    if bits.strip() != str(BITS) or len(data) > MAX_FILE:
        raise KeyFileInvalid(f"{str(path)!r} is no key of BOINC's with {BITS} bits")
    numbers = [int.from_bytes(raw[at:at + _BYTES]) for at in (0, _BYTES, 2 * _BYTES)]
    if len(raw) == 2 * _BYTES:
        return PublicKey(*numbers[:2])
    if len(raw) != 3 * _BYTES + 5 * _HALF:
        raise KeyFileInvalid(f"{str(path)!r} has {len(raw)} bytes of a key: "
                             "a public one has 256, a private one 704")
    modulus, exponent, private = numbers
    primes = raw[3 * _BYTES:4 * _BYTES]
    first, second = int.from_bytes(primes[:_HALF]), int.from_bytes(primes[_HALF:])
    # The structure's last three numbers follow from these, and are not read.
    if (first < 3 or second < 3 or first * second != modulus
            or modulus.bit_length() != BITS
            or any((exponent * private - 1) % (prime - 1) for prime in (first, second))):
        raise KeyFileInvalid(f"{str(path)!r}: the numbers of this key do not belong together")
    return PrivateKey(modulus, exponent, private, first, second)


def read_signature(path: Path) -> str:
    """A ``.sig`` file's signature, in the form that this module writes."""
    try:
        with path.open("rb") as file:
            data = _unhex(file.read(MAX_FILE).decode("ascii", "replace"))
    except OSError as error:
        raise SignatureInvalid(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise SignatureInvalid(f"{str(path)!r} is no signature") from None
    return _hex(data)


def write_keys(directory: Path, key: PrivateKey) -> tuple[Path, Path]:
    """Write both files, the private one for its owner only.

    Raises `KeyFileInvalid` where there is one already: a key that is replaced is lost for ever, and
    with it every client that knows it.
    """
    private, public = directory / PRIVATE_FILE, directory / PUBLIC_FILE
    mark = f".new-{secrets.token_hex(4)}"
    made: list[Path] = []
    for path in (private, public):
        if os.path.lexists(path):
            raise _taken(path)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Whole under other names first: half a key would bar the way of the next one.
        for path, text, mode in ((private, key.text, 0o600), (public, key.public.text, 0o644)):
            beside = path.with_name(f".{path.name}{mark}")
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            made.append(beside)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(text)
            durable.sync(beside)
        for path in (private, public):
            _rename_anew(path.with_name(f".{path.name}{mark}"), path)
            made.append(path)
        durable.sync(directory)
        made.clear()
    except OSError as error:
        raise KeyFileInvalid(f"cannot write a key in {directory}: {error.strerror}") from None
    finally:
        for path in made:
            path.unlink(missing_ok=True)
    return private, public


# -- inside ------------------------------------------------------------------------------------


def _taken(path: Path) -> KeyFileInvalid:
    return KeyFileInvalid(f"there is a key already: {path}",
                          advice="Use it, or give another directory. A project that loses its key "
                                 "loses the clients that know it.")


def _rename_anew(source: Path, target: Path) -> None:
    """Give a key another name that nothing has."""
    try:
        os.link(source, target)
    except OSError:  # it is taken; or a file system without links
        if os.path.lexists(target):
            raise _taken(target) from None
        source.rename(target)
    else:
        source.unlink()


def _padded(md5: str) -> int:
    if not _MD5.fullmatch(md5):
        raise SignatureInvalid(f"{md5[:40]!r} is no MD5")
    filler = b"\xff" * (_BYTES - 3 - len(md5))
    return int.from_bytes(b"\x00\x01" + filler + b"\x00" + md5.encode())


def _number(value: int, width: int) -> bytes:
    return value.to_bytes(width)


def _hex(data: bytes) -> str:
    digits = data.hex()
    return "".join(f"{digits[at:at + 64]}\n" for at in range(0, len(digits), 64)) + ".\n"


def _unhex(text: str) -> bytes:
    """What stands before the first character that is neither a digit nor a blank (the dot)."""
    return bytes.fromhex(re.match(r"[0-9a-fA-F\s]*", text)[0])  # type: ignore[index]


def _key_text(data: bytes) -> str:
    return f"{BITS}\n{_hex(data)}"


def _prime(bits: int) -> int:
    while True:
        # The two highest bits make the product of two as long as wanted.
        found = secrets.randbits(bits) | 3 << bits - 2 | 1
        if all(found % small for small in _SMALL_PRIMES) and found % EXPONENT != 1 \
                and _is_prime(found):
            return found


def _is_prime(number: int) -> bool:
    """By Miller and Rabin, with bases that nobody can know before."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(ROUNDS):
        power = pow(2 + secrets.randbelow(number - 3), odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
