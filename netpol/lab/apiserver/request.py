"""A request as the API understands it: verb, kind, name, namespace, subresource, options.

Owns the URL grammar and the reading of query parameters. Knows no objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.history import Key
from netpol.lab.apiserver.resources import Kinds, Resource

_READS = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Call:
    """One request on a kind; `namespace` is None for all of them and for cluster-scoped kinds."""

    resource: Resource
    namespace: str | None
    name: str
    subresource: str
    method: str
    query: Mapping[str, str]

    @property
    def key(self) -> Key:
        """Where the named object stands."""
        return Key(self.namespace or "", self.name)

    @property
    def watches(self) -> bool:
        """Whether it is a watch."""
        return not self.name and flag(self.query, "watch")

    @property
    def verb(self) -> str:
        """The verb that authorization asks about."""
        if self.method in _READS:
            if self.name:
                return "get"
            return "watch" if self.watches else "list"
        if self.method == "DELETE":
            return "delete" if self.name else "deletecollection"
        return {"POST": "create", "PUT": "update", "PATCH": "patch"}.get(self.method, "")

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be stored.

        Raises:
            ApiError: 400 for a value that the API does not know.
        """
        value = self.query.get("dryRun", "")
        if value not in ("", "All"):
            raise errors.bad_request(f"Invalid value: {value!r}: dryRun supports All only")
        return value == "All"


def parse_call(kinds: Kinds, method: str, path: str, query: Mapping[str, str]) -> Call:
    """Return the request that a path below /api or /apis makes.

    Raises:
        ApiError: 404 when nothing is served there, 405 when the kind has no such verb.
    """
    parts = path.strip("/").split("/")
    group, parts = ("", parts[1:]) if parts[0] == "api" else (parts[1], parts[2:])
    if len(parts) < 2:
        raise errors.no_such_path()
    version, rest = parts[0], parts[1:]
    namespace: str | None = None
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
        namespace, rest = rest[1], rest[2:]
    resource = kinds.at(group, version, rest[0])
    if resource is None or len(rest) > 3 or (namespace is not None and not resource.namespaced):
        raise errors.no_such_path()
    name = rest[1] if len(rest) > 1 else ""
    subresource = rest[2] if len(rest) > 2 else ""
    if resource.namespaced and name and namespace is None:
        raise errors.no_such_path()
    known = (*resource.subresources, *(("status",) if resource.has_status else ()))
    if subresource and subresource not in known:
        raise errors.no_such_path()
    call = Call(resource, namespace, name, subresource, method, query)
    if not call.verb or (not subresource and call.verb not in resource.verbs):
        raise errors.method_not_allowed()
    # A collection is posted to; an object is put and patched.
    misplaced = bool(name) if call.verb == "create" else not name
    if not subresource and misplaced and call.verb in ("create", "update", "patch"):
        raise errors.method_not_allowed()
    return call


def flag(query: Mapping[str, str], name: str) -> bool:
    """Return a boolean parameter; absent is false.

    Raises:
        ApiError: 400 for what is no boolean.
    """
    text = query.get(name, "")
    if text.lower() in ("1", "t", "true"):
        return True
    if text.lower() in ("", "0", "f", "false"):
        return False
    raise errors.bad_request(f"invalid value {text!r} of {name}: needed a boolean")


def number(query: Mapping[str, str], name: str) -> int | None:
    """Return a whole number parameter; absent is None.

    Raises:
        ApiError: 400 for what is no number.
    """
    text = query.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise errors.bad_request(f"invalid value {text!r} of {name}: needed a whole number")
    return int(text)
