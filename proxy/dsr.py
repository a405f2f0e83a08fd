"""Direct server return: which pods of this node must have which addresses of Services. Pure.

Packets of a row with `tunnel` keep the Service's address. A pod that takes them has that address itself, and
its answers go to the client without a way back through the node that the client reached. Whether a row has
tunnels is decided where it is planned (`proxy.plan`); this sums up what all of them need in this node's pods,
and which sources these pods' answers have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from netpol.model.ids import ObjectKey
from netpol.model.ruleset import AddressPort
from proxy.rows import ServicePlan, ServiceRow


class Ends:
    """What all Services need."""

    def __init__(self) -> None:
        self._rows: dict[ObjectKey, tuple[ServiceRow, ...]] = {}

    def change(self, plans: Mapping[ObjectKey, ServicePlan | None]) -> bool:
        """Some Services are planned otherwise; whether that changes anything here."""
        changed = False
        for key, plan in plans.items():
            rows = () if plan is None else tuple(r for r in plan.rows if r.tunnel and r.ends)
            before = self._rows.pop(key, ())
            if rows:
                self._rows[key] = rows
            changed |= _needs(rows) != _needs(before)
        return changed

    def wanted(self) -> dict[bytes, frozenset[bytes]]:
        """The addresses of Services that each pod must have, by the pod's own address."""
        out: dict[bytes, set[bytes]] = {}
        for row in self._all():
            for pod in row.ends:
                out.setdefault(pod, set()).add(row.address)
        return {pod: frozenset(vips) for pod, vips in out.items()}

    def sources(self) -> frozenset[AddressPort]:
        """What answers come from."""
        return frozenset(AddressPort(r.address, r.protocol, r.port) for r in self._all())

    def services(self, pod: bytes) -> list[ObjectKey]:
        """The Services that need an end in a pod."""
        return sorted(k for k, rows in self._rows.items() if any(pod in r.ends for r in rows))

    def _all(self) -> Iterable[ServiceRow]:
        return (row for rows in self._rows.values() for row in rows)


def _needs(rows: Iterable[ServiceRow]) -> set[tuple[AddressPort, bytes]]:
    return {(AddressPort(r.address, r.protocol, r.port), pod) for r in rows for pod in r.ends}
