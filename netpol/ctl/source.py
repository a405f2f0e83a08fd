"""Where a command gets the cluster from: manifests (-f), or the API server (`api`).

The agent's socket is asked for what only the node knows (kernel, status); facts of the whole cluster
come from the API server, since an agent keeps no more than its rooms need.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netpol.ctl.output import plural, remark
from netpol.lib.errors import InputError
from netpol.model.ids import ObjectKey
from netpol.model.networkpolicy import NetworkPolicy
from netpol.model.policy import CompiledPolicy
from netpol.policy.compile import compile_policy
from netpol.policy.world import World

if TYPE_CHECKING:
    from netpol.k8s.manifests import Manifests


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster to answer about.

    Attributes:
        world: what policy sees.
        headless: Services without an address of their own.
        external_ips: other addresses that lead to a Service (externalIPs, load balancers).
        node_names: nodes that exist, also those that only pods name.
        offline: whether it was read from manifests.
    """

    world: World
    headless: frozenset[ObjectKey] = frozenset()
    external_ips: dict[bytes, ObjectKey] = field(default_factory=dict)
    node_names: tuple[str, ...] = ()
    offline: bool = False


def cluster(args: argparse.Namespace) -> Cluster:
    """The cluster that the arguments name.

    Raises:
        InputError: manifests that cannot be read, or (--strict) that the API would refuse.
        ApiError, NoAnswerError: no API server to ask.
    """
    if args.files:
        return offline(args.files, strict=args.strict)
    from netpol.ctl import api

    return api.cluster(api.source(args))


def namespace(args: argparse.Namespace) -> str:
    """The namespace of references that name none: -n, or the kubeconfig's context, or "default"."""
    if args.namespace or args.files:
        return args.namespace or "default"
    from netpol.ctl import kubeconfig

    return kubeconfig.default_namespace(args.kubeconfig, context=args.context)


def offline(paths: list[str], *, strict: bool = False) -> Cluster:
    """Load manifests and say on stderr what is to be said about them."""
    found, policies = _load(paths, strict=strict)
    return of_manifests(found, policies)


def offline_manifests(paths: list[str], *, strict: bool = False) -> Manifests:
    """The same for a command that asks nothing about policy."""
    return _load(paths, strict=strict)[0]


def _load(paths: list[str], *, strict: bool) -> tuple[Manifests, list[CompiledPolicy]]:
    from netpol.k8s.manifests import load

    found = load(paths)
    policies = compiled(found.policies.values())
    lines = [str(p) for p in found.problems]
    for policy in policies:
        origin = found.origins["NetworkPolicy", policy.key]
        lines += [
            f"{origin}: NetworkPolicy {policy.key}: {p.field}: {p.message}" for p in policy.problems
        ]
    for line in (*lines, *found.notices):
        remark(line)
    if found.skipped:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in sorted(found.skipped.items()))
        remark(f"skipped kinds: {kinds}")
    if strict and lines:
        raise InputError(
            f"--strict: {plural(len(lines), 'problem')} in the manifests", needed="none"
        )
    return found, policies


def of_manifests(found: Manifests, policies: Iterable[CompiledPolicy]) -> Cluster:
    """The cluster that manifests describe."""
    world = World.build(
        namespaces=found.namespaces.values(),
        pods=found.pods.values(),
        policies=policies,
        nodes=found.nodes.values(),
        services=found.services.values(),
        slices=found.slices.values(),
    )
    return Cluster(
        world=world,
        headless=frozenset(found.headless),
        external_ips=dict(found.external_ips),
        node_names=found.node_names,
        offline=True,
    )


def compiled(policies: Iterable[NetworkPolicy]) -> list[CompiledPolicy]:
    """Compile policies, in order of their names."""
    return [compile_policy(p) for p in sorted(policies, key=lambda p: p.key)]
