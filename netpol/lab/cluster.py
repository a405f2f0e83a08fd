"""The objects that a lab starts with: its Nodes, the agents' account and rights, the user's manifests.

Owns their creation in the API server's store, and where `iptables` points when a variant was asked for.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from netpol.lab import objects, podstatus
from netpol.lab.apiserver import ApiError
from netpol.lab.objectstore import ObjectStore
from netpol.lab.plan import LabPlan
from netpol.lib.errors import InputError, KernelMissingError

Obj = dict[str, Any]

AGENT_ACCOUNT = ("kube-system", "netpol-agent")

#: The manifests beside the package: in a checkout, or installed with it.
_MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
_RBAC = "rbac.authorization.k8s.io"
_TOOLS = ("iptables", "iptables-save", "iptables-restore")


def create_objects(store: ObjectStore, plan: LabPlan, spec: Obj) -> int:
    """Create Nodes, rights and manifests; return the number of pods.

    Raises:
        InputError: The API server refuses a manifest; the message says which and why.
    """
    for node in plan.nodes:
        obj = podstatus.node_object(node, now=store.timestamp())
        obj["metadata"]["labels"] |= spec["node_labels"].get(node.name, {})
        store.create(obj, keep_status=True)
        store.create(podstatus.lease_object(node, now_micro=_now_micro()))
    _create_rights(store)
    pods = 0
    for entry in spec["manifests"]:
        _create(store, entry["source"], entry["obj"])
        pods += entry["obj"]["kind"] == "Pod"
    return pods


def _create(store: ObjectStore, source: str, obj: Obj) -> None:
    try:
        try:
            store.create(obj, manager="lab")
        except ApiError as error:
            if error.code != 409:
                raise
            # What every cluster has (a default Namespace, its ServiceAccount): laid over it.
            meta = obj["metadata"]
            plural = store.kinds.of(obj).qualified
            store.patch(plural, meta["name"], meta.get("namespace") or "", body=obj)
    except ApiError as error:
        raise InputError(source, got=f"refused by the API server: {error.message}") from error


def _create_rights(store: ObjectStore) -> None:
    """Create what manifests/rbac.yaml says, or let the agents do everything where there is none."""
    file = _MANIFESTS / "rbac.yaml"
    if file.exists():
        served = {(kind.api_version, kind.kind): kind.namespaced for kind in store.kinds}
        for manifest in objects.select(
            objects.read([str(file)]), nodes=(), served=served
        ).manifests:
            _create(store, manifest.source, manifest.obj)
        if _bound_account(store) is not None:
            return
    namespace, name = AGENT_ACCOUNT
    meta = {"name": name, "namespace": namespace}
    store.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
    store.create(
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "netpol-agent-lab"},
            "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        }
    )


def agent_account(store: ObjectStore) -> tuple[str, str]:
    """Return namespace and name of the agents' ServiceAccount."""
    return _bound_account(store) or AGENT_ACCOUNT


def _bound_account(store: ObjectStore) -> tuple[str, str] | None:
    """Return the ServiceAccount that a binding of ours names."""
    for binding in store.list(f"clusterrolebindings.{_RBAC}"):
        if "netpol" in binding["metadata"]["name"]:
            for subject in binding.get("subjects") or ():
                if subject.get("kind") == "ServiceAccount":
                    return subject["namespace"], subject["name"]
    return None


def renew_leases(store: ObjectStore, plan: LabPlan) -> None:
    """Renew the heartbeats of all nodes."""
    body = {"spec": {"renewTime": _now_micro()}}
    for node in plan.nodes:
        try:
            store.patch("leases.coordination.k8s.io", node.name, "kube-node-lease", body=body)
        except ApiError as error:
            if error.code != 404:
                raise
            store.create(podstatus.lease_object(node, now_micro=_now_micro()))


def _now_micro() -> str:
    return datetime.now(tz=UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def iptables_path(plan: LabPlan, path: str) -> str:
    """Return the PATH of plugins and agents: `iptables` is the variant that the lab was asked for.

    Raises:
        KernelMissingError: The machine does not have that variant's programs.
    """
    if not plan.iptables:
        return path
    folder = plan.state_dir / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for family in ("", "6"):
        for tool in _TOOLS:
            name = tool.replace("iptables", f"ip{family}tables", 1)
            variant = name.replace("tables", f"tables-{plan.iptables}", 1)
            target = shutil.which(variant, path=path)
            if target is None:
                raise KernelMissingError(
                    f"--iptables {plan.iptables}", needed=f"the program {variant}"
                )
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return f"{folder}:{path}"
