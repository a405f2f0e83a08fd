"""Settings that are kept, and put back as they were, on files that stand for /proc/sys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netpol.kernel.kept_sysctls import KeptSysctls, restore_sysctls, service_sysctls
from netpol.lib.errors import KernelError

FORWARD, IGNORE = "net/ipv4/ip_forward", "net/ipv4/conf/all/arp_ignore"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key, value in ((FORWARD, "0"), (IGNORE, "1")):
        path = tmp_path / "sys" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return tmp_path / "sys"


def values(root: Path) -> list[str]:
    return [(root / key).read_text().strip() for key in (FORWARD, IGNORE)]


def test_what_differs_is_set_and_put_back_as_it_was_first(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "run" / "sysctls.json"
    kept = KeptSysctls({FORWARD: "1", IGNORE: "1", "net/none": "1"}, file, root=root)
    assert kept.keep() == []
    assert values(root) == ["1", "1"]
    assert json.loads(file.read_text()) == {FORWARD: "0"}

    # A new agent, another value by somebody else: the first one is what counts.
    (root / FORWARD).write_text("7")
    assert KeptSysctls({FORWARD: "1"}, file, root=root).keep() == []
    assert values(root) == ["1", "1"]

    assert restore_sysctls(file, root=root) == 1
    assert values(root) == ["0", "1"]
    assert not file.exists()
    assert restore_sysctls(file, root=root) == 0


def test_what_others_set_too_is_remembered_before_they_do(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    kept = KeptSysctls({FORWARD: "1"}, file, root=root)
    assert kept.remember() == []
    assert values(root) == ["0", "1"]
    (root / FORWARD).write_text("1")  # another room wants it as well
    assert kept.keep() == []
    assert restore_sysctls(file, root=root) == 1
    assert values(root) == ["0", "1"]


def test_what_cannot_be_remembered_is_set_and_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a folder")
    faults = KeptSysctls({FORWARD: "1"}, tmp_path / "run" / "x.json", root=root).keep()
    assert len(faults) == 1
    assert values(root) == ["1", "1"]


def test_a_file_that_was_tampered_with_names_no_other_paths(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    (root / "kernel").mkdir()
    (root / "kernel/x").write_text("1")
    file.write_text(json.dumps({"net/../kernel/x": "2", "kernel/x": "2", FORWARD: "5"}))
    assert restore_sysctls(file, root=root) == 1
    assert (root / "kernel/x").read_text() == "1"
    for junk in ("", "[]", "{"):
        file.write_text(junk)
        assert restore_sysctls(file, root=root) == 0


def test_what_cannot_be_put_back_stays_remembered(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    (root / "net/ipv4/fixed").symlink_to("/proc/version")  # nobody can write it
    file.write_text(json.dumps({"net/ipv4/fixed": "2", FORWARD: "5"}))
    with pytest.raises(KernelError, match=r"net\.ipv4\.fixed"):
        restore_sysctls(file, root=root)
    assert values(root)[0] == "5"
    assert file.exists()


@pytest.mark.parametrize(("release", "mode"), [("5.4.0-1", "0"), ("5.9.0", "1"), ("6.1.0-18", "1")])
def test_reused_ports_are_new_connections_where_that_costs_nothing(release: str, mode: str) -> None:
    assert service_sysctls(release)["net/ipv4/vs/conn_reuse_mode"] == mode
