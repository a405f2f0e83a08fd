"""Rules laid out as kube-router lays them out, as the baseline of packet costs.

What makes its layout what it is: one chain for each pod and one for each policy; a list of rules by pod
address in each hook, walked from the top by every packet, in which a pod stands up to four times; two
sets for each rule of a policy, its subjects and its peers; two bits of the mark, one for "a policy
matched" and one for "this pod's chain was passed". Only IPv4 and what a forwarded packet meets and
walks past; names and order are ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from netpol.model.ids import Direction
from netpol.model.net import Family, family_of, format_address
from netpol.model.objects import Endpoint
from netpol.model.policy import CompiledPolicy, PodPeer, PolicyRule, PortRange
from netpol.policy.match import pod_matches
from netpol.policy.world import World

MATCHED, PASSED = "0x10000/0x10000", "0x20000/0x20000"


class Layout:
    """The text of both tools for one node.

    Attributes:
        order: local pods as they follow each other in the lists of the hooks.
    """

    def __init__(self, world: World, node: str, *, seed: int = 1) -> None:
        self._world = world
        self.order = [p for p in world.pods.values() if p.node == node and p.policed]
        random.Random(seed).shuffle(self.order)
        self._sets: list[str] = []
        self._numbers = count()
        self._rules: list[str] = []
        self._policies: dict[str, str] = {}
        for policy in world.policies.values():
            self._policy(policy)
        self._pods = {pod.key: f"POD-{number}" for number, pod in enumerate(self.order)}
        for pod in self.order:
            self._pod(pod)
        self._hooks()

    @property
    def sets(self) -> str:
        """For `ipset restore`."""
        return "\n".join([*self._sets, ""])

    @property
    def rules(self) -> str:
        """For `iptables-restore`: the filter table."""
        chains = ["COMMON", "TAIL", "LIST-IN", "LIST-FORWARD", "LIST-OUT"]
        chains += [*self._policies.values(), *self._pods.values()]
        heads = [f":{name} - [0:0]" for name in chains]
        return "\n".join(["*filter", *heads, *self._rules, "COMMIT", ""])

    def _set(self, pods: list[Endpoint]) -> str:
        name = f"peer-{next(self._numbers)}"
        self._sets.append(f"create {name} hash:ip family inet timeout 0")
        for pod in pods:
            for address in pod.addresses:
                if family_of(address) is Family.V4:
                    self._sets.append(f"add {name} {format_address(address)}")
        return name

    def _policy(self, policy: CompiledPolicy) -> None:
        chain = self._policies[str(policy.key)] = f"POLICY-{len(self._policies)}"
        subjects = self._set(
            [
                p
                for p in self._world.pods.values()
                if p.key.namespace == policy.key.namespace
                and policy.subject.matches(dict(p.labels))
            ]
        )
        for direction in sorted(policy.isolates, reverse=True):
            for rule in policy.rules(direction):
                peers = self._set(
                    [
                        p
                        for p in self._world.pods.values()
                        if any(
                            isinstance(peer, PodPeer) and pod_matches(peer, p, self._world)
                            for peer in rule.peers or ()
                        )
                    ]
                )
                ingress = direction is Direction.INGRESS
                src, dst = (peers, subjects) if ingress else (subjects, peers)
                for protocol, port in _ports(rule):
                    match = (
                        f"-p {protocol} {_said(f'{policy.key} {direction} pods')} "
                        f"-m set --match-set {src} src -m set --match-set {dst} dst "
                        f"-m {protocol} --dport {port}"
                    )
                    self._rules.append(f"-A {chain} {match} -j MARK --set-xmark {MATCHED}")
                    self._rules.append(f"-A {chain} {match} -m mark --mark {MATCHED} -j RETURN")

    def _pod(self, pod: Endpoint) -> None:
        chain, address = self._pods[pod.key], format_address(pod.addresses[0])
        policies = {p.key: p for d in Direction for p in self._world.isolating(pod, d)}
        jumps = [f"{_said(f'policy {key}')} -j {self._policies[str(key)]}" for key in policies]
        unmatched = f"-m mark ! --mark {MATCHED}"
        limit = "-m limit --limit 10/min --limit-burst 10"
        for rule in (
            f"{_said('for all pods')} -j COMMON",
            f"-d {address} {_said('from this node')} -m addrtype --src-type LOCAL -j ACCEPT",
            *jumps,
            f"{_said(f'{pod.key} logged')} {unmatched} {limit} -j NFLOG --nflog-group 100",
            f"{_said(f'{pod.key} refused')} {unmatched} -j REJECT",
            "-j MARK --set-xmark 0x0/0x10000",
            f"{_said('passed')} -j MARK --set-xmark {PASSED}",
        ):
            self._rules.append(f"-A {chain} {rule}")

    def _hooks(self) -> None:
        self._rules += [
            f"-A COMMON {_said('invalid')} -m conntrack --ctstate INVALID -j DROP",
            f"-A COMMON {_said('stateful')} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            *(
                f"-A COMMON -p icmp {_said('icmp')} -m icmp --icmp-type {number} -j ACCEPT"
                for number in (8, 3, 11)
            ),
            f"-A TAIL {_said('passed')} -m mark --mark {PASSED} -j ACCEPT",
        ]
        for hook in ("IN", "FORWARD", "OUT"):
            builtin = {"IN": "INPUT", "FORWARD": "FORWARD", "OUT": "OUTPUT"}[hook]
            self._rules.append(f"-A {builtin} {_said('policy')} -j LIST-{hook}")
            for pod in self.order:
                for match in _addresses(hook, format_address(pod.addresses[0])):
                    jump = f"{_said(str(pod.key))} -j {self._pods[pod.key]}"
                    self._rules.append(f"-A LIST-{hook} {match} {jump}")
            self._rules.append(f"-A LIST-{hook} {_said('the end')} -j TAIL")
            self._rules.append(
                f"-A LIST-{hook} {_said('passed')} -m mark --mark {PASSED} -j ACCEPT"
            )


def _ports(rule: PolicyRule) -> Iterator[tuple[str, int]]:
    for port in rule.ports or ():
        if isinstance(port, PortRange):
            yield port.protocol.lower(), port.first


def _addresses(hook: str, address: str) -> list[str]:
    """How a pod stands in the list of a hook."""
    bridged = "-m physdev --physdev-is-bridged"
    source, target = f"-s {address}", f"-d {address}"
    if hook == "FORWARD":
        return [target, f"{target} {bridged}", source, f"{source} {bridged}"]
    return [source] if hook == "IN" else [target, source]


def _said(text: str) -> str:
    """A comment: a match of its own to the kernel of the legacy variant."""
    return f'-m comment --comment "{text}"'
