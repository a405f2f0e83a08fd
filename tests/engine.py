"""The product's evaluator behind the oracle's question, for tests that hold the two side by side."""

from __future__ import annotations

from typing import Any

from netpol.k8s.decode import NAMESPACE, NETWORK_POLICY, NODE, POD, decode
from netpol.model.flow import Flow, Party
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import Family, family_of, parse_address
from netpol.policy.compile import compile_policy
from netpol.policy.world import World

Json = dict[str, Any]


class NoPartyError(LookupError):
    """No such pod, or it has no address of the family."""


def build(manifests: dict[str, list[Json]]) -> World:
    """Decode and compile a world of manifests."""
    return World.build(
        namespaces=[decode(NAMESPACE, m).value for m in manifests["namespaces"]],
        pods=[decode(POD, m).value for m in manifests["pods"]],
        policies=[compile_policy(decode(NETWORK_POLICY, m).value) for m in manifests["policies"]],
        nodes=[decode(NODE, m).value for m in manifests["nodes"]],
    )


def protocol_of(port: str, family: int) -> tuple[Protocol, int | None]:
    """`80/TCP` or `ICMP` to a protocol of the family and a port."""
    if port == "ICMP":
        return (Protocol.ICMP if family == Family.V4 else Protocol.ICMPV6), None
    number, _, protocol = port.partition("/")
    return Protocol(protocol), int(number)


def party(world: World, reference: str, family: int) -> Party:
    """One end of a flow: a pod by name or whoever has an address; whoever has it now, as on the wire.

    Raises:
        NoPartyError: nothing of that name has an address of the family.
    """
    if "/" not in reference:
        address = parse_address(reference)
        if family_of(address) != family:
            raise NoPartyError(reference)
        return world.party(address)
    namespace, name = reference.split("/")
    pod = world.pod(ObjectKey(namespace, name))
    if pod is None:
        raise NoPartyError(reference)
    found = world.pod_party(pod, Family(family))
    if found is not None:
        return found
    for address in pod.addresses:
        if family_of(address) == family:
            return world.party(address)
    raise NoPartyError(reference)


def flow(world: World, src: str, dst: str, port: str, family: int) -> Flow:
    """A flow between two references in one family."""
    protocol, number = protocol_of(port, family)
    return Flow(party(world, src, family), party(world, dst, family), protocol, number)
