"""Server-side apply and the record of who manages which field.

Owns the merge of an applied configuration, the removal of what a manager applied before and no longer
does, and `metadata.managedFields` of applied configurations. Conflicts are not raised: the last applier
of a field owns it, as if every apply were forced. Other writers are recorded by name and time only.
"""

from typing import Any

from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.history import decode, encode

# Keys of the list-type=map lists of the served kinds, by the last names of the path.
_CONTAINERS = ("containers", "initContainers", "ephemeralContainers")
_LIST_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    **{("spec", name): ("name",) for name in (*_CONTAINERS, "volumes", "imagePullSecrets")},
    **{(name, "ports"): ("containerPort", "protocol") for name in _CONTAINERS},
    **{(name, "env"): ("name",) for name in _CONTAINERS},
    **{(name, "volumeMounts"): ("mountPath",) for name in _CONTAINERS},
    ("spec", "hostAliases"): ("ip",),
    ("spec", "topologySpreadConstraints"): ("topologyKey", "whenUnsatisfiable"),
    ("spec", "ports"): ("port", "protocol"),
    ("status", "conditions"): ("type",),
    ("status", "addresses"): ("type",),
    ("status", "podIPs"): ("ip",),
    ("metadata", "ownerReferences"): ("uid",),
}
_KEY_DEFAULTS = {"protocol": "TCP"}
_SETS = {("metadata", "finalizers"), ("spec", "podCIDRs")}
_UNOWNED = ("apiVersion", "kind")
_UNOWNED_META = ("name", "namespace", "managedFields", "resourceVersion", "uid")


def merge(live: Obj, applied: Obj, manager: str, subresource: str = "") -> Obj:
    """Return the live object with a configuration applied on it by a manager."""
    owned_now = owned_fields(applied)
    owned_before: Obj = {}
    others: list[Obj] = []
    for entry in live["metadata"].get("managedFields") or ():
        mine = entry.get("manager") == manager and entry.get("operation") == "Apply"
        if mine and (entry.get("subresource") or "") == subresource:
            owned_before = entry.get("fieldsV1") or {}
        elif entry.get("fieldsV1"):
            others.append(entry["fieldsV1"])
    result = _drop(live, owned_before, owned_now, others, ())
    configuration = {name: value for name, value in applied.items() if name not in _UNOWNED}
    merged: Obj = _merge(result, configuration, ())
    return merged


def owned_fields(applied: Obj) -> Obj:
    """Return the fieldsV1 set of an applied configuration."""
    body = {name: value for name, value in applied.items() if name not in _UNOWNED}
    meta = body.get("metadata") or {}
    body["metadata"] = {name: value for name, value in meta.items() if name not in _UNOWNED_META}
    if not body["metadata"]:
        del body["metadata"]
    return _fields(body, ())


def _fields(value: Obj, path: tuple[str, ...]) -> Obj:
    found: Obj = {}
    for name, item in value.items():
        here = (*path, name)
        keys = _LIST_KEYS.get(here[-2:])
        if isinstance(item, dict) and item and not _atomic(here):
            found[f"f:{name}"] = _fields(item, here)
        elif isinstance(item, list) and keys and all(isinstance(one, dict) for one in item):
            found[f"f:{name}"] = {
                _key_text(one, keys): {".": {}} | _fields(one, here) for one in item
            }
        elif isinstance(item, list) and here[-2:] in _SETS:
            found[f"f:{name}"] = {f"v:{encode(one).decode()}": {} for one in item}
        else:
            found[f"f:{name}"] = {}
    return found


def _atomic(path: tuple[str, ...]) -> bool:
    """Tell whether a map is owned as a whole: selectors are."""
    return path[-1] in ("podSelector", "selector", "nodeSelector")


def _key_text(item: Obj, keys: tuple[str, ...]) -> str:
    return "k:" + encode(_key(item, keys)).decode()


def _key(item: Obj, keys: tuple[str, ...]) -> Obj:
    return {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys}


def _merge(live: Any, applied: Any, path: tuple[str, ...]) -> Any:
    if isinstance(applied, dict) and isinstance(live, dict) and not (path and _atomic(path)):
        result = dict(live)
        for name, value in applied.items():
            result[name] = _merge(result.get(name), value, (*path, name))
        return result
    if isinstance(applied, list) and isinstance(live, list):
        if path[-2:] in _SETS:
            return live + [item for item in applied if item not in live]
        keys = _LIST_KEYS.get(path[-2:])
        if keys and all(isinstance(item, dict) for item in applied):
            merged = list(live)
            for item in applied:
                wanted = _key(item, keys)
                at = next((n for n, one in enumerate(merged) if _key(one, keys) == wanted), None)
                if at is None:
                    merged.append(item)
                else:
                    merged[at] = _merge(merged[at], item, path)
            return merged
    return applied


def _drop(live: Any, before: Obj, now: Obj, others: list[Obj], path: tuple[str, ...]) -> Any:
    """Return live without what was owned before, is not now, and nobody else owns."""
    if isinstance(live, dict):
        result = dict(live)
        for mark, below in before.items():
            name = mark[2:]
            if not mark.startswith("f:") or name not in result:
                continue
            rest = [other[mark] for other in others if mark in other]
            if mark not in now and not rest:
                if not below or isinstance(result[name], (str, int, float, bool)):
                    del result[name]
                    continue
                result[name] = _drop(result[name], below, {}, [], (*path, name))
                if not result[name]:
                    del result[name]
            elif below:
                result[name] = _drop(result[name], below, now.get(mark, {}), rest, (*path, name))
        return result
    if isinstance(live, list):
        keys = _LIST_KEYS.get(path[-2:])
        kept = []
        for item in live:
            by_key = keys if isinstance(item, dict) else None
            mark = _key_text(item, by_key) if by_key else f"v:{encode(item).decode()}"
            rest = [other[mark] for other in others if mark in other]
            if mark in before and mark not in now and not rest:
                continue
            below = before.get(mark)
            kept.append(_drop(item, below, now.get(mark, {}), rest, path) if below else item)
        return kept
    return live


def note_manager(
    obj: Obj,
    old: Obj | None,
    *,
    manager: str,
    applied: Obj | None,
    now: str,
    subresource: str,
) -> None:
    """Record in `obj` who wrote it; an update by nobody named is not recorded."""
    entries = list(((old or {}).get("metadata") or {}).get("managedFields") or ())
    obj["metadata"].pop("managedFields", None)
    if manager:
        operation = "Apply" if applied is not None else "Update"
        entry: Obj = {
            "manager": manager,
            "operation": operation,
            "apiVersion": obj["apiVersion"],
            "time": now,
            "fieldsType": "FieldsV1",
            "fieldsV1": owned_fields(applied) if applied is not None else {},
        }
        if subresource:
            entry["subresource"] = subresource
        same = [
            place
            for place, known in enumerate(entries)
            if known.get("manager") == manager
            and known.get("operation") == operation
            and (known.get("subresource") or "") == subresource
        ]
        if same:
            entries[same[0]] = entry
        else:
            entries.append(entry)
    if entries:
        obj["metadata"]["managedFields"] = entries


def equal_but_times(obj: Obj, old: Obj) -> bool:
    """Tell whether two versions of an object differ at most in when a manager wrote."""
    return bool(_timeless(obj) == _timeless(old))


def _timeless(obj: Obj) -> Any:
    meta = dict(obj["metadata"])
    meta["managedFields"] = [
        {name: value for name, value in entry.items() if name != "time"}
        for entry in meta.get("managedFields") or ()
    ]
    meta.pop("resourceVersion", None)
    return obj | {"metadata": meta}


def read(body: bytes) -> Any:
    """Return the configuration in an apply request's body, JSON or YAML.

    Raises:
        ValueError: It is neither.
    """
    try:
        return decode(body)
    except ValueError:
        import yaml

        try:
            return yaml.safe_load(body)
        except yaml.YAMLError as fault:
            raise ValueError(str(fault)) from None
