"""`netpol-ctl cleanup` of the proxy: opens nothing on its way; killed anywhere, the next one finishes it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from netpol.ctl.cleanup_proxy import Kernel, clean_services
from netpol.kernel import kept_sysctls
from netpol.kernel.kept_sysctls import KeptSysctls, restore_sysctls
from netpol.model.ids import Protocol
from netpol.model.ipvs import VirtualServer
from netpol.model.net import FAMILIES, parse_address
from netpol.model.ruleset import AddressPort
from proxy import names
from proxy.rows import Kind
from tests.proxynode import FakeNode, KilledError, backends, fake_node, id_of, plan, row, run

VIP, LOCAL, POD, NODE = "10.96.0.1", "192.0.2.1", "10.0.1.1", "172.18.0.2"
FOREIGN = id_of("172.18.0.2", 3306)


def furnish(node: FakeNode) -> None:
    """A node on which an agent served a VIP, a NodePort and clients by mark, beside somebody else."""
    node.ipvs.put(VirtualServer(FOREIGN), {})
    rows = (
        row("web", VIP, 80, POD),
        row("web", NODE, 30080, POD, kind=Kind.NODE_PORT),
        row("local", LOCAL, 80, local_client_backends=backends(POD), kind=Kind.EXTERNAL_IP),
    )
    asyncio.run(run(node.room(), plan(*rows)))
    node.close()
    assert len(node.ipvs.state) == 5


def the_nodes_own_ports_are_shut(node: FakeNode) -> None:
    """What is dialled at an address on the link meets a server, or is refused."""
    for vip in node.vips.state or ():
        for member in node.sets.state[names.PORT[FAMILIES[0]].name].members:
            assert isinstance(member, AddressPort)
            if member.address == vip:
                assert id_of(vip_text(vip), member.port, Protocol.TCP) in node.ipvs.state


def vip_text(packed: bytes) -> str:
    return {parse_address(t): t for t in (VIP, LOCAL)}[packed]


def clean(node: FakeNode) -> dict[str, int]:
    left: list[str] = []
    done = clean_services(Kernel(node.vips, node.ipvs, node.sets), node.path, left)
    assert left == []
    return done


def test_all_of_ours_goes_and_nothing_else() -> None:
    with fake_node() as node:
        furnish(node)
        node.fuse.watch = lambda: the_nodes_own_ports_are_shut(node)
        assert clean(node) == {"servers": 4, "links": 1}
        assert set(node.ipvs.state) == {FOREIGN}
        assert node.vips.state is None
        assert not node.path.exists()
        assert clean(node) == {"servers": 0, "links": 0}


@pytest.mark.parametrize("deeds", range(10))
def test_killed_before_any_deed_it_is_finished_by_the_next(deeds: int) -> None:
    with fake_node() as node:
        furnish(node)
        node.fuse.watch = lambda: the_nodes_own_ports_are_shut(node)
        node.fuse.at = node.fuse.burnt + deeds
        try:
            clean(node)
        except KilledError:
            assert node.path.exists()  # or the next one could not tell whose NodePorts are
        else:
            assert deeds > 6
        node.fuse.at = None
        clean(node)
        assert set(node.ipvs.state) == {FOREIGN}
        assert node.vips.state is None
        assert not node.path.exists()


def test_without_its_ledger_what_is_on_the_link_goes_and_the_rest_is_told() -> None:
    with fake_node() as node:
        furnish(node)
        node.path.write_text("nonsense\n")
        left: list[str] = []
        done = clean_services(Kernel(node.vips, node.ipvs, node.sets), node.path, left)
        assert done == {"servers": 2, "links": 1}
        assert "only servers on our own link were removed; NodePorts" in left[0]
        assert {FOREIGN, id_of(NODE, 30080)} < set(node.ipvs.state)
        assert node.path.exists()


# -- kernel settings ----------------------------------------------------------------------------


class Disk:
    """Writes of settings and of the file that remembers them, the last of which may not come to its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.root, self.file = folder / "sys", folder / "run/sysctls.json"
        self.before = {"net/a": "0", "net/b": "5", "net/c": "1"}
        self.wanted = {"net/a": "1", "net/b": "2", "net/c": "1"}
        (self.root / "net").mkdir(parents=True)
        for key, value in self.before.items():
            (self.root / key).write_text(value)
        self.left = 1 << 30
        real_write, real_replace, real_unlink = Path.write_text, Path.replace, Path.unlink

        def write(path: Path, text: str, **more: str) -> int:
            if self.left <= 0:
                real_write(path, "" if path.is_relative_to(folder / "run") else path.read_text())
            self._deed()
            return real_write(path, text, **more)

        def replace(path: Path, target: Path) -> Path:
            self._deed()
            return real_replace(path, target)

        def unlink(path: Path, **more: bool) -> None:
            self._deed()
            real_unlink(path, **more)

        for name, deed in (("write_text", write), ("replace", replace), ("unlink", unlink)):
            monkeypatch.setattr(kept_sysctls.Path, name, deed)

    def _deed(self) -> None:
        if self.left <= 0:
            raise KilledError
        self.left -= 1

    @property
    def values(self) -> dict[str, str]:
        return {key: (self.root / key).read_text() for key in self.before}

    def keep(self) -> list[str]:
        return KeptSysctls(self.wanted, self.file, root=self.root).keep()


@pytest.mark.parametrize("in_keep", range(5))
@pytest.mark.parametrize("in_restore", range(4))
def test_settings_come_back_whatever_was_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_keep: int, in_restore: int
) -> None:
    disk = Disk(monkeypatch, tmp_path)
    disk.left = in_keep
    try:
        disk.keep()
    except KilledError:
        changed = {k for k, v in disk.values.items() if v != disk.before[k]}
        assert changed <= (json.loads(disk.file.read_text()) if disk.file.exists() else {}).keys()
        disk.left = 1 << 30
        assert disk.keep() == []
    assert disk.values == disk.wanted
    disk.left = in_restore
    try:
        restore_sysctls(disk.file, root=disk.root)
    except KilledError:
        disk.left = 1 << 30
        restore_sysctls(disk.file, root=disk.root)
    assert disk.values == disk.before
    assert not disk.file.exists()
