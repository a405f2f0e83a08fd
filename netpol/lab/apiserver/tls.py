"""HTTPS with a CA of its own, made at start and kept in memory.

Owns the certificates of the CA, of servers and of clients, and the server's SSL context. kubectl sends a
token over HTTPS only, and no tool to make certificates is sure to be there, so they are written here in
DER (X.509, RFC 5280).
"""

import base64
import hashlib
import secrets
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from netpol.lab.apiserver import p256
from netpol.lab.apiserver.p256 import KeyPair

_LIFE = timedelta(days=365)
_SKEW = timedelta(hours=1)  # for clients whose clock is behind
_EC_PUBLIC_KEY = "1.2.840.10045.2.1"
_CURVE_P256 = "1.2.840.10045.3.1.7"
_ECDSA_SHA256 = "1.2.840.10045.4.3.2"
_COMMON_NAME = "2.5.4.3"
_SUBJECT_KEY_ID = "2.5.29.14"
_KEY_USAGE = "2.5.29.15"
_SUBJECT_ALT_NAME = "2.5.29.17"
_BASIC_CONSTRAINTS = "2.5.29.19"
_AUTHORITY_KEY_ID = "2.5.29.35"
_EXTENDED_KEY_USAGE = "2.5.29.37"
_SERVER_AUTH = "1.3.6.1.5.5.7.3.1"
_CLIENT_AUTH = "1.3.6.1.5.5.7.3.2"
_CA_NAME = "netpol-lab-ca"
_INTEGER, _BITS, _OCTETS, _OID, _UTF8, _SEQUENCE, _SET = 2, 3, 4, 6, 12, 48, 49
_TRUE = b"\x01\x01\xff"


class Identity(NamedTuple):
    """A server's context and the CA that its clients trust."""

    context: ssl.SSLContext
    ca_pem: bytes


class Issued(NamedTuple):
    """A certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A CA that was made just now; its key is never written anywhere."""

    def __init__(self) -> None:
        self._key = p256.generate()
        own = _certificate(_CA_NAME, self._key, issuer=_CA_NAME, issuer_key=self._key)
        self.ca_pem = _pem("CERTIFICATE", own)

    def server(self, name: str, addresses: tuple[str, ...]) -> Issued:
        """Return the certificate of a server at these addresses, and at localhost."""
        return self._issue(name, usage=_SERVER_AUTH, addresses=addresses)

    def client(self, name: str) -> Issued:
        """Return the certificate of a client of that name."""
        return self._issue(name, usage=_CLIENT_AUTH)

    def _issue(self, name: str, *, usage: str, addresses: tuple[str, ...] = ()) -> Issued:
        key = p256.generate()
        der = _certificate(
            name, key, issuer=_CA_NAME, issuer_key=self._key, usage=usage, addresses=addresses
        )
        return Issued(_pem("CERTIFICATE", der), _key_pem(key))


def make_identity(host: str) -> Identity:
    """Return a fresh CA and a context for a server at an address, and at localhost."""
    authority = Authority()
    addresses = tuple(dict.fromkeys((host, "127.0.0.1", "::1")))
    issued = authority.server("netpol-lab-apiserver", addresses)
    return Identity(server_context(issued), authority.ca_pem)


def server_context(issued: Issued, *, client_ca: bytes = b"") -> ssl.SSLContext:
    """Return a server's context; with `client_ca` only clients with a certificate of it get in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=client_ca.decode())
    with tempfile.TemporaryDirectory(prefix="netpol-lab-") as folder:
        # The ssl module reads a chain from a file only.
        chain = Path(folder, "server.pem")
        chain.touch(mode=0o600)
        chain.write_bytes(issued.certificate + issued.key)
        context.load_cert_chain(chain)
    return context


def make_signing_key() -> bytes:
    """Return a fresh private key, as PEM, for whoever signs something else than certificates."""
    return _key_pem(p256.generate())


def _certificate(
    subject: str,
    key: KeyPair,
    *,
    issuer: str,
    issuer_key: KeyPair,
    usage: str = "",
    addresses: tuple[str, ...] = (),
) -> bytes:
    """Return a certificate; one without a usage is a CA's."""
    now = datetime.now(tz=UTC)
    algorithm = _tlv(_SEQUENCE, _oid(_ECDSA_SHA256))
    public = _tlv(_SEQUENCE, _oid(_EC_PUBLIC_KEY) + _oid(_CURVE_P256)) + _bits(key.public)
    extensions = [
        _extension(_SUBJECT_KEY_ID, _tlv(_OCTETS, _key_id(key))),
        _extension(_AUTHORITY_KEY_ID, _tlv(_SEQUENCE, _tlv(0x80, _key_id(issuer_key)))),
    ]
    if usage:
        extensions += [
            _extension(_BASIC_CONSTRAINTS, _tlv(_SEQUENCE, b""), critical=True),
            _extension(_KEY_USAGE, _tlv(_BITS, b"\x07\x80"), critical=True),  # digitalSignature
            _extension(_EXTENDED_KEY_USAGE, _tlv(_SEQUENCE, _oid(usage))),
        ]
    else:
        extensions += [
            _extension(_BASIC_CONSTRAINTS, _tlv(_SEQUENCE, _TRUE), critical=True),
            _extension(_KEY_USAGE, _tlv(_BITS, b"\x01\x06"), critical=True),  # certificates, CRLs
        ]
    if addresses:
        names = _tlv(0x82, b"localhost")
        names += b"".join(_tlv(0x87, ip_address(one).packed) for one in addresses)
        extensions.append(_extension(_SUBJECT_ALT_NAME, _tlv(_SEQUENCE, names)))
    body = _tlv(
        _SEQUENCE,
        _tlv(0xA0, _integer(2))  # version 3
        + _integer(secrets.randbits(120) + 1)
        + algorithm
        + _name(issuer)
        + _tlv(_SEQUENCE, _time(now - _SKEW) + _time(now + _LIFE))
        + _name(subject)
        + _tlv(_SEQUENCE, public)
        + _tlv(0xA3, _tlv(_SEQUENCE, b"".join(extensions))),
    )
    r, s = p256.sign(issuer_key, body)
    signature = _tlv(_SEQUENCE, _integer(r) + _integer(s))
    return _tlv(_SEQUENCE, body + algorithm + _bits(signature))


def _key_id(key: KeyPair) -> bytes:
    return hashlib.sha1(key.public, usedforsecurity=False).digest()  # RFC 5280, 4.2.1.2


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + value


def _integer(value: int) -> bytes:
    return _tlv(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _bits(value: bytes) -> bytes:
    return _tlv(_BITS, b"\x00" + value)


def _oid(text: str) -> bytes:
    first, second, *rest = (int(part) for part in text.split("."))
    encoded = bytearray((first * 40 + second,))
    for arc in rest:
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        encoded += bytes(reversed(groups))
    return _tlv(_OID, bytes(encoded))


def _name(text: str) -> bytes:
    attribute = _tlv(_SEQUENCE, _oid(_COMMON_NAME) + _tlv(_UTF8, text.encode()))
    return _tlv(_SEQUENCE, _tlv(_SET, attribute))


def _time(at: datetime) -> bytes:
    # RFC 5280 wants the short form before 2050.
    return _tlv(0x17, at.strftime("%y%m%d%H%M%SZ").encode())


def _extension(oid: str, value: bytes, *, critical: bool = False) -> bytes:
    mark = _TRUE if critical else b""
    return _tlv(_SEQUENCE, _oid(oid) + mark + _tlv(_OCTETS, value))


def _key_pem(key: KeyPair) -> bytes:
    body = (
        _integer(1)
        + _tlv(_OCTETS, key.private_bytes)
        + _tlv(0xA0, _oid(_CURVE_P256))
        + _tlv(0xA1, _bits(key.public))
    )
    return _pem("EC PRIVATE KEY", _tlv(_SEQUENCE, body))


def _pem(label: str, der: bytes) -> bytes:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()
