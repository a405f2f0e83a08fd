"""BGP settings of a node from its annotations, ours and kube-router's."""

from __future__ import annotations

import base64

import pytest

from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import Node
from routes.annotations import NodeBgp, password, peer_of, read, read_yaml
from routes.options import Community
from routes.scalars import community

KEY = "hunter2 is long"
ENCODED = base64.b64encode(KEY.encode()).decode()


def of(**annotations: str) -> tuple[NodeBgp, tuple[str, ...]]:
    named = {
        f"kube-router.io/{k.replace('__', '-').replace('_', '.')}": v
        for k, v in annotations.items()
    }
    bgp, problems = read(named)
    return bgp, tuple(str(p) for p in problems)


def test_no_annotation_says_nothing() -> None:
    assert read({}) == (NodeBgp(), ())


def test_every_annotation_of_the_other_project_is_understood() -> None:
    bgp, problems = of(
        node_asn="65001",
        router_id="10.0.0.9",
        node_bgp_communities="64512:100, no-export,64512:1:2",
        node_bgp_customimportreject="10.0.0.0/16, fd00::/64",
        path__prepend_as="65001",
        path__prepend_repeat__n="3",
        rr_server="42",
        bgp__local__addresses="10.0.0.1,fd00::1",
    )
    assert problems == ()
    assert bgp.asn == 65001
    assert bgp.router_id == parse_address("10.0.0.9")
    assert bgp.communities == (
        Community(64512, 100),
        Community(65535, 65281),
        Community(64512, 1, 2),
    )
    assert bgp.reject == (parse_prefix("10.0.0.0/16"), parse_prefix("fd00::/64"))
    assert bgp.prepend == (65001, 3)
    assert bgp.reflector_cluster == bytes([0, 0, 0, 42])
    assert bgp.local_addresses == (parse_address("10.0.0.1"), parse_address("fd00::1"))
    assert of(rr_client="10.0.0.1")[0].client_cluster == parse_address("10.0.0.1")


def test_ours_goes_before_theirs() -> None:
    bgp, _ = read({"netpol.io/node.asn": "65009", "kube-router.io/node.asn": "65001"})
    assert bgp.asn == 65009


def test_peers_as_yaml() -> None:
    text = f"""
- remoteip: 192.0.2.1
  remoteasn: 65010
  password: {ENCODED}
  port: 1179
  localip: 192.0.2.9
- remoteip: 2001:db8::1
  remoteasn: 4200000000
  port:
"""
    bgp, problems = of(peers=text, node_bgp_customimportreject="10.0.0.0/8")
    assert problems == ()
    first, second = bgp.peers
    assert (first.address, first.asn, first.port) == (parse_address("192.0.2.1"), 65010, 1179)
    assert first.password == KEY
    assert first.local_address == parse_address("192.0.2.9")
    assert (second.asn, second.port) == (4200000000, 179)
    assert first.imports.reject == (parse_prefix("10.0.0.0/8"),)


def test_peers_as_lists_of_equal_length() -> None:
    bgp, problems = of(
        peer_ips="192.0.2.1,192.0.2.2",
        peer_asns="65010,65011",
        peer_ports=",1179",
        peer_passwords=f"{ENCODED},",
    )
    assert problems == ()
    assert [(p.asn, p.port, p.password) for p in bgp.peers] == [
        (65010, 179, KEY),
        (65011, 1179, ""),
    ]


def test_one_bad_peer_costs_no_other() -> None:
    bgp, problems = of(
        peers="[{remoteip: nonsense, remoteasn: 1}, {remoteip: 192.0.2.2, remoteasn: 2}]"
    )
    assert [p.asn for p in bgp.peers] == [2]
    assert problems == ("kube-router.io/peers[0]: address: needed an IP address",)


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"node_asn": "0"}, "needed a number of 1.."),
        ({"node_asn": "4294967295"}, "needed a number of 1.."),
        ({"node_asn": "x"}, "needed a number"),
        ({"router_id": "fd00::1"}, "needed an IPv4 address"),
        ({"path__prepend_as": "65000"}, "got one of them"),
        ({"peers": "a: [b"}, "not YAML"),
        ({"peers": "hello"}, "needed a list"),
        ({"peers": "[{remoteip: 192.0.2.1}]"}, "needed asn"),
        ({"peers": "[{remoteip: 192.0.2.1, remoteasn: 1, colour: red}]"}, "'colour'"),
        ({"peers": "[{remoteip: 224.0.0.1, remoteasn: 1}]"}, "address of a router"),
        ({"peers": "[{remoteip: 192.0.2.1, remoteasn: 1, localip: 'fd00::1'}]"}, "family"),
        ({"peer_ips": "192.0.2.1,192.0.2.2", "peer_asns": "1"}, "needed 2 items"),
        ({"node_bgp_communities": "70000:1"}, "community"),
        ({"node_bgp_customimportreject": "10.0.0.0/99"}, "CIDR"),
        ({"rr_server": "0"}, "needed a number of 1.."),
    ],
)
def test_what_cannot_be_read_is_named(annotations: dict[str, str], said: str) -> None:
    _, problems = of(**annotations)
    assert len(problems) == 1
    assert said in problems[0]


@pytest.mark.parametrize(
    "value",
    [
        ENCODED + "!!",
        base64.b64encode(b'with"quote').decode(),
        base64.b64encode(b"x" * 81).decode(),
    ],
)
def test_a_password_is_never_told(value: str) -> None:
    bgp, problems = of(peers=f"[{{remoteip: 192.0.2.1, remoteasn: 1, password: '{value}'}}]")
    assert bgp.peers == ()
    assert "password" in problems[0]
    assert value not in problems[0]
    good, _ = of(peers=f"[{{remoteip: 192.0.2.1, remoteasn: 1, password: '{ENCODED}'}}]")
    assert good.peers[0].password == KEY
    assert KEY not in repr(good)


def test_passwords_lose_the_newline_that_echo_leaves() -> None:
    assert password(base64.b64encode(b"secret\n").decode(), encoded=True) == "secret"
    with pytest.raises(ValueError, match="printable"):
        password("two\nlines", encoded=False)


def test_communities_as_people_write_them() -> None:
    assert community("4227858532") == Community(64512, 100)
    assert community("no_export") == Community(65535, 65281)
    for bad in ("", "1:2:3:4", "-1:2", "a:b", "65536:1"):
        with pytest.raises(ValueError, match="community"):
            community(bad)


def test_yaml_keeps_what_was_written() -> None:
    """64512:1:2 would be a number in base 60."""
    assert read_yaml("[64512:1:2, 0x10, yes]") == ["64512:1:2", "0x10", "yes"]


def test_all_keys_of_a_global_peer() -> None:
    peer = peer_of(
        read_yaml(
            "{address: 192.0.2.1, asn: 65010, multihop: 4, bfd: true, import: true, importLimit: 7,"
            " importOnly: [203.0.113.0/24], importReject: 203.0.113.0/28, importDefaultRoute: true,"
            " export: [10.0.0.0/8], communities: [64512:1], prepend: {asn: 64512, times: 2},"
            " localPreference: 200, med: 10, holdSeconds: 9, keepaliveSeconds: 3,"
            " gracefulRestart: false, reflector: false, password: plain}"
        ),
        encoded=False,
    )
    assert (peer.multihop, peer.bfd, peer.hold_s, peer.keepalive_s) == (4, True, 9, 3)
    assert peer.imports.enabled
    assert peer.imports.limit == 7
    assert peer.imports.default_route
    assert peer.imports.only == (parse_prefix("203.0.113.0/24"),)
    assert peer.imports.reject == (parse_prefix("203.0.113.0/28"),)
    assert peer.export == (parse_prefix("10.0.0.0/8"),)
    assert peer.prepend == (64512, 2)
    assert (peer.local_pref, peer.med) == (200, 10)
    assert not peer.graceful_restart
    with pytest.raises(ValueError, match="multihop"):
        peer_of(
            {"address": "192.0.2.1", "asn": "1", "multihop": "2", "ttlSecurity": "yes"},
            encoded=False,
        )


def test_aliases_are_not_followed() -> None:
    """Eight lines of them would stand for a list of a hundred million."""
    levels = ["- &a0 [x]"]
    levels += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    text = "\n".join([*levels, "- {address: 10.0.0.1, asn: 1, communities: [*a8]}"])
    bgp, problems = of(peers=text)
    assert bgp.peers == ()
    assert problems == ("kube-router.io/peers: needed YAML without aliases",)


@pytest.mark.parametrize(
    "item", ["{password:c2VjcmV0: x}", "{address: 10.0.0.1, asn: 1, port: 99991}"]
)
def test_no_value_is_ever_told(item: str) -> None:
    _, problems = of(peers=f"[{item}]")
    assert len(problems) == 1
    assert "c2VjcmV0" not in problems[0]
    assert "99991" not in problems[0]


def test_a_nodes_repr_tells_no_annotation() -> None:
    made = Node(name="n1", annotations=(("kube-router.io/peer.passwords", ENCODED),))
    assert ENCODED not in repr((made,))
    assert ENCODED not in f"{made}"


@pytest.mark.parametrize(
    "more",
    [
        "address: 'fe80::1'",
        "address: 255.255.255.255",
        "address: 0.0.0.9",
        "address: 10.0.0.1, holdSeconds: 9, keepaliveSeconds: 10",
    ],
)
def test_what_bird_would_refuse_is_refused_here(more: str) -> None:
    bgp, problems = of(peers=f"[{{asn: 65001, {more}}}]")
    assert bgp.peers == ()
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [("4200000000", 4200000000), ("1.10", 65546), ("64086.59904", 4200000000), ("0.64512", 64512)],
)
def test_an_as_in_both_notations(text: str, number: int) -> None:
    assert of(node_asn=text)[0].asn == number


@pytest.mark.parametrize("text", ["23456", "65535", "0.0", "65535.65535", "1.65536", "1.2.3", "-1"])
def test_what_is_no_as(text: str) -> None:
    bgp, problems = of(node_asn=text)
    assert bgp.asn is None
    assert len(problems) == 1


def test_lists_without_addresses_are_told() -> None:
    _, problems = of(peer_asns="65010", peer_passwords=ENCODED)
    assert problems[0] == "kube-router.io/peer.asns: needed peer.ips too, got none"
    assert ENCODED not in "".join(problems)


def test_our_peers_go_before_theirs_in_whatever_form() -> None:
    bgp, problems = read(
        {
            "netpol.io/peer.ips": "192.0.2.1",
            "netpol.io/peer.asns": "65010",
            "kube-router.io/peers": "[{remoteip: 192.0.2.2, remoteasn: 65011}]",
        }
    )
    assert [p.asn for p in bgp.peers] == [65010]
    assert problems == ()
    assert of(peers="") == (NodeBgp(), ())


def test_a_password_is_a_text() -> None:
    with pytest.raises(ValueError, match="needed a text"):
        peer_of({"address": "192.0.2.1", "asn": "1", "password": ["a", "b"]}, encoded=False)
    assert password(f"{ENCODED}\n", encoded=True) == KEY
