"""Rows for people: the Table form of lists and objects, with the columns that kubectl users know.

Owns columns and cells per kind. Everything but the age is a function of the object.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from netpol.lab.apiserver import cells
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.forms import metadata_only
from netpol.lab.apiserver.resources import Resource


class Column(NamedTuple):
    """One column; `wide` ones are shown by `-o wide` only."""

    name: str
    wide: bool = False
    type: str = "string"

    def definition(self) -> Obj:
        """Return the column as it stands in a Table."""
        return {
            "name": self.name,
            "type": self.type,
            "format": "name" if self.name == "Name" else "",
            "description": "",
            "priority": 1 if self.wide else 0,
        }


class Printer(NamedTuple):
    """The columns of a kind and the cells of one object."""

    columns: tuple[Column, ...]
    row: Callable[[Obj], list[Any]]


def table(
    resource: Resource,
    objects: list[Obj],
    *,
    columns: bool = True,
    metadata: Obj | None = None,
    include: str = "Metadata",
) -> Obj:
    """Return a Table of objects.

    Args:
        resource: The kind of the objects.
        objects: The objects, which are not changed.
        columns: Whether the definitions come with it; only the first Table of a watch has them.
        metadata: The ListMeta; that of the first object when it is not given.
        include: What each row carries: Metadata, Object or None.
    """
    printer = _printer(resource)
    rows = []
    for obj in objects:
        row: Obj = {"cells": printer.row(obj)}
        if include == "Object":
            row["object"] = obj
        elif include != "None":
            row["object"] = metadata_only(obj)
        rows.append(row)
    if metadata is None:
        version = objects[0]["metadata"].get("resourceVersion", "") if objects else ""
        metadata = {"resourceVersion": version}
    definitions = [column.definition() for column in printer.columns] if columns else None
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": definitions,
        "rows": rows,
    }


def _simple(*parts: Callable[[Obj], Any]) -> Callable[[Obj], list[Any]]:
    return lambda obj: [part(obj) for part in (cells.name, *parts)]


_NAME, _AGE = Column("Name"), Column("Age")
_CREATED_AT = Printer(
    (_NAME, Column("Created At", type="date")),
    _simple(lambda obj: obj["metadata"].get("creationTimestamp")),
)
_WORKLOAD_TAIL = (Column("Containers", True), Column("Images", True), Column("Selector", True))
_DEFAULT = Printer((_NAME, _AGE), _simple(cells.created))


def _columns(text: str) -> tuple[Column, ...]:
    """Return columns by name; those behind a bar are wide ones."""
    narrow, _, wide = text.partition("|")
    return tuple(
        Column(name.strip(), wide=is_wide)
        for part, is_wide in ((narrow, False), (wide, True))
        for name in part.split(",")
        if name.strip()
    )


_PRINTERS: dict[str, Printer] = {
    "pods": Printer(
        _columns("Name, Ready, Status, Restarts, Age | IP, Node, Nominated Node, Readiness Gates"),
        cells.pod,
    ),
    "services": Printer(
        _columns("Name, Type, Cluster-IP, External-IP, Port(s), Age | Selector"), cells.service
    ),
    "nodes": Printer(
        _columns(
            "Name, Status, Roles, Age, Version | Internal-IP, External-IP, OS-Image, "
            "Kernel-Version, Container-Runtime"
        ),
        cells.node,
    ),
    "namespaces": Printer(
        _columns("Name, Status, Age"),
        _simple(lambda obj: (obj.get("status") or {}).get("phase"), cells.created),
    ),
    "networkpolicies.networking.k8s.io": Printer(
        _columns("Name, Pod-Selector, Age"),
        _simple(
            lambda obj: cells.selector_text((obj.get("spec") or {}).get("podSelector")),
            cells.created,
        ),
    ),
    "endpointslices.discovery.k8s.io": Printer(
        _columns("Name, AddressType, Ports, Endpoints, Age"), cells.endpoint_slice
    ),
    "events": Printer(
        tuple(
            Column(name, wide=name in ("Subobject", "Source", "First Seen", "Count", "Name"))
            for name in (
                "Last Seen",
                "Type",
                "Reason",
                "Object",
                "Subobject",
                "Source",
                "Message",
                "First Seen",
                "Count",
                "Name",
            )
        ),
        cells.event,
    ),
    "configmaps": Printer(
        _columns("Name, Data, Age"),
        _simple(
            lambda obj: len(obj.get("data") or ()) + len(obj.get("binaryData") or ()), cells.created
        ),
    ),
    "secrets": Printer(
        _columns("Name, Type, Data, Age"),
        _simple(lambda obj: obj.get("type"), lambda obj: len(obj.get("data") or ()), cells.created),
    ),
    "leases.coordination.k8s.io": Printer(
        _columns("Name, Holder, Age"),
        _simple(lambda obj: (obj.get("spec") or {}).get("holderIdentity") or "", cells.created),
    ),
    "daemonsets.apps": Printer(
        _columns("Name, Desired, Current, Ready, Up-to-date, Available, Node Selector, Age")
        + _WORKLOAD_TAIL,
        cells.daemon_set,
    ),
    "deployments.apps": Printer(
        _columns("Name, Ready, Up-to-date, Available, Age") + _WORKLOAD_TAIL, cells.deployment
    ),
    "rolebindings.rbac.authorization.k8s.io": Printer(
        _columns("Name, Role, Age"), cells.role_binding
    ),
    "clusterrolebindings.rbac.authorization.k8s.io": Printer(
        _columns("Name, Role, Age"), cells.role_binding
    ),
    "roles.rbac.authorization.k8s.io": _CREATED_AT,
    "clusterroles.rbac.authorization.k8s.io": _CREATED_AT,
    "customresourcedefinitions.apiextensions.k8s.io": _CREATED_AT,
}


def _printer(resource: Resource) -> Printer:
    if resource.custom and resource.columns:
        return _custom_printer(resource.columns)
    return _PRINTERS.get(resource.key, _DEFAULT)


def _custom_printer(definitions: tuple[Obj, ...]) -> Printer:
    columns = [_NAME]
    columns += [
        Column(str(one.get("name")), wide=bool(one.get("priority")), type=str(one.get("type")))
        for one in definitions
    ]

    def row(obj: Obj) -> list[Any]:
        found: list[Any] = [cells.name(obj)]
        for one in definitions:
            value: Any = obj
            for part in str(one.get("jsonPath") or "").strip(".").split("."):
                value = value.get(part) if isinstance(value, dict) else None
            found.append(cells.age(value) if one.get("type") == "date" else value)
        return found

    if not any(one.get("jsonPath") == ".metadata.creationTimestamp" for one in definitions):
        columns.append(_AGE)
        return Printer(tuple(columns), lambda obj: [*row(obj), cells.created(obj)])
    return Printer(tuple(columns), row)
