"""The curve P-256: a key pair and an ECDSA signature, in plain integers.

For the certificates of a lab on loopback and nothing else: it is not constant in time. Domain parameters
from FIPS 186-4, D.1.2.3.
"""

import hashlib
import secrets
from typing import NamedTuple

_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
_SIZE_BYTES = 32

_Point = tuple[int, int]


class KeyPair(NamedTuple):
    """A private scalar and its uncompressed public point."""

    private: int
    public: bytes

    @property
    def private_bytes(self) -> bytes:
        """The scalar in its fixed width."""
        return self.private.to_bytes(_SIZE_BYTES, "big")


def generate() -> KeyPair:
    """Return a fresh key pair."""
    private = secrets.randbelow(_N - 1) + 1
    x, y = _multiply(private, _G)
    public = b"\x04" + x.to_bytes(_SIZE_BYTES, "big") + y.to_bytes(_SIZE_BYTES, "big")
    return KeyPair(private, public)


def sign(key: KeyPair, message: bytes) -> tuple[int, int]:
    """Return (r, s) of ECDSA with SHA-256."""
    digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
    while True:
        nonce = secrets.randbelow(_N - 1) + 1
        r = _multiply(nonce, _G)[0] % _N
        s = pow(nonce, -1, _N) * (digest + r * key.private) % _N
        if r and s:
            return r, s


def _multiply(scalar: int, point: _Point) -> _Point:
    result: _Point | None = None
    while scalar:
        if scalar & 1:
            result = point if result is None else _add(result, point)
        point = _add(point, point)
        scalar >>= 1
    if result is None:
        raise ValueError("a multiple of zero is no point")
    return result


def _add(one: _Point, other: _Point) -> _Point:
    if one == other:
        slope = 3 * (one[0] * one[0] - 1) * pow(2 * one[1], -1, _P)  # a is -3
    else:
        slope = (other[1] - one[1]) * pow(other[0] - one[0], -1, _P)
    x = (slope * slope - one[0] - other[0]) % _P
    return x, (slope * (one[0] - x) - one[1]) % _P
