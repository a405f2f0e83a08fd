"""Refusals of the API server, each of which renders as one Kubernetes `Status` object.

Owns the codes, reasons and message shapes that clients decide on. Knows nothing of HTTP or storage.
"""

from typing import Any, NamedTuple

Obj = dict[str, Any]


class Cause(NamedTuple):
    """One faulty field: the reason is machine readable, the message is for people."""

    field: str
    reason: str
    message: str


class ApiError(Exception):
    """A request that is answered with a Status of kind Failure.

    Args:
        code: HTTP status code.
        reason: Machine readable reason, as clients compare it.
        message: One line for people.
        details: The `details` object of the Status.
        metadata: The list metadata of the Status; only an expired continue token has one.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Obj | None = None,
        metadata: Obj | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.metadata = metadata or {}

    def status(self) -> Obj:
        """Return the Status object that goes over the wire."""
        body: Obj = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
        }
        if self.details is not None:
            body["details"] = self.details
        body["code"] = self.code
        return body


def _details(group: str, plural: str, name: str) -> Obj:
    details: Obj = {}
    if name:
        details["name"] = name
    if group:
        details["group"] = group
    details["kind"] = plural
    return details


def _qualified(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def not_found(group: str, plural: str, name: str) -> ApiError:
    """Say that no such object is stored."""
    text = f'{_qualified(group, plural)} "{name}" not found'
    return ApiError(404, "NotFound", text, details=_details(group, plural, name))


def no_such_path() -> ApiError:
    """Say that the URL names no resource that is served."""
    return ApiError(404, "NotFound", "the server could not find the requested resource", details={})


def already_exists(group: str, plural: str, name: str) -> ApiError:
    """Say that an object of that name is stored already."""
    text = f'{_qualified(group, plural)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", text, details=_details(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str = "") -> ApiError:
    """Say that the stored object is not the one the caller has seen."""
    why = why or "the object has been modified; please apply your changes to the latest version"
    text = f'Operation cannot be fulfilled on {_qualified(group, plural)} "{name}": {why}'
    return ApiError(409, "Conflict", text, details=_details(group, plural, name))


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> ApiError:
    """Say which fields of an object are at fault."""
    lines = [f"{cause.field}: {cause.message}" for cause in causes]
    text = lines[0] if len(lines) == 1 else f"[{', '.join(lines)}]"
    details = _details(group, kind, name)
    details["causes"] = [
        {"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes
    ]
    return ApiError(
        422,
        "Invalid",
        f'{_qualified(group, kind)} "{name}" is invalid: {text}',
        details=details,
    )


def forbidden(group: str, plural: str, name: str, why: str) -> ApiError:
    """Say that the caller, or the state of the cluster, does not allow the request."""
    subject = _qualified(group, plural) + (f' "{name}"' if name else "")
    return ApiError(
        403,
        "Forbidden",
        f"{subject} is forbidden: {why}",
        details=_details(group, plural, name),
    )


def bad_request(message: str) -> ApiError:
    """Say that the request cannot be read."""
    return ApiError(400, "BadRequest", message)


def unauthorized() -> ApiError:
    """Say that the credentials are unknown."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def method_not_allowed() -> ApiError:
    """Say that the resource has no such verb."""
    text = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", text, details={})


def not_acceptable(accepted: str) -> ApiError:
    """Say that none of the media types the caller reads is written here."""
    text = f"only the following media types are accepted: {accepted}"
    return ApiError(406, "NotAcceptable", text)


def unsupported_media_type(message: str) -> ApiError:
    """Say that the body's media type is not read here."""
    return ApiError(415, "UnsupportedMediaType", message)


def expired(message: str, *, continue_token: str = "") -> ApiError:
    """Say that the wanted resourceVersion is no longer held."""
    metadata = {"continue": continue_token} if continue_token else None
    return ApiError(410, "Expired", message, metadata=metadata)


def too_large_resource_version(wanted: int, current: int) -> ApiError:
    """Say that the wanted resourceVersion has not happened yet."""
    text = f"Too large resource version: {wanted}, current: {current}"
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return ApiError(504, "Timeout", text, details={"causes": [cause], "retryAfterSeconds": 1})


def internal(message: str) -> ApiError:
    """Say that the server itself failed."""
    return ApiError(500, "InternalError", message)
