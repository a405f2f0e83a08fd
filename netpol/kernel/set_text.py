"""Sets as text: what `ipset restore` takes, for people, for golden files and for `render`.

The text and the netlink frames are two spellings of one transaction: creation parameters are decided
here, once, for both. Feed the text to `ipset -exist restore`: like the driver's own operations, every
line is then harmless where its effect is there already.
"""

from __future__ import annotations

import errno
from typing import assert_never

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    EmptySet,
    SetError,
    SetOp,
    SetTransaction,
)
from netpol.model.ids import Owner, SetName
from netpol.model.net import Family, Prefix, format_address
from netpol.model.ruleset import (
    SET_NAME_MAX,
    AddressPort,
    AddressPortNet,
    Member,
    NetPair,
    SetSpec,
)

#: The default mark field: 12 bits above everything that kube-proxy and common CNI plugins use.
DEFAULT_MARK_MASK = 0xFFF00000
#: The least that the kernel accepts (IPSET_MIMINAL_HASHSIZE).
HASHSIZE_MIN = 64
#: 2**20 buckets of a pointer each are 8 MB: no set is worth more up front, the kernel grows it.
HASHSIZE_MAX = 1 << 20
#: The kernel's default of 65,536 is below what a selector can match in a large cluster. It is only a
#: ceiling and costs no memory. It is part of what makes two sets equal, so it stays one constant
#: unless a set is created for more than half of it.
MAXELEM = 1 << 20

FAMILY_WORDS = {Family.V4: "inet", Family.V6: "inet6"}


def hashsize_for(size: int) -> int:
    """Buckets for an expected number of members: the next power of two, so that no resize happens."""
    return min(max(HASHSIZE_MIN, 1 << max(size - 1, 0).bit_length()), HASHSIZE_MAX)


def maxelem_for(size: int) -> int:
    """The ceiling for an expected number of members; twice the need, so that a set can grow."""
    return MAXELEM if 2 * size <= MAXELEM else 1 << (2 * size - 1).bit_length()


def check_name(name: SetName) -> None:
    """Refuse a name that ipset would refuse, or that would change the meaning of the text.

    Raises:
        ValueError: an unusable name.
    """
    if not name or len(name.encode()) > SET_NAME_MAX or any(c.isspace() for c in name):
        raise ValueError(f"{name!r} is not a set name (1 to {SET_NAME_MAX} bytes, no blanks)")


def check_owner(op: SetOp, owner: Owner) -> None:
    """Refuse an operation on another owner's set, or on nobody's of ours; raises SetError."""
    name = op.name if isinstance(op, DestroySet) else op.spec.name
    if not owner.owns(name):
        raise SetError(f"set {name} is not ours to change", name=name, code=errno.EPERM)


def member_text(member: Member) -> str:
    """Write a member as `ipset add` takes it and `ipset save` prints it."""
    if isinstance(member, bytes):
        return format_address(member)
    if isinstance(member, Prefix):
        return format_address(member.address) if member.is_host else str(member)
    if isinstance(member, AddressPort):
        return f"{format_address(member.address)},{str(member.protocol).lower()}:{member.port}"
    if isinstance(member, NetPair):
        return f"{member_text(member.first)},{member_text(member.second)}"
    if isinstance(member, AddressPortNet):
        head = AddressPort(member.address, member.protocol, member.port)
        return f"{member_text(head)},{member_text(member.net)}"
    assert_never(member)


def restore_text(tx: SetTransaction, *, mark_mask: int = DEFAULT_MARK_MASK) -> str:
    """Write a transaction as the text that `ipset -exist restore` applies to the same effect.

    Args:
        tx: the operations.
        mark_mask: the mask that every member's mark is stored with.
    """
    lines: list[str] = []
    for op in tx.ops:
        if isinstance(op, CreateSet):
            lines.append(_create_text(op.spec, op.size))
        elif isinstance(op, AddMembers):
            head = f"add {op.spec.name} "
            for member, mark in op.members.items():
                tail = "" if mark is None else f" skbmark {mark:#010x}/{mark_mask:#010x}"
                lines.append(f"{head}{member_text(member)}{tail}")
        elif isinstance(op, DeleteMembers):
            head = f"del {op.spec.name} "
            lines.extend(f"{head}{member_text(member)}" for member in op.members)
        elif isinstance(op, EmptySet):
            lines.append(f"flush {op.spec.name}")
        elif isinstance(op, DestroySet):
            lines.append(f"destroy {op.name}")
        else:
            assert_never(op)
    return "".join(f"{line}\n" for line in lines)


def _create_text(spec: SetSpec, size: int) -> str:
    check_name(spec.name)
    return (
        f"create {spec.name} {spec.kind} family {FAMILY_WORDS[spec.family]}"
        f" hashsize {hashsize_for(size)} maxelem {maxelem_for(size)}"
        f"{' skbinfo' if spec.marks else ''}"
    )
