"""NetworkPolicy objects to their meaning: defaults applied, invalid parts closed and reported.

Owns what every field means alone; says nothing about which pods exist. An object that the API server
would refuse still compiles: what is wrong in a peer or a port matches nothing, what is wrong in the
selection isolates more, and each fault is a `Problem` with its field path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from netpol.model import networkpolicy as raw
from netpol.model.ids import PORT_MAX, PORT_MIN, PORT_PROTOCOLS, Direction, Protocol
from netpol.model.labels import EVERYTHING, Operator, Requirement, Selector, selector
from netpol.model.net import Prefix, parse_prefix, subtract
from netpol.model.policy import (
    BlockPeer,
    CompiledPolicy,
    InvalidPeer,
    PodPeer,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    PortName,
    PortRange,
    Problem,
)

#: IANA service name (RFC 6335 section 5.1), lower case as the API demands.
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!-)(?!.*--)[a-z0-9-]{1,15}(?<!-)")
#: Label keys and values (Kubernetes "qualified name": DNS-1123 subdomain, slash, 63 characters).
_LABEL_KEY = re.compile(
    r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?")
_LABEL_MAX = 63
#: `policyTypes` can name each direction once.
_TYPES_MAX = 2
_TYPE_NAMES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}


def compile_policy(policy: raw.NetworkPolicy) -> CompiledPolicy:
    """Work out a policy. Never raises; what the API would refuse is in `problems`."""
    return _Compiler(policy).run()


class _Compiler:
    """One compilation: collects problems on the way."""

    def __init__(self, policy: raw.NetworkPolicy) -> None:
        self._policy = policy
        self._problems: list[Problem] = []

    def run(self) -> CompiledPolicy:
        spec = self._policy.spec
        subject, subject_ok = self._selector(spec.pod_selector, "spec.podSelector", widen=True)
        isolates = self._types(spec)
        ingress = self._rules(spec.ingress, "spec.ingress", "from")
        egress = self._rules(spec.egress, "spec.egress", "to")
        if not subject_ok:
            # Which pods were meant cannot be known: isolate them and grant nothing.
            ingress = egress = ()
        return CompiledPolicy(
            key=self._policy.key,
            uid=self._policy.uid,
            subject=subject,
            isolates=isolates,
            ingress=ingress if Direction.INGRESS in isolates else (),
            egress=egress if Direction.EGRESS in isolates else (),
            problems=tuple(self._problems),
        )

    def _problem(self, field: str, message: str) -> None:
        self._problems.append(Problem(field, message))

    def _types(self, spec: raw.NetworkPolicySpec) -> frozenset[Direction]:
        names = spec.policy_types or ()
        if not names:
            default = {Direction.INGRESS}
            if spec.egress:
                default.add(Direction.EGRESS)
            return frozenset(default)
        unknown = [(i, n) for i, n in enumerate(names) if n not in _TYPE_NAMES]
        for i, name in unknown:
            self._problem(f"spec.policyTypes[{i}]", f"needed Ingress or Egress, got {name!r}")
        if len(names) > _TYPES_MAX:
            self._problem("spec.policyTypes", f"needed at most 2 entries, got {len(names)}")
        if unknown:
            return frozenset(_TYPE_NAMES.values())
        return frozenset(_TYPE_NAMES[n] for n in names)

    def _rules(
        self,
        rules: Sequence[raw.IngressRule | raw.EgressRule] | None,
        field: str,
        peers_field: str,
    ) -> tuple[PolicyRule, ...]:
        out = []
        for i, rule in enumerate(rules or ()):
            at = f"{field}[{i}]"
            peers = ports = None
            if rule.peers:
                peers = tuple(
                    self._peer(p, f"{at}.{peers_field}[{j}]") for j, p in enumerate(rule.peers)
                )
            if rule.ports:
                read = [self._port(p, f"{at}.ports[{j}]") for j, p in enumerate(rule.ports)]
                ports = tuple(dict.fromkeys(p for p in read if p is not None))
            out.append(PolicyRule(peers, ports))
        return tuple(out)

    # -- peers ------------------------------------------------------------------------------

    def _peer(self, peer: raw.Peer, field: str) -> PolicyPeer:
        if peer.ip_block is not None:
            if peer.pod_selector is not None or peer.namespace_selector is not None:
                return self._invalid(field, "ipBlock stands alone, got selectors beside it")
            return self._block(peer.ip_block, f"{field}.ipBlock")
        if peer.pod_selector is None and peer.namespace_selector is None:
            return self._invalid(
                field, "needed podSelector, namespaceSelector or ipBlock, got none"
            )
        pods, pods_ok = self._selector(peer.pod_selector, f"{field}.podSelector")
        scope: str | Selector = self._policy.key.namespace
        scope_ok = True
        if peer.namespace_selector is not None:
            scope, scope_ok = self._selector(peer.namespace_selector, f"{field}.namespaceSelector")
        if not (pods_ok and scope_ok):
            return InvalidPeer("its selector is invalid")
        return PodPeer(scope, pods)

    def _invalid(self, field: str, message: str) -> InvalidPeer:
        self._problem(field, message)
        return InvalidPeer(message)

    def _block(self, block: raw.IPBlock, field: str) -> PolicyPeer:
        try:
            cidr = parse_prefix(block.cidr)
        except ValueError as e:
            return self._invalid(f"{field}.cidr", f"{e}")
        excepts: list[Prefix] = []
        for i, text in enumerate(block.excepts or ()):
            at = f"{field}.except[{i}]"
            try:
                hole = parse_prefix(text)
            except ValueError as e:
                return self._invalid(at, f"{e}")
            if not cidr.covers(hole) or hole.length == cidr.length:
                return self._invalid(at, f"needed a smaller block inside {cidr}, got {text}")
            excepts.append(hole)
        return BlockPeer(cidr, tuple(excepts), subtract(cidr, excepts))

    # -- selectors --------------------------------------------------------------------------

    def _selector(
        self, source: raw.LabelSelector | None, field: str, *, widen: bool = False
    ) -> tuple[Selector, bool]:
        """Read a selector; False when a term is invalid. `widen` drops invalid terms."""
        if source is None:
            return EVERYTHING, True
        terms: list[Requirement] = []
        for key, value in (source.match_labels or {}).items():
            self._check_label(key, [value], f"{field}.matchLabels[{key}]")
            terms.append(Requirement(key, Operator.IN, (value,)))
        ok = True
        for i, expression in enumerate(source.match_expressions or ()):
            at = f"{field}.matchExpressions[{i}]"
            term = self._requirement(expression, at)
            if term is None:
                ok = False
            else:
                self._check_label(term.key, term.values, at)
                terms.append(term)
        if not ok and not widen:
            return EVERYTHING, False
        return selector(terms), ok

    def _requirement(self, source: raw.LabelSelectorRequirement, field: str) -> Requirement | None:
        try:
            operator = Operator(source.operator)
        except ValueError:
            self._problem(
                f"{field}.operator",
                f"needed one of {', '.join(Operator)}, got {source.operator!r}",
            )
            return None
        takes_values = operator in (Operator.IN, Operator.NOT_IN)
        if takes_values and not source.values:
            self._problem(f"{field}.values", f"{operator} needs values, got none")
            return None
        if not takes_values and source.values:
            self._problem(f"{field}.values", f"{operator} takes no values, got some")
            return None
        return Requirement(source.key, operator, source.values or ())

    def _check_label(self, key: str, values: Sequence[str], field: str) -> None:
        """Report what can be on no object; it needs no closing, since it matches none."""
        if not _LABEL_KEY.fullmatch(key) or len(key.rpartition("/")[2]) > _LABEL_MAX:
            self._problem(field, f"{key!r} is not a label key")
        for value in values:
            if not _LABEL_VALUE.fullmatch(value) or len(value) > _LABEL_MAX:
                self._problem(field, f"{value!r} is not a label value")

    # -- ports ------------------------------------------------------------------------------

    def _port(self, port: raw.Port, field: str) -> PortMatch | None:
        protocol = Protocol.TCP
        if port.protocol is not None:
            known = {str(p): p for p in PORT_PROTOCOLS}
            if port.protocol not in known:
                self._problem(
                    f"{field}.protocol", f"needed TCP, UDP or SCTP, got {port.protocol!r}"
                )
                return None
            protocol = known[port.protocol]
        if port.port is None:
            if port.end_port is not None:
                self._problem(f"{field}.endPort", "needed a port beside it, got none")
                return None
            return PortRange(protocol, PORT_MIN, PORT_MAX)
        if isinstance(port.port, str):
            return self._named(port.port, port.end_port, protocol, field=field)
        if not PORT_MIN <= port.port <= PORT_MAX:
            self._problem(f"{field}.port", f"needed {PORT_MIN}..{PORT_MAX}, got {port.port}")
            return None
        last = port.port
        if port.end_port is not None:
            last = port.end_port
            if not port.port <= last <= PORT_MAX:
                self._problem(
                    f"{field}.endPort", f"needed {port.port}..{PORT_MAX}, got {port.end_port}"
                )
                return None
        return PortRange(protocol, port.port, last)

    def _named(
        self, name: str, end_port: int | None, protocol: Protocol, *, field: str
    ) -> PortMatch | None:
        if end_port is not None:
            self._problem(f"{field}.endPort", f"needed a numeric port, got the name {name!r}")
            return None
        if not _PORT_NAME.fullmatch(name):
            self._problem(
                f"{field}.port",
                f"needed a number or a name of 1..15 of a-z, 0-9, - with a letter, got {name!r}",
            )
            return None
        return PortName(protocol, name)
