"""The file of routers that all nodes peer with."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol.lib.errors import InputError
from routes.peers_file import read_peers


def test_passwords_stand_in_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    path = tmp_path / "peers.yaml"
    path.write_text(
        "- {address: 192.0.2.1, asn: 65000, passwordFile: secret}\n- {address: 192.0.2.2, asn: 65001}\n"
    )
    first, second = read_peers(str(path), flag="--peers")
    assert (first.password, second.password) == ("hunter2", "")
    assert "hunter2" not in repr(first)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "needed YAML"),
        ("a: b", "needed a list of peers; got dict"),
        ("[{address: 192.0.2.1}]", r"\[0\]: needed asn"),
        ("[{address: x, asn: 1}]", r"\[0\]: address: needed an IP address"),
        ("[{address: 192.0.2.1, asn: 1, passwordFile: nope}]", "passwordFile: No such file"),
        ("[{address: 192.0.2.1, asn: 1, passwordFile: a, password: b}]", "got both"),
        ("[1]", r"\[0\]: needed a mapping"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "peers.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_peers(str(path), flag="--peers")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--peers .*No such file"):
        read_peers(str(tmp_path / "none"), flag="--peers")
