"""The NetworkPolicy object as the API writes it (networking.k8s.io/v1), decoded leniently.

Every field has a default and strings are not checked: an object that the API server would refuse must
still decode, so that `policy.compile` can fail closed where it is wrong, as the specification says.
"""

from __future__ import annotations

import msgspec

from netpol.model.ids import ObjectKey


class LabelSelectorRequirement(msgspec.Struct, frozen=True, gc=False):
    """meta/v1 LabelSelectorRequirement."""

    key: str = ""
    operator: str = ""
    values: tuple[str, ...] | None = None


class LabelSelector(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """meta/v1 LabelSelector."""

    match_labels: dict[str, str] | None = None
    match_expressions: tuple[LabelSelectorRequirement, ...] | None = None


class IPBlock(msgspec.Struct, frozen=True, gc=False):
    """networking/v1 IPBlock."""

    cidr: str = ""
    excepts: tuple[str, ...] | None = msgspec.field(default=None, name="except")


class Peer(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """networking/v1 NetworkPolicyPeer."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class Port(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """networking/v1 NetworkPolicyPort."""

    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class IngressRule(msgspec.Struct, frozen=True, gc=False):
    """networking/v1 NetworkPolicyIngressRule."""

    ports: tuple[Port, ...] | None = None
    peers: tuple[Peer, ...] | None = msgspec.field(default=None, name="from")


class EgressRule(msgspec.Struct, frozen=True, gc=False):
    """networking/v1 NetworkPolicyEgressRule."""

    ports: tuple[Port, ...] | None = None
    peers: tuple[Peer, ...] | None = msgspec.field(default=None, name="to")


class NetworkPolicySpec(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """networking/v1 NetworkPolicySpec."""

    pod_selector: LabelSelector | None = None
    ingress: tuple[IngressRule, ...] | None = None
    egress: tuple[EgressRule, ...] | None = None
    policy_types: tuple[str, ...] | None = None


class NetworkPolicy(msgspec.Struct, frozen=True, gc=False):
    """A NetworkPolicy: identity and spec."""

    key: ObjectKey
    uid: str = ""
    spec: NetworkPolicySpec = NetworkPolicySpec()
    created: str = ""
