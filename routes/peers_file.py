"""The file that names routers which all nodes peer with, and the files that hold their passwords."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from netpol.lib.errors import InputError
from routes.annotations import peer_of, read_yaml
from routes.options import ExternalPeer


def read_text(path: Path) -> str:
    """A file of these, as text."""
    return path.read_text(encoding="utf-8")


def read_peers(
    path: str, *, flag: str, read: Callable[[Path], str] = read_text
) -> tuple[ExternalPeer, ...]:
    """Read the peers: a YAML list (docs/routes.md).

    Args:
        path: of the file; `passwordFile` in it is relative to its folder.
        flag: what named it, for messages.
        read: reads each file that is needed.

    Raises:
        InputError: with the item that is wrong, never with a password.
    """
    where = f"{flag} {path}"
    try:
        items = read_yaml(read(Path(path)))
    except OSError as e:
        raise InputError(where, got=e.strerror or str(e)) from e
    except ValueError as e:
        raise InputError(where, needed="YAML") from e
    if not isinstance(items, list):
        raise InputError(where, needed="a list of peers", got=type(items).__name__)
    out = []
    for number, item in enumerate(items):
        try:
            out.append(peer_of(_with_password(item, Path(path).parent, read), encoded=False))
        except ValueError as e:
            raise InputError(f"{where}: [{number}]: {e}") from e
    return tuple(out)


def _with_password(item: Any, folder: Path, read: Callable[[Path], str]) -> Any:
    """The item with the password that its file holds (a mounted Secret, for instance)."""
    if not isinstance(item, dict) or "passwordFile" not in item:
        return item
    rest = {k: v for k, v in item.items() if k != "passwordFile"}
    if "password" in rest:
        raise ValueError("needed password or passwordFile, got both")
    try:
        text = read(folder / str(item["passwordFile"]))
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"passwordFile: {getattr(e, 'strerror', None) or 'no text'}") from e
    return {**rest, "password": text.removesuffix("\n")}
