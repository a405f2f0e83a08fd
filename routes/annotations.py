"""A node's BGP settings as its annotations say, ours (`netpol.io/`) and kube-router's (`kube-router.io/`).

The same names under both prefixes; ours win. What cannot be read is left out and named in words, never
with its value: an annotation may hold passwords.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

from netpol.model.net import Family, Prefix, family_of, parse_address, parse_prefix
from routes.options import ASN_MAX, PASSWORD_MAX, Community, ExternalPeer, ImportPolicy

PREFIXES = ("netpol.io/", "kube-router.io/")

_WELL_KNOWN = {
    # RFC 1997, RFC 3765, RFC 7999, RFC 8326
    "no-export": Community(65535, 65281),
    "no-advertise": Community(65535, 65282),
    "no-export-subconfed": Community(65535, 65283),
    "no-peer": Community(65535, 65284),
    "blackhole": Community(65535, 666),
    "graceful-shutdown": Community(65535, 0),
}


@dataclass(frozen=True, slots=True)
class NodeBgp:
    """What a node's annotations say about BGP; None and empty where they say nothing."""

    asn: int | None = None
    router_id: bytes | None = None
    peers: tuple[ExternalPeer, ...] = ()
    communities: tuple[Community, ...] = ()
    prepend: tuple[int, int] | None = None
    reject: tuple[Prefix, ...] = ()
    reflector_cluster: bytes | None = None
    client_cluster: bytes | None = None
    local_addresses: tuple[bytes, ...] = ()


class Problem(NamedTuple):
    """An annotation that is not followed, and why."""

    annotation: str
    message: str

    def __str__(self) -> str:
        return f"{self.annotation}: {self.message}"


_WORD = re.compile(r"[A-Za-z]{1,24}")


class _BadError(ValueError):
    """A value that cannot be read; the text says why and never what it was."""


def read(annotations: Mapping[str, str]) -> tuple[NodeBgp, tuple[Problem, ...]]:
    """Read all annotations of a node that concern BGP."""
    return _Reader(annotations).read()


class _Reader:
    def __init__(self, annotations: Mapping[str, str]) -> None:
        self._annotations = annotations
        self._problems: list[Problem] = []

    def read(self) -> tuple[NodeBgp, tuple[Problem, ...]]:
        reject = tuple(self._each("node.bgp.customimportreject", _prefix))
        bgp = NodeBgp(
            asn=self._one("node.asn", _asn),
            router_id=self._one("router.id", _router_id),
            communities=tuple(self._each("node.bgp.communities", community)),
            prepend=self._prepend(),
            reject=reject,
            reflector_cluster=self._one("rr.server", _cluster_id),
            client_cluster=self._one("rr.client", _cluster_id),
            local_addresses=tuple(self._each("bgp-local-addresses", _address)),
            peers=tuple(replace(p, imports=_rejecting(p.imports, reject)) for p in self._peers()),
        )
        return bgp, tuple(self._problems)

    def _find(self, name: str) -> tuple[str, str] | None:
        for prefix in PREFIXES:
            value = self._annotations.get(prefix + name)
            if value is not None:
                return prefix + name, value
        return None

    def _bad(self, annotation: str, message: str) -> None:
        self._problems.append(Problem(annotation, message))

    def _one(self, name: str, parse: Any) -> Any:
        found = self._find(name)
        if found is None:
            return None
        try:
            return parse(found[1].strip())
        except ValueError as e:
            self._bad(found[0], str(e))
            return None

    def _each(self, name: str, parse: Any) -> Iterator[Any]:
        found = self._find(name)
        for word in _words(found[1]) if found is not None else ():
            try:
                yield parse(word)
            except ValueError as e:
                self._bad(name if found is None else found[0], str(e))

    def _prepend(self) -> tuple[int, int] | None:
        asn = self._one("path-prepend.as", _asn)
        times = self._one("path-prepend.repeat-n", _times)
        if (asn is None) is (times is None):
            return None if asn is None else (asn, times)
        there = "path-prepend.as" if times is None else "path-prepend.repeat-n"
        self._bad(there, "needed path-prepend.as and path-prepend.repeat-n, got one of them")
        return None

    # -- peers ------------------------------------------------------------------------------

    def _peers(self) -> Iterator[ExternalPeer]:
        found = self._find("peers")
        if found is not None:
            yield from self._yaml_peers(*found)
            return
        yield from self._listed_peers()

    def _yaml_peers(self, annotation: str, text: str) -> Iterator[ExternalPeer]:
        try:
            items = read_yaml(text)
        except ValueError as e:
            self._bad(annotation, str(e))
            return
        if not isinstance(items, list):
            self._bad(annotation, f"needed a list of peers, got {type(items).__name__}")
            return
        for number, item in enumerate(items):
            try:
                yield peer_of(item, encoded=True)
            except ValueError as e:
                self._bad(f"{annotation}[{number}]", str(e))

    def _listed_peers(self) -> Iterator[ExternalPeer]:
        """The older form: lists of equal length, one for each property; empty items mean the default."""
        found = self._find("peer.ips")
        if found is None:
            return
        addresses = found[1].split(",")
        columns: dict[str, Sequence[str]] = {}
        for field, name in (
            ("asn", "peer.asns"),
            ("port", "peer.ports"),
            ("password", "peer.passwords"),
            ("localip", "peer.localips"),
        ):
            column = self._find(name)
            if column is None:
                continue
            columns[field] = column[1].split(",")
            if len(columns[field]) != len(addresses):
                self._bad(
                    column[0],
                    f"needed {len(addresses)} items as peer.ips, got {len(columns[field])}",
                )
                return
        for number, address in enumerate(addresses):
            item = {"remoteip": address.strip()}
            for field, values in columns.items():
                if values[number].strip():
                    key = {"asn": "remoteasn"}.get(field, field)
                    item[key] = values[number].strip()
            try:
                yield peer_of(item, encoded=True)
            except ValueError as e:
                self._bad(f"{found[0]}[{number}]", str(e))


class _Loader(yaml.BaseLoader):
    """Makes texts, lists and mappings, and follows no alias: a few of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _BadError("needed YAML without aliases")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """Read YAML with every scalar as the text that was written: 64512:1:2 is no number in base 60.

    Raises:
        ValueError: it is not YAML, or has aliases.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a BaseLoader
    except (yaml.YAMLError, RecursionError):
        raise _BadError("not YAML") from None


#: Keys of one peer; in front the older spelling that kube-router has.
_PEER_KEYS = {
    "remoteip": "address",
    "remoteasn": "asn",
    "localip": "localAddress",
}


def peer_of(item: Any, *, encoded: bool) -> ExternalPeer:
    """One peer of a list: of an annotation, or of the file of global peers.

    Args:
        item: a mapping with address and asn at least.
        encoded: whether the password is base64, as in annotations.

    Raises:
        ValueError: with the key that is wrong, never with a password.
    """
    if not isinstance(item, Mapping):
        raise _BadError(f"needed a mapping, got {type(item).__name__}")
    given = {_PEER_KEYS.get(str(k), str(k)): v for k, v in item.items() if v not in (None, "")}
    unknown = sorted(set(given) - set(_READERS) - {"password"})
    if unknown:
        # A key that is no word is a slip, such as a missing space, and may hold a password.
        named = f" is named {unknown[0]!r}" if _WORD.fullmatch(unknown[0]) else " looks like it"
        raise _BadError(f"no key of a peer{named}")
    for key in ("address", "asn"):
        if key not in given:
            raise _BadError(f"needed {key}, got none")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key == "password":
            values[key] = password(str(value), encoded=encoded)
            continue
        name, parse = _READERS[key]
        try:
            values[name] = parse(value)
        except ValueError as e:
            raise _BadError(f"{key}: {e}") from e
    imports = {k.removeprefix("import_"): values.pop(k) for k in list(values) if k[:7] == "import_"}
    peer = ExternalPeer(**values, imports=ImportPolicy(**imports))
    if peer.ttl_security and peer.multihop:
        raise _BadError("ttlSecurity: needed a peer without multihop")
    if peer.keepalive_s > peer.hold_s:
        raise _BadError("keepaliveSeconds: needed at most holdSeconds")
    source = peer.local_address
    if source is not None and family_of(source) is not family_of(peer.address):
        raise _BadError("localAddress: needed the family of the peer's address")
    return peer


def password(text: str, *, encoded: bool) -> str:
    """A TCP-MD5 key.

    Raises:
        ValueError: it cannot be one.
    """
    if encoded:
        try:
            text = base64.b64decode(text.encode("ascii"), validate=True).decode()
        except (binascii.Error, ValueError):
            raise _BadError("password: needed base64") from None
        text = text.removesuffix("\n")  # what `echo secret | base64` leaves
    if len(text.encode()) > PASSWORD_MAX:
        raise _BadError(f"password: needed at most {PASSWORD_MAX} bytes")
    if '"' in text or not text.isprintable():
        # BIRD's strings have no escapes.
        raise _BadError('password: needed printable characters without "')
    return text


def community(text: str) -> Community:
    """A community as people write it: 64512:100, 64512:1:2, or a well-known name.

    Raises:
        ValueError: it is none.
    """
    known = _WELL_KNOWN.get(text.lower().replace("_", "-"))
    if known is not None:
        return known
    parts = text.split(":")
    if not all(p.isascii() and p.isdigit() for p in parts) or len(parts) not in (1, 2, 3):
        raise _BadError("needed a community such as 64512:100")
    numbers = [int(p) for p in parts]
    if len(numbers) == 1 and numbers[0] <= ASN_MAX:
        return Community(numbers[0] >> 16, numbers[0] & 0xFFFF)
    if max(numbers) > (0xFFFF if len(numbers) == 2 else ASN_MAX) or len(numbers) == 1:
        raise _BadError("needed a community such as 64512:100")
    return Community(*numbers)


def _words(text: str) -> Iterator[str]:
    for word in text.replace("\n", ",").split(","):
        if word.strip():
            yield word.strip()


def _number(value: Any, low: int, high: int) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 10:
        raise _BadError(f"needed a number of {low}..{high}")
    if not low <= int(text) <= high:
        raise _BadError(f"needed a number of {low}..{high}")
    return int(text)


def _asn(value: Any) -> int:
    """RFC 7607, RFC 7300: 0 and the last number are no AS."""
    return _number(value, 1, ASN_MAX - 1)


def _times(value: Any) -> int:
    return _number(value, 1, 32)


def _port(value: Any) -> int:
    return _number(value, 1, 65535)


def _ttl(value: Any) -> int:
    return _number(value, 0, 255)


def _seconds(value: Any) -> int:
    return _number(value, 3, 65535)


def _keepalive(value: Any) -> int:
    return _number(value, 1, 21845)


def _u32(value: Any) -> int:
    return _number(value, 0, ASN_MAX)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise _BadError("needed true or false")
    return words[str(value).lower()]


def _ip(value: Any) -> bytes:
    try:
        return parse_address(str(value).strip())
    except ValueError:
        raise _BadError("needed an IP address") from None


def _prefix(value: Any) -> Prefix:
    try:
        return parse_prefix(str(value).strip())
    except ValueError:
        raise _BadError("needed a CIDR (ADDRESS/LENGTH)") from None


def _address(value: Any) -> bytes:
    address = _ip(value)
    ip = ipaddress.ip_address(address)
    # BIRD takes a link-local neighbour only with its link, which nobody says here.
    if ip.is_multicast or ip.is_unspecified or ip.is_loopback or ip.is_link_local:
        raise _BadError("needed the address of a router")
    if len(address) == 4 and not 0 < address[0] < 240:  # "this network", and what is reserved
        raise _BadError("needed the address of a router")
    return address


def _router_id(value: Any) -> bytes:
    address = _ip(value)
    if family_of(address) is not Family.V4 or address == bytes(4):
        raise _BadError("needed an IPv4 address other than 0.0.0.0")
    return address


def _cluster_id(value: Any) -> bytes:
    """RFC 4456 section 7: four bytes, written as a number or an IPv4 address."""
    text = str(value)
    if text.isascii() and text.isdigit():
        return _number(text, 1, ASN_MAX).to_bytes(4, "big")
    return _router_id(text)


def _prefixes(value: Any) -> tuple[Prefix, ...]:
    return tuple(_prefix(v) for v in _list(value))


def _communities(value: Any) -> tuple[Community, ...]:
    return tuple(community(str(v).strip()) for v in _list(value))


def _list(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        return tuple(_words(value))
    if not isinstance(value, list):
        raise _BadError(f"needed a list, got {type(value).__name__}")
    return value


def _prepended(value: Any) -> tuple[int, int]:
    if not isinstance(value, Mapping) or set(value) != {"asn", "times"}:
        raise _BadError("needed asn and times")
    return _asn(value["asn"]), _times(value["times"])


def _rejecting(policy: ImportPolicy, reject: tuple[Prefix, ...]) -> ImportPolicy:
    return replace(policy, reject=policy.reject + reject) if reject else policy


_READERS: dict[str, tuple[str, Any]] = {
    "address": ("address", _address),
    "asn": ("asn", _asn),
    "port": ("port", _port),
    "localAddress": ("local_address", _address),
    "multihop": ("multihop", _ttl),
    "ttlSecurity": ("ttl_security", _bool),
    "bfd": ("bfd", _bool),
    "gracefulRestart": ("graceful_restart", _bool),
    "reflector": ("reflector", _bool),
    "import": ("import_enabled", _bool),
    "importOnly": ("import_only", _prefixes),
    "importReject": ("import_reject", _prefixes),
    "importDefaultRoute": ("import_default_route", _bool),
    "importLimit": ("import_limit", lambda v: _number(v, 1, 10_000_000)),
    "export": ("export", _prefixes),
    "communities": ("communities", _communities),
    "prepend": ("prepend", _prepended),
    "localPreference": ("local_pref", _u32),
    "med": ("med", _u32),
    "holdSeconds": ("hold_s", _seconds),
    "keepaliveSeconds": ("keepalive_s", _keepalive),
}
