"""podCIDRs in a CNI configuration: what is ours comes and goes, what is others' stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netpol.lib.errors import InputError, KernelError
from netpol.model.net import Prefix, parse_prefix
from routes import conflist
from routes.cni import beaten, keep_conflist
from routes.conflist import NOTE, fresh, inject, parse


def cidrs(*texts: str) -> tuple[Prefix, ...]:
    return tuple(parse_prefix(t) for t in texts)


def ranges(data: dict[str, Any]) -> list[list[dict[str, Any]]]:
    out: list[list[dict[str, Any]]] = data["plugins"][0]["ipam"]["ranges"]
    return out


BOTH = cidrs("10.1.1.0/24", "fd01:0:0:1::/64")


def test_a_node_without_a_file_gets_a_whole_one() -> None:
    made = inject(None, BOTH, mtu=1450)
    assert [p["type"] for p in made["plugins"]] == ["bridge", "portmap"]
    assert ranges(made) == [[{"subnet": "10.1.1.0/24"}], [{"subnet": "fd01:0:0:1::/64"}]]
    assert made["plugins"][0]["mtu"] == 1450
    assert made["plugins"][0]["bridge"] == "kube-bridge"


def test_a_second_run_changes_nothing() -> None:
    once = inject(None, BOTH, mtu=1450)
    assert inject(once, BOTH, mtu=1450) == once


def test_old_ranges_go_when_the_podcidrs_change() -> None:
    once = inject(None, BOTH, mtu=1450)
    assert ranges(inject(once, cidrs("10.9.1.0/24"), mtu=1450)) == [[{"subnet": "10.9.1.0/24"}]]


def test_a_second_podcidr_of_a_family_is_a_range_of_its_own() -> None:
    made = inject(None, cidrs("10.1.1.0/24", "10.2.1.0/24"), mtu=1500)
    assert ranges(made) == [[{"subnet": "10.1.1.0/24"}], [{"subnet": "10.2.1.0/24"}]]


def test_what_others_wrote_stays() -> None:
    theirs = {
        "cniVersion": "1.0.0",
        "name": "mynet",
        "disableCheck": True,
        "strange": {"key": [1, 2]},
        "plugins": [
            {
                "type": "bridge",
                "bridge": "br9",
                "vlan": 7,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/var/x",
                    "routes": [{"dst": "192.0.2.0/24"}],
                    "ranges": [
                        [{"subnet": "172.16.0.0/24", "rangeStart": "172.16.0.9"}],
                        [{"subnet": "10.1.1.0/24", "gateway": "10.1.1.254"}],
                        [{"subnet": "10.8.8.0/24"}],
                    ],
                },
            },
            {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}},
            {"type": "unknown-plugin", "x": None},
        ],
    }
    before = json.dumps(theirs)
    made = inject(theirs, BOTH, mtu=1450)
    assert json.dumps(theirs) == before
    assert ranges(made) == [
        [{"subnet": "172.16.0.0/24", "rangeStart": "172.16.0.9"}],
        [{"subnet": "10.1.1.0/24", "gateway": "10.1.1.254"}],
        [{"subnet": "fd01:0:0:1::/64"}],
    ]
    assert made["plugins"][0]["ipam"]["dataDir"] == "/var/x"
    assert made["plugins"][0]["ipam"]["routes"] == [{"dst": "192.0.2.0/24"}]
    assert made["plugins"][0]["vlan"] == 7
    assert made["plugins"][1:] == theirs["plugins"][1:]  # type: ignore[index]
    assert made["strange"] == {"key": [1, 2]}
    assert made["disableCheck"] is True


def test_a_pool_that_somebody_adds_later_stays() -> None:
    made = inject(None, BOTH, mtu=1450)
    ranges(made).append([{"subnet": "172.16.0.0/24"}])
    again = inject(made, BOTH, mtu=1450)
    assert [{"subnet": "172.16.0.0/24"}] in ranges(again)
    moved = inject(again, cidrs("10.9.9.0/24"), mtu=1450)
    assert ranges(moved) == [[{"subnet": "172.16.0.0/24"}], [{"subnet": "10.9.9.0/24"}]]


@pytest.mark.parametrize(
    ("single", "want"),
    [
        ({"subnet": "10.1.1.0/24"}, [[{"subnet": "10.1.1.0/24"}], [{"subnet": "fd01:0:0:1::/64"}]]),
        ({"subnet": "10.7.7.0/24"}, [[{"subnet": "10.1.1.0/24"}], [{"subnet": "fd01:0:0:1::/64"}]]),
        (
            {"subnet": "10.7.7.0/24", "gateway": "10.7.7.9"},
            [
                [{"subnet": "10.7.7.0/24", "gateway": "10.7.7.9"}],
                [{"subnet": "10.1.1.0/24"}],
                [{"subnet": "fd01:0:0:1::/64"}],
            ],
        ),
    ],
)
def test_the_older_form_with_one_subnet(single: dict[str, str], want: list[Any]) -> None:
    have = fresh()
    have["plugins"][0]["ipam"] |= single
    made = inject(have, BOTH, mtu=1450)
    assert ranges(made) == want
    assert "subnet" not in made["plugins"][0]["ipam"]


@pytest.mark.parametrize("ipam", [{"type": "dhcp"}, {"type": "static", "addresses": []}, None])
def test_addresses_from_elsewhere_are_left_alone(ipam: dict[str, Any] | None) -> None:
    have = fresh()
    have["plugins"][0]["ipam"] = ipam
    made = inject(have, BOTH, mtu=1400)
    assert made["plugins"][0]["ipam"] == ipam
    assert made["plugins"][0]["mtu"] == 1400


@pytest.mark.parametrize(("theirs", "want"), [(1400, 1400), (9000, 1450), (0, 1450), ("x", 1450)])
def test_a_smaller_mtu_that_somebody_set_stays(theirs: object, want: int) -> None:
    have = fresh()
    have["plugins"][0]["mtu"] = theirs
    assert inject(have, BOTH, mtu=1450)["plugins"][0]["mtu"] == want


def test_our_own_mtu_follows_the_overlay() -> None:
    once = inject(None, BOTH, mtu=1450)
    assert inject(once, BOTH, mtu=1500)["plugins"][0]["mtu"] == 1500


def test_a_plugin_without_an_mtu_gets_none() -> None:
    have = fresh()
    have["plugins"][0] = {"type": "sriov", "ipam": {"type": "static"}}
    made = inject(have, BOTH, mtu=1450)
    assert "mtu" not in made["plugins"][0]
    assert NOTE not in made


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"plugins": []}', '{"plugins": [1]}', "[" * 100_000]
)
def test_what_is_no_conflist_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(InputError, match=r"a\.conflist"):
        parse(text, where="a.conflist")


def test_the_file_is_replaced_as_a_whole_and_only_when_needed(tmp_path: Path) -> None:
    folder = tmp_path / "net.d"
    assert keep_conflist(folder, BOTH, mtu=1450)
    path = folder / "10-kuberouter.conflist"
    inode = path.stat().st_ino
    assert not keep_conflist(folder, BOTH, mtu=1450)
    assert path.stat().st_ino == inode
    assert keep_conflist(folder, cidrs("10.9.9.0/24"), mtu=1450)
    assert path.stat().st_ino != inode
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_a_broken_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "10-kuberouter.conflist"
    path.write_text("{ half")
    with pytest.raises(InputError, match="no JSON"):
        keep_conflist(tmp_path, BOTH, mtu=1450)
    assert path.read_text() == "{ half"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KernelError, match="no text"):
        keep_conflist(tmp_path, BOTH, mtu=1450)


def test_a_file_that_runtimes_take_before_ours_is_named(tmp_path: Path) -> None:
    assert beaten(tmp_path / "none") == ""
    keep_conflist(tmp_path, [parse_prefix("10.1.1.0/24")], mtu=1500)
    (tmp_path / "99-later.conflist").touch()
    (tmp_path / "05-note.txt").touch()
    assert beaten(tmp_path) == ""
    (tmp_path / "05-other.conf").touch()
    assert "05-other.conf comes before" in beaten(tmp_path)


def test_a_link_in_the_place_of_the_file_is_followed_for_reading_alone(tmp_path: Path) -> None:
    """What it leads to may be another program's, which must not find our ranges in it."""
    theirs = tmp_path / "theirs.json"
    theirs.write_text(conflist.text_of(conflist.fresh()))
    before = theirs.read_text()
    folder = tmp_path / "net.d"
    folder.mkdir()
    path = folder / conflist.FILE_NAME
    path.symlink_to(theirs)
    assert keep_conflist(folder, [parse_prefix("10.1.1.0/24")], mtu=1500)
    assert theirs.read_text() == before
    assert not path.is_symlink()
    assert "10.1.1.0/24" in path.read_text()
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert keep_conflist(folder, [parse_prefix("10.1.1.0/24")], mtu=1500)
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_agent_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / f".{conflist.FILE_NAME}.tmp").write_text("{ half of something longer")
    keep_conflist(tmp_path, [parse_prefix("10.1.1.0/24")], mtu=1500)
    assert [p.name for p in tmp_path.iterdir()] == [conflist.FILE_NAME]
