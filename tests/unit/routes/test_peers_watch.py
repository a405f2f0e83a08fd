"""Files of peers and passwords that are replaced while the agent runs."""

from __future__ import annotations

import os
from pathlib import Path

from routes.peers_watch import PeersFile

PEERS = "- {address: 192.0.2.1, asn: 65000, passwordFile: md5}\n"


def mount(folder: Path, generation: str, **files: str) -> None:
    """As a kubelet does: a new folder, then one swap of a link that all files lead through."""
    new = folder / f"..{generation}"
    new.mkdir()
    for name, text in files.items():
        (new / name).write_text(text)
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(f"..data/{name}")
    swap = folder / "..data_tmp"
    swap.symlink_to(new.name)
    swap.rename(folder / "..data")


def watched(folder: Path) -> PeersFile:
    return PeersFile(str(folder / "peers"), flag="--bgp-peers-file")


def test_a_swap_of_the_whole_folder_is_seen(tmp_path: Path) -> None:
    mount(tmp_path, "1", peers=PEERS, md5="first")
    file = watched(tmp_path)
    assert file.look()
    assert file.peers is not None
    assert [p.password for p in file.peers] == ["first"]
    assert not file.look()
    mount(tmp_path, "2", peers=PEERS, md5="second")
    assert file.look()
    assert [p.password for p in file.peers] == ["second"]
    mount(tmp_path, "3", peers=PEERS + "- {address: 192.0.2.2, asn: 1}\n", md5="second")
    assert file.look()
    assert len(file.peers) == 2


def test_a_password_of_the_same_length_in_the_same_moment_is_seen(tmp_path: Path) -> None:
    mount(tmp_path, "1", peers=PEERS, md5="aaaa")
    file = watched(tmp_path)
    file.look()
    path = (tmp_path / "md5").resolve()
    times = path.stat()
    path.write_text("bbbb")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.look()
    assert file.peers is not None
    assert [p.password for p in file.peers] == ["bbbb"]


def test_a_broken_file_keeps_the_last_good_peers_and_names_no_password(tmp_path: Path) -> None:
    mount(tmp_path, "1", peers=PEERS, md5="hunter2")
    file = watched(tmp_path)
    file.look()
    good = file.peers
    for number, text in enumerate(
        (
            "- {address: 192.0.2.1, asn: none, password: hunter2}\n",
            '- {address: 192.0.2.1, asn: 1, password: "hunter2\\thunter2"}\n',
            "hunter2: [",
            "- {address: 192.0.2.1, asn: 1, passwordFile: gone}\n",
            "- {address: 192.0.2.1, asn: 1, hunter: hunter2}\n",
        )
    ):
        mount(tmp_path, f"bad{number}", peers=text)
        assert file.look(), text
        assert file.peers is good
        assert file.fault
        assert "hunter2" not in file.fault, text
        assert not file.look()
    mount(tmp_path, "2", peers=PEERS, md5="hunter3")
    assert file.look()
    assert not file.fault
    assert file.peers != good


def test_a_file_that_is_not_there_yet_is_read_when_it_comes(tmp_path: Path) -> None:
    file = watched(tmp_path)
    assert file.look()
    assert "No such file" in file.fault
    assert file.peers is None
    mount(tmp_path, "1", peers=PEERS)
    assert file.look()  # another fault: its password is missing
    assert "passwordFile" in file.fault
    mount(tmp_path, "2", peers=PEERS, md5="x")
    assert file.look()
    assert not file.fault
