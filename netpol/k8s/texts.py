"""Texts of API objects read: addresses, protocols, ports, annotations; what is wrong is named as a `Problem`.

Pure, and never failing: what cannot be read is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from netpol.k8s import wire
from netpol.model.ids import PORT_MAX, PORT_MIN, PORT_PROTOCOLS, Protocol
from netpol.model.labels import Labels, labels
from netpol.model.net import parse_address
from netpol.model.objects import ANNOTATION_PREFIXES
from netpol.model.policy import Problem

Problems = list[Problem]

_PROTOCOLS = {p.value: p for p in PORT_PROTOCOLS}


@lru_cache(maxsize=4096)
def shared_text(value: str) -> str:
    """One value for equal texts of many objects."""
    return value


def own_annotations(meta: wire.Meta) -> Labels:
    """The annotations that a room may read."""
    given = meta.annotations if isinstance(meta, wire.AnnotatedMeta) else None
    return labels({k: v for k, v in (given or {}).items() if k.startswith(ANNOTATION_PREFIXES)})


def read_addresses(
    texts: Iterable[str | None], field: str, problems: Problems
) -> tuple[bytes, ...]:
    """Parse addresses in order, without repetitions; empty texts mean "none yet"."""
    found: list[bytes] = []
    for text in texts:
        if not text:
            continue
        try:
            packed = parse_address(text)
        except ValueError as e:
            problems.append(Problem(field, str(e)))
            continue
        if packed not in found:
            found.append(packed)
    return tuple(found)


def read_protocol(text: str | None, where: str, problems: Problems) -> Protocol | None:
    """The protocol of a declared port; absent means TCP, as the API server defaults it."""
    protocol = _PROTOCOLS.get(text or "TCP")
    if protocol is None:
        problems.append(Problem(f"{where}.protocol", f"{text!r} is not TCP, UDP or SCTP"))
    return protocol


def read_port(number: int | None, field: str, problems: Problems) -> int | None:
    """A port number, None where it is none."""
    if number is None or not PORT_MIN <= number <= PORT_MAX:
        problems.append(Problem(field, f"{number} is not a port ({PORT_MIN}-{PORT_MAX})"))
        return None
    return number
