"""A node's BGP settings as its annotations say, ours (`netpol.io/`) and kube-router's (`kube-router.io/`).

The same names under both prefixes; ours win. What cannot be read is left out and named in words, never
with its value: an annotation may hold passwords.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

from netpol.model.net import Prefix, family_of
from routes import scalars
from routes.options import PASSWORD_MAX, Community, ExternalPeer, ImportPolicy

PREFIXES = ("netpol.io/", "kube-router.io/")


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


def read(annotations: Mapping[str, str]) -> tuple[NodeBgp, tuple[Problem, ...]]:
    """Read all annotations of a node that concern BGP."""
    return _Reader(annotations).read()


class _Reader:
    def __init__(self, annotations: Mapping[str, str]) -> None:
        self._annotations = annotations
        self._problems: list[Problem] = []

    def read(self) -> tuple[NodeBgp, tuple[Problem, ...]]:
        reject = tuple(self._each("node.bgp.customimportreject", scalars.prefix))
        server = self._one("rr.server", scalars.cluster_id)
        bgp = NodeBgp(
            asn=self._one("node.asn", scalars.asn),
            router_id=self._one("router.id", scalars.router_id),
            communities=tuple(self._each("node.bgp.communities", scalars.community)),
            prepend=self._prepend(),
            reject=reject,
            reflector_cluster=server,
            client_cluster=self._client(server),
            local_addresses=tuple(self._each("bgp-local-addresses", scalars.router_address)),
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
        for word in scalars.words(found[1]) if found is not None else ():
            try:
                yield parse(word)
            except ValueError as e:
                self._bad(name if found is None else found[0], str(e))

    def _client(self, server: bytes | None) -> bytes | None:
        """Of another reflector a reflector may be a client too, of its own kind it cannot."""
        client: bytes | None = self._one("rr.client", scalars.cluster_id)
        if client is None or client != server:
            return client
        found = self._find("rr.client")
        if found is not None:
            self._bad(found[0], "needed another cluster than that of rr.server")
        return None

    def _prepend(self) -> tuple[int, int] | None:
        asn = self._one("path-prepend.as", scalars.asn)
        times = self._one("path-prepend.repeat-n", scalars.times)
        if (asn is None) is (times is None):
            return None if asn is None else (asn, times)
        there = "path-prepend.as" if times is None else "path-prepend.repeat-n"
        self._bad(there, "needed path-prepend.as and path-prepend.repeat-n, got one of them")
        return None

    # -- peers ------------------------------------------------------------------------------

    def _peers(self) -> Iterator[ExternalPeer]:
        for prefix in PREFIXES:
            text = self._annotations.get(f"{prefix}peers")
            if text is not None:
                if text.strip():
                    yield from self._yaml_peers(f"{prefix}peers", text)
                return
            if f"{prefix}peer.ips" in self._annotations:
                yield from self._listed_peers()
                return
        for name in ("peer.asns", "peer.ports", "peer.passwords", "peer.localips"):
            found = self._find(name)
            if found is not None:
                self._bad(found[0], "needed peer.ips too, got none")

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
            raise scalars.BadValueError("needed YAML without aliases")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """Read YAML with every scalar as the text that was written: 64512:1:2 is no number in base 60.

    Raises:
        ValueError: it is not YAML, or has aliases.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a BaseLoader
    except (yaml.YAMLError, RecursionError):
        raise scalars.BadValueError("not YAML") from None


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
        raise scalars.BadValueError(f"needed a mapping, got {type(item).__name__}")
    given = {_PEER_KEYS.get(str(k), str(k)): v for k, v in item.items() if v not in (None, "")}
    unknown = sorted(set(given) - set(_READERS) - {"password"})
    if unknown:
        # A key that is no word is a slip, such as a missing space, and may hold a password.
        named = f" is named {unknown[0]!r}" if _WORD.fullmatch(unknown[0]) else " looks like it"
        raise scalars.BadValueError(f"no key of a peer{named}")
    for key in ("address", "asn"):
        if key not in given:
            raise scalars.BadValueError(f"needed {key}, got none")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key == "password":
            if not isinstance(value, str):
                raise scalars.BadValueError("password: needed a text")
            values[key] = password(value, encoded=encoded)
            continue
        name, parse = _READERS[key]
        try:
            values[name] = parse(value)
        except ValueError as e:
            raise scalars.BadValueError(f"{key}: {e}") from e
    imports = {k.removeprefix("import_"): values.pop(k) for k in list(values) if k[:7] == "import_"}
    peer = ExternalPeer(**values, imports=ImportPolicy(**imports))
    if peer.ttl_security and peer.multihop:
        raise scalars.BadValueError("ttlSecurity: needed a peer without multihop")
    if peer.keepalive_s > peer.hold_s:
        raise scalars.BadValueError("keepaliveSeconds: needed at most holdSeconds")
    source = peer.local_address
    if source is not None and family_of(source) is not family_of(peer.address):
        raise scalars.BadValueError("localAddress: needed the family of the peer's address")
    return peer


def password(text: str, *, encoded: bool) -> str:
    """A TCP-MD5 key.

    Raises:
        ValueError: it cannot be one.
    """
    if encoded:
        try:
            text = base64.b64decode(text.strip().encode("ascii"), validate=True).decode()
        except (binascii.Error, ValueError):
            raise scalars.BadValueError("password: needed base64") from None
        text = text.removesuffix("\n")  # what `echo secret | base64` leaves
    if len(text.encode()) > PASSWORD_MAX:
        raise scalars.BadValueError(f"password: needed at most {PASSWORD_MAX} bytes")
    if '"' in text or not text.isprintable():
        # BIRD's strings have no escapes.
        raise scalars.BadValueError('password: needed printable characters without "')
    return text


def _rejecting(policy: ImportPolicy, reject: tuple[Prefix, ...]) -> ImportPolicy:
    return replace(policy, reject=policy.reject + reject) if reject else policy


_READERS: dict[str, tuple[str, Any]] = {
    "address": ("address", scalars.router_address),
    "asn": ("asn", scalars.asn),
    "port": ("port", scalars.port),
    "localAddress": ("local_address", scalars.router_address),
    "multihop": ("multihop", scalars.ttl),
    "ttlSecurity": ("ttl_security", scalars.boolean),
    "bfd": ("bfd", scalars.boolean),
    "gracefulRestart": ("graceful_restart", scalars.boolean),
    "reflector": ("reflector", scalars.boolean),
    "import": ("import_enabled", scalars.boolean),
    "importOnly": ("import_only", scalars.prefixes),
    "importReject": ("import_reject", scalars.prefixes),
    "importDefaultRoute": ("import_default_route", scalars.boolean),
    "importLimit": ("import_limit", lambda v: scalars.number(v, 1, 10_000_000)),
    "export": ("export", scalars.prefixes),
    "communities": ("communities", scalars.communities),
    "prepend": ("prepend", scalars.prepended),
    "localPreference": ("local_pref", scalars.u32),
    "med": ("med", scalars.u32),
    "holdSeconds": ("hold_s", scalars.seconds),
    "keepaliveSeconds": ("keepalive_s", scalars.keepalive),
}
