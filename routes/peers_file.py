"""The file that names routers which all nodes peer with, and the files that hold their passwords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from netpol.lib.errors import InputError
from routes.annotations import peer_of, read_yaml
from routes.options import ExternalPeer


def read_peers(path: str, *, flag: str) -> tuple[ExternalPeer, ...]:
    """Read the peers: a YAML list (docs/routes.md).

    Args:
        path: of the file; `passwordFile` in it is relative to its folder.
        flag: what named it, for messages.

    Raises:
        InputError: with the item that is wrong, never with a password.
    """
    where = f"{flag} {path}"
    try:
        items = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(where, got=e.strerror or str(e)) from e
    except ValueError as e:
        raise InputError(where, needed="YAML") from e
    if not isinstance(items, list):
        raise InputError(where, needed="a list of peers", got=type(items).__name__)
    out = []
    for number, item in enumerate(items):
        try:
            out.append(peer_of(_with_password(item, Path(path).parent), encoded=False))
        except ValueError as e:
            raise InputError(f"{where}: [{number}]: {e}") from e
    return tuple(out)


def _with_password(item: Any, folder: Path) -> Any:
    """The item with the password that its file holds (a mounted Secret, for instance)."""
    if not isinstance(item, dict) or "passwordFile" not in item:
        return item
    rest = {k: v for k, v in item.items() if k != "passwordFile"}
    if "password" in rest:
        raise ValueError("needed password or passwordFile, got both")
    try:
        text = (folder / str(item["passwordFile"])).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"passwordFile: {getattr(e, 'strerror', None) or 'no text'}") from e
    return {**rest, "password": text.removesuffix("\n")}
