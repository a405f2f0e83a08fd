"""References: what people type for one end of a connection.

KIND/NAME (namespace by -n), NS/NAME (a pod), NS/KIND/NAME, an address, or a CIDR. KIND/NAME wins over
NS/NAME where a namespace is named like a kind; NS/KIND/NAME is never ambiguous.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from netpol.lib.errors import InputError
from netpol.model.ids import ObjectKey
from netpol.model.net import Prefix, host_prefix, parse_address, parse_prefix


class RefKind(StrEnum):
    """What a reference names."""

    POD = "pod"
    SERVICE = "svc"
    NODE = "node"
    BLOCK = "block"


class Ref(NamedTuple):
    """A reference as read; `block` only for addresses and CIDRs, `key` only for objects."""

    text: str
    kind: RefKind
    key: ObjectKey = ObjectKey("", "")
    block: Prefix | None = None


_KINDS = {
    **dict.fromkeys(("pod", "pods", "po"), RefKind.POD),
    **dict.fromkeys(("svc", "service", "services"), RefKind.SERVICE),
    **dict.fromkeys(("node", "nodes", "no"), RefKind.NODE),
}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LOOKS_NUMERIC = re.compile(r"[0-9.]+\Z")
_NEEDED = "pod/NAME, svc/NAME, node/NAME, NS/NAME (a pod), NS/KIND/NAME, an address or a CIDR"


def parse_ref(text: str, *, namespace: str) -> Ref:
    """Read a reference.

    Raises:
        InputError: none of the forms.
    """
    shown = repr(text if len(text) <= 80 else text[:77] + "...")
    head = text.split("/", 1)[0]
    if ":" in head or (head.count(".") == 3 and _LOOKS_NUMERIC.match(head)):
        return _block(text, shown)
    parts = text.split("/")
    for part in parts:
        if not _NAME.fullmatch(part) and part not in _KINDS:
            raise InputError(f"not a reference: {shown}", needed=_NEEDED)
    if len(parts) == 2:
        first, name = parts
        kind = _KINDS.get(first)
        if kind is None:
            return Ref(text, RefKind.POD, ObjectKey(first, name))
        return Ref(text, kind, _key(kind, namespace, name))
    if len(parts) == 3:
        ns, word, name = parts
        kind = _KINDS.get(word)
        if kind is None:
            raise InputError(f"no kind {word!r} in {shown}", needed="pod, svc or node")
        return Ref(text, kind, _key(kind, ns, name))
    hint = f"; did you mean pod/{text}?" if len(parts) == 1 else ""
    raise InputError(f"not a reference: {shown}{hint}", needed=_NEEDED)


def parse_pod_ref(text: str, *, namespace: str) -> Ref:
    """Read a reference that must be a pod's."""
    ref = parse_ref(text, namespace=namespace)
    if ref.kind is not RefKind.POD:
        raise InputError(
            f"{text[:80]!r} is not a pod", needed="a pod, or --to (or --from) for the other end"
        )
    return ref


def _key(kind: RefKind, namespace: str, name: str) -> ObjectKey:
    return ObjectKey("" if kind is RefKind.NODE else namespace, name)


def _block(text: str, shown: str) -> Ref:
    try:
        block = parse_prefix(text) if "/" in text else host_prefix(parse_address(text))
    except ValueError as e:
        raise InputError(f"not an address or CIDR: {shown}", got=str(e)) from None
    return Ref(text, RefKind.BLOCK, block=block)
