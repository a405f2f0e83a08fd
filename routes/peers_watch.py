"""Follows the file of peers and the files with their passwords, which are replaced while the agent runs.

A mounted ConfigMap or Secret changes by one swap of a link for the whole folder. What is compared is what the
files say, so that neither that nor a coarse clock hides a change. Files that cannot be used leave the last
good peers as they were; what is wrong is told without a word of what stands in them.
"""

from __future__ import annotations

from pathlib import Path

from netpol.lib.errors import InputError
from routes.options import ExternalPeer
from routes.peers_file import read_peers, read_text

#: Files are replaced one after the other where they come from two volumes: then they are read again.
_TRIES = 3


class PeersFile:
    """The peers that a file names now.

    Attributes:
        peers: the last good ones; None as long as there were none.
        fault: what is wrong with the files, "" for nothing.
    """

    def __init__(self, path: str, *, flag: str) -> None:
        self._path, self._flag = path, flag
        self._seen: dict[Path, str | None] = {}
        self.peers: tuple[ExternalPeer, ...] | None = None
        self.fault = ""

    def look(self) -> bool:
        """Read what has changed; whether peers or the fault are others now."""
        before = self.peers, self.fault
        for _ in range(_TRIES):
            if self._seen and all(_text_of(p) == text for p, text in self._seen.items()):
                break
            self._read()
        return (self.peers, self.fault) != before

    def _read(self) -> None:
        seen: dict[Path, str | None] = {Path(self._path): None}
        self._seen = seen

        def read(path: Path) -> str:
            seen[path] = None
            seen[path] = text = read_text(path)
            return text

        try:
            self.peers, self.fault = read_peers(self._path, flag=self._flag, read=read), ""
        except InputError as e:
            self.fault = str(e)


def _text_of(path: Path) -> str | None:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError):
        return None
