"""The patch styles: JSON patch (RFC 6902), JSON merge patch (RFC 7386) and strategic merge.

Owns how a patch body changes an object, and the merge keys of the kinds that are served. Server-side
apply stands in `apply.py`. Nothing here changes its arguments unless it says so.
"""

from typing import Any

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.errors import Cause, Obj
from netpol.lab.apiserver.history import decode, encode
from netpol.lab.apiserver.resources import Resource

JSON = "application/json-patch+json"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"
STYLES = {JSON: "json", MERGE: "merge", STRATEGIC: "strategic", APPLY: "apply"}

# Merge keys by the last names of the path (list indexes left out). A list that has none is replaced.
# From the patchMergeKey tags of the v1 API types.
_CONTAINERS = ("containers", "initContainers", "ephemeralContainers")
_MERGE_KEYS: dict[tuple[str, ...], str] = {
    **{("spec", name): "name" for name in (*_CONTAINERS, "volumes", "imagePullSecrets")},
    **{(name, "ports"): "containerPort" for name in _CONTAINERS},
    **{(name, "env"): "name" for name in _CONTAINERS},
    **{(name, "volumeMounts"): "mountPath" for name in _CONTAINERS},
    **{(name, "volumeDevices"): "devicePath" for name in _CONTAINERS},
    ("spec", "hostAliases"): "ip",
    ("spec", "topologySpreadConstraints"): "topologyKey",
    ("spec", "ports"): "port",
    ("status", "conditions"): "type",
    ("status", "addresses"): "type",
    ("status", "podIPs"): "ip",
    ("status", "hostIPs"): "ip",
    ("metadata", "ownerReferences"): "uid",
    ("secrets",): "name",
    ("imagePullSecrets",): "name",
}
# Lists of plain values that are merged as sets.
_MERGED_SETS = {("metadata", "finalizers"), ("spec", "podCIDRs"), ("spec", "finalizers")}


def copy(obj: Any) -> Any:
    """Return a deep copy of JSON data."""
    return decode(encode(obj))


def apply(resource: Resource, obj: Obj, body: Any, style: str) -> Obj:
    """Return the object as a patch of the named style leaves it; `obj` is consumed.

    Raises:
        ApiError: 400 or 422 when the patch cannot be applied, 415 for a style the kind has not.
    """
    changed: Any
    match style:
        case "json":
            changed = json_patch(obj, body)
        case "merge":
            changed = merge_patch(obj, body)
        case "strategic":
            if resource.custom:
                text = (
                    "the body of the request was in an unknown format - accepted media types "
                    f"include: {JSON}, {MERGE}, {APPLY}"
                )
                raise errors.unsupported_media_type(text)
            if not isinstance(body, dict):
                raise errors.bad_request("a strategic merge patch is a JSON object")
            changed = strategic_merge(obj, body)
        case _:
            raise errors.bad_request(f"unknown patch style {style!r}")
    if not isinstance(changed, dict) or not isinstance(changed.get("metadata"), dict):
        raise errors.bad_request("the patch leaves no object with metadata")
    result: Obj = changed
    return result


def merge_patch(target: Any, body: Any) -> Any:
    """Return the target as an RFC 7386 patch leaves it."""
    if not isinstance(body, dict):
        return body
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in body.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def merge_key(path: tuple[str, ...]) -> str | None:
    """Return the merge key of the list at a path without indexes."""
    return _MERGE_KEYS.get(path[-2:])


def strategic_merge(target: Obj, body: Obj, path: tuple[str, ...] = ()) -> Obj:
    """Return the target as a strategic merge patch leaves it, directives included."""
    directive = body.get("$patch")
    if directive == "delete":
        return {}
    if directive == "replace":
        return {
            name: _plain(value)
            for name, value in body.items()
            if not name.startswith("$") and value is not None
        }
    result = dict(target)
    retained = body.get("$retainKeys")
    if isinstance(retained, list):
        result = {name: value for name, value in result.items() if name in retained}
    for name, value in body.items():
        if name.startswith("$deleteFromPrimitiveList/"):
            field = name.partition("/")[2]
            result[field] = [item for item in result.get(field) or () if item not in value]
        elif name.startswith("$"):
            continue
        elif value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            old = result.get(name)
            merged = strategic_merge(old if isinstance(old, dict) else {}, value, (*path, name))
            if value.get("$patch") == "delete":
                result.pop(name, None)
            else:
                result[name] = merged
        elif isinstance(value, list):
            order = body.get(f"$setElementOrder/{name}")
            result[name] = _merge_list(result.get(name), value, (*path, name), order)
        else:
            result[name] = value
    for name, order in body.items():
        field = name.partition("/")[2]
        if name.startswith("$setElementOrder/") and field not in body and field in result:
            result[field] = _ordered(result[field], order, merge_key((*path, field)))
    return result


def _merge_list(old: Any, new: list[Any], path: tuple[str, ...], order: Any) -> list[Any]:
    if not isinstance(old, list):
        old = []
    if path[-2:] in _MERGED_SETS:
        return _ordered(old + [item for item in new if item not in old], order, None)
    key = merge_key(path)
    if key is None or not all(isinstance(item, dict) for item in new):
        return [_plain(item) for item in new]
    if any(item == {"$patch": "replace"} for item in new):
        return [_plain(item) for item in new if "$patch" not in item]
    result = list(old)
    for item in new:
        if item.get(key) is None:
            raise errors.bad_request(f"{'.'.join(path)}: a list element without its key {key!r}")
        places = [at for at, known in enumerate(result) if known.get(key) == item[key]]
        if item.get("$patch") == "delete":
            result = [known for known in result if known.get(key) != item[key]]
        elif places:
            result[places[0]] = strategic_merge(result[places[0]], item, path)
        else:
            result.append(strategic_merge({}, item, path))
    return _ordered(result, order, key)


def _ordered(items: list[Any], order: Any, key: str | None) -> list[Any]:
    if not isinstance(order, list):
        return items

    def rank(item: Any) -> int:
        probe = item.get(key) if key else item
        for place, wanted in enumerate(order):
            if (wanted.get(key) if key else wanted) == probe:
                return place
        return len(order)

    return sorted(items, key=rank)


def _plain(value: Any) -> Any:
    """Return the value without directives."""
    if isinstance(value, dict):
        return {
            name: _plain(item)
            for name, item in value.items()
            if not name.startswith("$") and item is not None
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def json_patch(target: Any, operations: Any) -> Any:
    """Return the target as an RFC 6902 patch leaves it.

    Raises:
        ApiError: 400 for a body that is no patch, 422 for one that does not fit the object.
    """
    if not isinstance(operations, list):
        raise errors.bad_request("a JSON patch is a list of operations")
    root = {"": copy(target)}  # one level above, so that the whole document is a member too
    for number, operation in enumerate(operations):
        try:
            _operate(root, operation)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as fault:
            text = f"the operation does not apply: {operation!r:.200}: {fault}"
            cause = Cause(f"[{number}]", "FieldValueInvalid", text)
            refusal = errors.ApiError(
                422,
                "Invalid",
                f"the server rejected our request due to an error in our request: {text}",
                details={"causes": [cause._asdict()]},
            )
            raise refusal from None
    return root[""]


def _operate(root: Obj, operation: Obj) -> None:
    op = operation["op"]
    holder, last = _resolve(root, operation["path"])
    match op:
        case "add":
            _add(holder, last, copy(operation["value"]))
        case "remove":
            _take(holder, last)
        case "replace":
            _take(holder, last)
            _add(holder, last, copy(operation["value"]))
        case "test":
            if _peek(holder, last) != operation["value"]:
                raise ValueError("test failed")
        case "copy":
            _add(holder, last, copy(_peek(*_resolve(root, operation["from"]))))
        case "move":
            value = _take(*_resolve(root, operation["from"]))
            holder, last = _resolve(root, operation["path"])
            _add(holder, last, value)
        case _:
            raise ValueError(f"unknown operation {op!r}")


def _resolve(root: Obj, pointer: str) -> tuple[Any, str]:
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")]
    if parts[0] != "":
        raise ValueError(f"not a JSON pointer: {pointer!r}")
    holder: Any = root
    for part in parts[:-1]:
        holder = _peek(holder, part)
    return holder, parts[-1]


def _peek(holder: Any, part: str) -> Any:
    return holder[_index(part)] if isinstance(holder, list) else holder[part]


def _take(holder: Any, part: str) -> Any:
    return holder.pop(_index(part)) if isinstance(holder, list) else holder.pop(part)


def _add(holder: Any, part: str, value: Any) -> None:
    if isinstance(holder, list):
        place = len(holder) if part == "-" else _index(part)
        if place > len(holder):
            raise IndexError(f"index {place} is behind the end of the list")
        holder.insert(place, value)
    else:
        holder[part] = value


def _index(part: str) -> int:
    if not part.isdecimal():
        raise ValueError(f"not an index: {part!r}")
    return int(part)
