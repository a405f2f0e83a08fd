"""What the rest of netpol asks of the kernel: protocols, and the values that cross them.

Nothing here does anything. A change is a value (a transaction) that can be printed as exactly what an
operator would type; nothing happens until a driver applies it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from netpol.lib.errors import KernelError
from netpol.model import ids
from netpol.model.ids import ChainName, SetName
from netpol.model.ipvs import IpvsFailure, IpvsOp, ServerId, ServerState
from netpol.model.net import Family
from netpol.model.ruleset import Chain, Hook, Member, Members, Rule, SetSpec

# -- sets ---------------------------------------------------------------------------------------


class SetError(KernelError):
    """The kernel refused an operation on a set.

    `name` is the set, `member` the entry it stopped at (entries before it stay applied), `code` the
    kernel's error number (errno, or IPSET_ERR_* from 4096).
    """

    def __init__(
        self, what: str, *, name: SetName, code: int, member: Member | None = None, needed: str = ""
    ) -> None:
        super().__init__(what, needed=needed)
        self.name, self.member, self.code = name, member, code


class CreateSet(NamedTuple):
    """Create a set, or do nothing where an equal one stands; `size` is the expected member count."""

    spec: SetSpec
    size: int = 0


class AddMembers(NamedTuple):
    """Add members; one that is there gets the new mark. Never an error for what is there."""

    spec: SetSpec
    members: Members


class DeleteMembers(NamedTuple):
    """Delete members; never an error for what is not there."""

    spec: SetSpec
    members: Sequence[Member]


class EmptySet(NamedTuple):
    """Take all members out of a set, whatever they are."""

    spec: SetSpec


class DestroySet(NamedTuple):
    """Destroy a set that nothing references; never an error for what is not there."""

    name: SetName


SetOp = CreateSet | AddMembers | DeleteMembers | EmptySet | DestroySet


@dataclass(frozen=True, slots=True)
class SetTransaction:
    """Operations in order (`set_text.restore_text` prints them). Not atomic: each is idempotent."""

    ops: tuple[SetOp, ...]


@dataclass(frozen=True, slots=True)
class SetDump:
    """One set as the kernel has it."""

    spec: SetSpec
    members: Members
    references: int = 0


class SetDriver(Protocol):
    """ipset. Only sets of one owner, by their names, are seen or touched."""

    def dump(self, names: Sequence[SetName] | None = None) -> dict[SetName, SetDump]:
        """Read our sets (or those named) with members.

        A foreign-looking set under our prefix (another type than we use) is reported with its name by
        SetError. Raises KernelMissingError where the kernel has no ipset.
        """
        ...

    def headers(self) -> dict[SetName, int]:
        """Names of our sets and how many members each has: a cheap look."""
        ...

    def apply(self, tx: SetTransaction) -> None:
        """Apply in order; raises SetError at the first refusal."""
        ...

    def close(self) -> None:
        """Release the socket."""
        ...


# -- tables -------------------------------------------------------------------------------------


class Variant(StrEnum):
    """The two implementations of iptables."""

    NFT = "nft"
    LEGACY = "legacy"


class TableError(KernelError):
    """A table transaction was refused; the table is as it was.

    `retryable` where the same transaction may go through later (lock held, resource busy); `line` is
    the 1-based line of the transaction's text that was refused, 0 where unknown.
    """

    def __init__(self, what: str, *, retryable: bool, line: int = 0, got: str = "") -> None:
        super().__init__(what, got=got)
        self.retryable, self.line = retryable, line


class ForeignRule(NamedTuple):
    """A rule in one of our chains that we would not have written: its text."""

    text: str


class HookState(NamedTuple):
    """The owner's jumps in a hook.

    `jumps` are the 1-based positions, among all rules, of those that jump to a chain of the owner, with
    their chains; `place` is where its jump has to stand: behind those of the rooms that go first.
    """

    jumps: tuple[tuple[int, ChainName], ...] = ()
    place: int = 1


@dataclass(frozen=True, slots=True)
class TableDump:
    """The owner's part of one table of one family: its chains, and its jumps in the hooks."""

    chains: Mapping[ChainName, tuple[Rule | ForeignRule, ...]] = field(default_factory=dict)
    hooks: Mapping[Hook, HookState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableTransaction:
    """One atomic change of one table of one family.

    Attributes:
        replace: chains that are created or get exactly these rules.
        delete: chains of ours that go (after everything that references them went).
        hooks: for each hook named: the chain that the rule at our place (rule 1, or behind the rooms
            that go first) must jump to, or None for no jump of ours. All other jumps of ours in that
            hook go; the new one is inserted before the old ones are deleted.
        hook_state: the jumps that stand there now (from the dump), which `hooks` replaces.
    """

    table: str
    family: Family
    replace: Mapping[ChainName, Chain] = field(default_factory=dict)
    delete: tuple[ChainName, ...] = ()
    hooks: Mapping[Hook, ChainName | None] = field(default_factory=dict)
    hook_state: Mapping[Hook, HookState] = field(default_factory=dict)


class TableDriver(Protocol):
    """iptables of one variant: the tables of both families, as one owner sees them.

    "Ours" is what belongs to that owner by its name (`model.ids.Owner`).
    """

    variant: Variant

    def dump(self, table: str, family: Family) -> TableDump:
        """Read our chains and jumps. An absent table is an empty dump and is not created."""
        ...

    def fingerprint(self, table: str, family: Family) -> str:
        """A text that differs whenever a dump would, for much less than a dump; counters aside."""
        ...

    def generation(self) -> int | None:
        """A number that another one follows with everybody's transactions; None where nobody counts."""
        ...

    def apply(self, tx: TableTransaction) -> None:
        """Apply atomically; raises TableError, after which the table is as it was."""
        ...

    def counters(self, table: str, family: Family) -> dict[ChainName, tuple[tuple[int, int], ...]]:
        """Packets and bytes of every rule of our chains, in rule order."""
        ...


# -- ipvs ---------------------------------------------------------------------------------------


class Timeouts(NamedTuple):
    """How long IPVS keeps idle connections."""

    tcp_s: int
    tcp_fin_s: int
    udp_s: int


class IpvsDriver(Protocol):
    """The IPVS table of a network namespace: everybody's servers; whose they are, the caller knows."""

    def dump(self) -> dict[ServerId, ServerState]:
        """Read all virtual servers with their real servers.

        Raises KernelMissingError where the kernel has no IPVS, KernelError where it does not answer.
        """
        ...

    def read(self, ids: Sequence[ServerId]) -> dict[ServerId, ServerState]:
        """Read those that are named and there, at the cost of those."""
        ...

    def apply(self, ops: Sequence[IpvsOp]) -> tuple[IpvsFailure, ...]:
        """Apply in order, in batches; an operation that is refused stops no other one."""
        ...

    def set_timeouts(self, *, tcp_s: int, tcp_fin_s: int, udp_s: int) -> None:
        """Set how long idle connections are kept; 0 leaves one as it is."""
        ...

    def timeouts(self) -> Timeouts:
        """How long idle connections are kept."""
        ...

    def close(self) -> None:
        """Release the socket."""
        ...


class VipDriver(Protocol):
    """Our dummy link and the addresses on it (host prefixes, no duplicate address detection).

    Each address has a local route. The one that the kernel makes lets the node speak to the address with
    the address itself; with a source, it speaks with that, and is known as the node wherever that goes.
    """

    def dump(self) -> frozenset[bytes] | None:
        """The addresses on the link; None where there is no link."""
        ...

    def misrouted(self, sources: Mapping[Family, bytes]) -> frozenset[bytes]:
        """Addresses on the link that are not local with the source of their family: apply adds them again.

        The kernel drops the routes of a source that leaves the node, and of a link that goes down.
        """
        ...

    def apply(
        self,
        *,
        add: Sequence[bytes],
        remove: Sequence[bytes],
        sources: Mapping[Family, bytes] | None = None,
    ) -> tuple[tuple[bytes, int], ...]:
        """Make the link if needed, then add and remove; returns (address, errno) of what was refused.

        What is there is no error to add, what is not there none to remove.

        Args:
            add: addresses; those that are there get their route.
            remove: addresses that go, with their route.
            sources: addresses of the node, which it speaks with to the added ones of their family;
                a family without one has the kernel's own route.
        """
        ...

    def remove_link(self) -> None:
        """Remove the link with its addresses and routes; none is no error."""
        ...

    def close(self) -> None:
        """Release the socket."""
        ...


class FlowMatch(NamedTuple):
    """Flows of conntrack that were sent on to a backend; an empty address and a port 0 mean any."""

    protocol: ids.Protocol
    backend: bytes
    backend_port: int = 0
    address: bytes = b""
    port: int = 0


class FlowDriver(Protocol):
    """The flows that conntrack knows, of which we only ever end some."""

    def end(self, matches: Collection[FlowMatch]) -> int:
        """End the flows that match any; returns how many there were."""
        ...

    def close(self) -> None:
        """Release the socket."""
        ...
