"""A kernel's modules in the first archive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.image.initrd import unsigned

MARK = b"~Module signature appended~\n"


def signed(module: bytes, signature: bytes, said: int | None = None) -> bytes:
    """As the kernel's ``scripts/sign-file`` does: the signature, 12 bytes about it, the mark."""
    length = len(signature) if said is None else said
    return module + signature + b"\0\0\2" + bytes(5) + length.to_bytes(4, "big") + MARK


@given(st.binary(), st.binary())
def test_a_signed_module_loses_exactly_its_signature(module: bytes, signature: bytes) -> None:
    assert unsigned(signed(module, signature)) == module


@given(st.binary())
def test_a_module_that_is_not_signed_stays_as_it_is(module: bytes) -> None:
    if not module.endswith(MARK):
        assert unsigned(module) == module
    assert unsigned(module + MARK + b"x") == module + MARK + b"x"


@pytest.mark.parametrize("said", [1 << 31, 1000])
def test_a_signature_longer_than_its_module_leaves_nothing(said: int) -> None:
    assert unsigned(signed(b"module", b"signature", said)) == b""
