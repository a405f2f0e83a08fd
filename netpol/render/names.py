"""Names of our chains and sets: stable hashes over separated fields.

Equal things have equal names on every node and after every restart, so counters survive and two
policies that name one selector share its set.
"""

from __future__ import annotations

from functools import lru_cache

from netpol.lib.naming import digest
from netpol.model.ids import OWN_PREFIX, ChainName, Direction, SetName
from netpol.model.labels import Selector
from netpol.model.net import Family, Prefix
from netpol.model.policy import PodPeer
from netpol.model.ruleset import Hook
from netpol.policy.graph import ClassKey, PolicyId
from netpol.policy.members import LocalPods, PortSet, SetKey

#: 16 base32 characters: 80 bits, so that names do not collide by accident.
_HASH = 16

_LETTER = {Direction.INGRESS: "I", Direction.EGRESS: "E"}


def _chain(tail: str) -> ChainName:
    return ChainName(OWN_PREFIX + tail)


def _set(tail: str) -> SetName:
    return SetName(OWN_PREFIX + tail)


OK = _chain("OK")
SPOOFED = _chain("SPOOFED")
#: Where a source on a pod interface that is no local pod is looked at once more.
ANSWERS = _chain("ANSWERS")
#: In the filter table: where denied packets are answered, of FORWARD and of OUTPUT.
REJECT, REJECT_OUTPUT = _chain("REJECT"), _chain("REJECT-OUT")


def hook_chain(hook: Hook) -> ChainName:
    """The chain that rule 1 of a hook jumps to."""
    return _chain(hook.value)


def held_chain(direction: Direction) -> ChainName:
    """Where packets of unknown pods end."""
    return _chain(f"HELD-{_LETTER[direction]}")


def tree_chain(direction: Direction, path: str = "") -> ChainName:
    """A node of the dispatch tree: the root, or the one for leading digits of the number."""
    return _chain(f"TREE-{_LETTER[direction]}{'-' + path if path else ''}")


def is_tree_chain(name: ChainName) -> bool:
    """Whether a chain is a node of a dispatch tree."""
    roots = [tree_chain(d) for d in Direction]
    return name in roots or name.startswith(tuple(f"{root}-" for root in roots))


def overflow_chain(direction: Direction) -> ChainName:
    """Dispatch by set of the classes that got no number."""
    return _chain(f"OVER-{_LETTER[direction]}")


@lru_cache(maxsize=65536)
def class_id(key: ClassKey) -> str:
    """Hash of a class: its direction and ordered policies."""
    fields = [key.direction.value]
    for policy in key.policies:
        fields += _policy_fields(policy)
    return digest(*fields, chars=_HASH)


def class_chain(key: ClassKey) -> ChainName:
    """The chain that judges a class."""
    return _chain(f"C{_LETTER[key.direction]}-{class_id(key)}")


@lru_cache(maxsize=65536)
def policy_chain(policy: PolicyId, direction: Direction) -> ChainName:
    """The chain with the rules of one direction of a policy."""
    return _chain(f"P{_LETTER[direction]}-{digest(*_policy_fields(policy), chars=_HASH)}")


def _policy_fields(policy: PolicyId) -> list[str]:
    types = ",".join(policy.isolates)
    return [policy.key.namespace, policy.key.name, types, *_selector_fields(policy.subject)]


def _selector_fields(selector: Selector) -> list[str]:
    out = [str(len(selector.requirements))]
    for term in selector.requirements:
        out += [term.key, term.operator.value, str(len(term.values)), *term.values]
    return out


@lru_cache(maxsize=131072)
def _peer_fields(peer: PodPeer | LocalPods) -> tuple[str, ...]:
    if isinstance(peer, LocalPods):
        return ("local",)
    scope = (
        ["ns", peer.scope]
        if isinstance(peer.scope, str)
        else ["nssel", *_selector_fields(peer.scope)]
    )
    return (*scope, *_selector_fields(peer.pods))


@lru_cache(maxsize=131072)
def member_set(key: SetKey, family: Family) -> SetName:
    """The set of a peer's addresses, or of its addresses with a named port."""
    if isinstance(key, PortSet):
        fields = ("port", key.protocol.value, key.name, *_peer_fields(key.peer))
        return _set(f"T{int(family)}-{digest(*fields, chars=_HASH)}")
    return _set(f"A{int(family)}-{digest('peer', *_peer_fields(key), chars=_HASH)}")


def net_set(prefixes: tuple[Prefix, ...], family: Family) -> SetName:
    """The set of some prefixes, named by its contents."""
    return _set(f"N{int(family)}-{digest(*map(str, prefixes), chars=_HASH)}")


def class_map(direction: Direction, family: Family) -> SetName:
    """Address of a local pod to the number of its class."""
    return _set(f"{_LETTER[direction]}MAP{int(family)}")


def ipvs_set(family: Family) -> SetName:
    """What IPVS takes at INPUT and judges at OUTPUT, by address and port."""
    return _set(f"IPVS{int(family)}")


def answers_set(family: Family) -> SetName:
    """Addresses and ports of Services that pods of this node answer from themselves."""
    return _set(f"ANSWER{int(family)}")


def overflow_set(key: ClassKey, family: Family) -> SetName:
    """Addresses of the local pods of a class that got no number."""
    return _set(f"O{_LETTER[key.direction]}{int(family)}-{class_id(key)}")


def is_overflow_set(name: SetName) -> bool:
    """Whether a set is the address set of some overflow class."""
    return name.startswith((f"{OWN_PREFIX}OI", f"{OWN_PREFIX}OE"))


def family_of_set(name: SetName) -> Family:
    """The family that the name of a set of ours tells; IPv4 for a name that tells none."""
    head = name.removeprefix(OWN_PREFIX).partition("-")[0]
    return Family.V6 if head.endswith(str(int(Family.V6))) else Family.V4
