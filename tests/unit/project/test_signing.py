"""BOINC's code signing: its keys' text form, and signatures that others' programs accept."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmjob.errors import KeyFileInvalid, SignatureInvalid
from vmjob.host import durable
from vmjob.project import signing
from vmjob.project.signing import PrivateKey, PublicKey

MD5 = hashlib.md5(b"a file").hexdigest()


@pytest.fixture(scope="module")
def key() -> PrivateKey:
    return signing.generate()


def test_a_key_is_1024_bits_of_two_primes_far_apart(key: PrivateKey) -> None:
    assert key.modulus.bit_length() == 1024
    assert key.first * key.second == key.modulus
    assert (key.first - key.second).bit_length() > 412
    assert all(key.exponent * key.private % (prime - 1) == 1 for prime in (key.first, key.second))


def test_two_keys_differ(key: PrivateKey) -> None:
    assert signing.generate().modulus != key.modulus


def test_a_private_key_has_the_structure_of_boinc(key: PrivateKey) -> None:
    lines = key.text.splitlines()
    assert lines[0] == "1024"
    assert lines[-1] == "."
    assert {len(line) for line in lines[1:-1]} == {64}
    raw = bytes.fromhex("".join(lines[1:-1]))
    assert len(raw) == 704
    fields = [int.from_bytes(raw[start:end]) for start, end in
              ((0, 128), (128, 256), (256, 384), (384, 448), (448, 512), (512, 576), (576, 640),
               (640, 704))]
    modulus, exponent, private, first, second, at_first, at_second, inverse = fields
    assert (modulus, exponent, private) == (key.modulus, 65537, key.private)
    assert (first, second) == (key.first, key.second)
    assert (at_first, at_second) == (private % (first - 1), private % (second - 1))
    assert inverse * second % first == 1


def test_a_public_key_has_the_structure_of_boinc(key: PrivateKey) -> None:
    lines = key.public.text.splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("1024", 10, ".")
    assert int("".join(lines[1:5]), 16) == key.modulus
    assert int("".join(lines[5:9]), 16) == 65537


def test_keys_survive_their_files(key: PrivateKey, tmp_path: Path) -> None:
    private, public = signing.write_keys(tmp_path / "keys", key)
    assert signing.read_key(private) == key
    assert signing.read_key(public) == key.public
    assert private.stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_replaced(key: PrivateKey, tmp_path: Path) -> None:
    signing.write_keys(tmp_path, key)
    (tmp_path / signing.PUBLIC_FILE).unlink()
    with pytest.raises(KeyFileInvalid, match="already"):
        signing.write_keys(tmp_path, key)
    assert not (tmp_path / signing.PUBLIC_FILE).exists()


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_full_disk_leaves_nothing_that_bars_the_way(
        key: PrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    steps = itertools.count()

    def sync(path: Path) -> None:
        if next(steps) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(durable, "sync", sync)
        with pytest.raises(KeyFileInvalid, match="No space"):
            signing.write_keys(tmp_path, key)
    assert list(tmp_path.iterdir()) == []
    signing.write_keys(tmp_path, key)
    assert {each.name for each in tmp_path.iterdir()} == {signing.PRIVATE_FILE,
                                                          signing.PUBLIC_FILE}


@pytest.mark.parametrize("links", [True, False])
def test_a_key_that_comes_at_the_same_time_is_not_replaced(
        key: PrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def other(path: Path) -> None:
        (tmp_path / signing.PUBLIC_FILE).write_text("another's")

    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(durable, "sync", other)
    if not links:
        monkeypatch.setattr(os, "link", link)
    with pytest.raises(KeyFileInvalid, match=f"already: .*{signing.PUBLIC_FILE}"):
        signing.write_keys(tmp_path, key)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["another's"]


def test_a_signature_is_of_one_file_and_one_key(key: PrivateKey) -> None:
    signature = key.sign(MD5)
    assert key.public.verifies(MD5, signature)
    assert not key.public.verifies(hashlib.md5(b"another").hexdigest(), signature)
    assert not signing.generate().public.verifies(MD5, signature)
    changed = ("0" if signature[5] != "0" else "1").join((signature[:5], signature[6:]))
    assert not key.public.verifies(MD5, changed)


@pytest.mark.parametrize("signature", ["", ".", "zz", "00", "ab" * 127, "ff" * 128, "00" * 129,
                                       "\x00", "\N{SNOWMAN}"])
def test_nonsense_is_no_signature(key: PrivateKey, signature: str) -> None:
    assert not key.public.verifies(MD5, signature)


def test_the_number_one_signs_nothing_under_a_weak_exponent() -> None:
    weak = PublicKey(1 << 1023 | 1, 1)
    assert not weak.verifies(MD5, "00" * 127 + "01")


def test_only_an_md5_is_signed(key: PrivateKey) -> None:
    for text in ("", MD5.upper(), MD5[:-1], "x" * 32):
        with pytest.raises(SignatureInvalid):
            key.sign(text)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="OpenSSL is the independent witness")
def test_openssl_recovers_the_md5_from_a_signature(key: PrivateKey, tmp_path: Path) -> None:
    """The client calls OpenSSL's RSA_public_decrypt with this padding."""
    (tmp_path / "asn1").write_text(
        "asn1=SEQUENCE:pub\n[pub]\nalgorithm=SEQUENCE:alg\nkey=BITWRAP,SEQUENCE:rsa\n"
        "[alg]\noid=OID:rsaEncryption\nnull=NULL\n"
        f"[rsa]\nn=INTEGER:{key.modulus:#x}\ne=INTEGER:{key.exponent:#x}\n")
    subprocess.run(["openssl", "asn1parse", "-genconf", "asn1", "-noout", "-out", "key.der"],
                   cwd=tmp_path, check=True)
    digits = key.sign(MD5).replace("\n", "").rstrip(".")
    (tmp_path / "signature").write_bytes(bytes.fromhex(digits))
    found = subprocess.run(
        ["openssl", "pkeyutl", "-verifyrecover", "-pubin", "-keyform", "DER", "-inkey", "key.der",
         "-in", "signature", "-pkeyopt", "rsa_padding_mode:pkcs1"],
        cwd=tmp_path, check=True, capture_output=True)
    assert found.stdout == MD5.encode()


def test_a_damaged_key_is_refused(key: PrivateKey, tmp_path: Path) -> None:
    text = key.text
    path = tmp_path / "key"
    for damaged in ("", "1024\n", "512" + text[4:], text.replace("1024", "1024x"), text[:500],
                    text[:5] + ("0" * 64) + text[69:], "1024\n" + "00" * 704 + "\n.\n",
                    "\x00" * 100, "x" * 100_000, text.replace(".", "") + "00\n.\n"):
        path.write_text(damaged)
        with pytest.raises(KeyFileInvalid):
            signing.read_key(path)
    with pytest.raises(KeyFileInvalid, match="cannot read"):
        signing.read_key(tmp_path / "nothing")
