"""What names resolve to inside pods: a hosts file for each pod that somebody runs a command in.

Owns the text of hosts and resolv.conf, and the files that `podexec` binds over /etc inside the command's
own mount namespace; the machine's /etc is never touched. There is no DNS server in the lab: names of pods,
headless Services (to their ready endpoints) and Services (to their cluster IPs) are lines of the file,
which is rewritten in place, so that a shell that is already open sees new pods too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Obj = dict[str, Any]

_CLUSTER_DOMAIN = "cluster.local"
_SERVICE_LABEL = "kubernetes.io/service-name"


class Named(NamedTuple):
    """A pod or Service and what it resolves to."""

    namespace: str
    name: str
    addresses: tuple[str, ...]
    service: bool


def named_services(services: Iterable[Obj], slices: Iterable[Obj]) -> list[Named]:
    """Return what Services resolve to, and the hostnames of endpoints of headless ones."""
    endpoints: dict[tuple[str, str], list[Obj]] = {}
    for entry in slices:
        meta = entry["metadata"]
        service = (meta.get("labels") or {}).get(_SERVICE_LABEL, "")
        endpoints.setdefault((meta["namespace"], service), []).extend(entry.get("endpoints") or ())
    found = []
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        ips = tuple(ip for ip in spec.get("clusterIPs") or () if ip != "None")
        if ips:
            found.append(Named(meta["namespace"], meta["name"], ips, service=True))
            continue
        ready = [
            endpoint
            for endpoint in endpoints.get((meta["namespace"], meta["name"]), ())
            if (endpoint.get("conditions") or {}).get("ready") is not False
        ]
        addresses = tuple(address for endpoint in ready for address in endpoint["addresses"])
        found.append(Named(meta["namespace"], meta["name"], addresses, service=True))
        for endpoint in ready:
            if endpoint.get("hostname"):
                name = f"{endpoint['hostname']}.{meta['name']}"
                own = tuple(endpoint["addresses"])
                found.append(Named(meta["namespace"], name, own, service=True))
    return found


def hosts_text(*, namespace: str, own: Named, entries: Sequence[Named]) -> str:
    """Return the hosts file of a pod; names of its own namespace need no suffix.

    A Service hides a pod of the same name.
    """
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    lines += [f"{address} {own.name}" for address in own.addresses]
    taken = {own.name} if own.addresses else set()
    for entry in sorted(entries, key=lambda e: (not e.service, e.namespace, e.name)):
        long = f"{entry.name}.{entry.namespace}"
        names = [entry.name] if entry.namespace == namespace else []
        names.append(long)
        if entry.service:
            names += [f"{long}.svc", f"{long}.svc.{_CLUSTER_DOMAIN}"]
        free = [name for name in names if name not in taken]
        taken.update(free)
        if free:
            lines += [f"{address} {' '.join(free)}" for address in entry.addresses]
    return "\n".join(lines) + "\n"


def resolv_text(namespace: str) -> str:
    """Return a resolv.conf that asks nobody: what the hosts file does not know fails at once."""
    search = f"{namespace}.svc.{_CLUSTER_DOMAIN} svc.{_CLUSTER_DOMAIN} {_CLUSTER_DOMAIN}"
    return f"search {search}\nnameserver 127.0.0.1\noptions timeout:1 attempts:1\n"


def write_in_place(file: Path, text: str) -> None:
    """Change a file that may be bound somewhere: its inode must stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        with file.open("w") as stream:
            stream.write(text)
