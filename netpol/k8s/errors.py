"""What can go wrong with the Kubernetes API: an answer that refuses, and an object that does not decode."""

from __future__ import annotations

from netpol.lib import errors as base
from netpol.model.ids import ObjectKey


class ApiError(base.ApiError):
    """The API server refused a request or could not be reached.

    Attributes:
        status: the HTTP status (or Status.code of a watch's ERROR event); 0 when there was no answer.
        reason: the machine-readable reason of the Status object ("Expired", "Forbidden", ...), or "".
        retry_after_s: what the server asked for (429, 503), or None.
    """

    def __init__(
        self,
        what: str,
        *,
        status: int = 0,
        reason: str = "",
        message: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s
        head = f"HTTP {status}" if status else ""
        got = ": ".join(p for p in (" ".join(q for q in (head, reason) if q), message) if p)
        super().__init__(what, got=got)

    @property
    def expired(self) -> bool:
        """Whether the resourceVersion (or continue token) is too old to go on from: list again."""
        return self.status == 410 or self.reason in ("Expired", "Gone")

    @property
    def refused(self) -> bool:
        """Whether credentials or permissions are at fault (401, 403)."""
        return self.status in (401, 403)


class DecodeError(base.InputError):
    """An object that does not have the structure of its kind.

    Attributes:
        kind: the kind it was read as.
        key: its key as far as it could be read; the name may be "".
        path: the field, from the object's root ("spec.ports[0].port"); "" for the whole.
    """

    def __init__(
        self, *, kind: str, key: ObjectKey, path: str, needed: str = "", got: str = ""
    ) -> None:
        self.kind, self.key, self.path = kind, key, path
        name = f" {key}" if key.name else ""
        super().__init__(
            f"{kind}{name}: {path or 'the object'} cannot be read", needed=needed, got=got
        )
