"""What people type for ends and ports."""

import pytest

from netpol.ctl.ports import Span, parse_port
from netpol.ctl.refs import RefKind, parse_pod_ref, parse_ref
from netpol.lib.errors import InputError
from netpol.model.ids import ObjectKey, Protocol

POD, SVC, NODE, BLOCK = RefKind.POD, RefKind.SERVICE, RefKind.NODE, RefKind.BLOCK


@pytest.mark.parametrize(
    ("text", "kind", "key"),
    [
        ("pod/a", POD, ("here", "a")),
        ("pods/a", POD, ("here", "a")),
        ("po/a.b-c", POD, ("here", "a.b-c")),
        ("svc/a", SVC, ("here", "a")),
        ("service/a", SVC, ("here", "a")),
        ("node/n.example.org", NODE, ("", "n.example.org")),
        ("ns/a", POD, ("ns", "a")),
        ("10/8", POD, ("10", "8")),
        ("ns/pod/a", POD, ("ns", "a")),
        ("pod/pod/a", POD, ("pod", "a")),
        ("svc/svc/svc", SVC, ("svc", "svc")),
        ("node/pod/a", POD, ("node", "a")),
        ("ns/svc/a", SVC, ("ns", "a")),
        ("ns/node/n", NODE, ("", "n")),
    ],
)
def test_objects(text, kind, key):
    ref = parse_ref(text, namespace="here")
    assert (ref.kind, ref.key) == (kind, ObjectKey(*key))


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("10.0.0.1", "10.0.0.1/32"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("fd00::1", "fd00::1/128"),
        ("fd00::/8", "fd00::/8"),
        ("::/0", "::/0"),
        ("::ffff:10.0.0.1", "10.0.0.1/32"),
    ],
)
def test_addresses(text, block):
    ref = parse_ref(text, namespace="here")
    assert (ref.kind, str(ref.block)) == (BLOCK, block)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "/", "a/", "/a", "a//b", "a/b/c/d", "ns/deployment/x", "pod/A", "pod/a_b"),
        *(
            "300.1.1.1",
            "10.0.0.0/33",
            "10.0.0.1/",
            "fd00::/129",
            "fe80::1%eth0",
            "pod/a b",
            "p\n/a",
        ),
        "pod/" + "a" * 5000,
    ],
)
def test_what_is_no_reference_is_refused_in_one_short_line(text):
    with pytest.raises(InputError) as caught:
        parse_ref(text, namespace="here")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_only_pods_are_explained_alone():
    with pytest.raises(InputError, match="is not a pod"):
        parse_pod_ref("svc/a", namespace="here")


@pytest.mark.parametrize(
    ("text", "protocol", "first", "last", "name"),
    [
        ("80", Protocol.TCP, 80, 80, ""),
        ("80/tcp", Protocol.TCP, 80, 80, ""),
        ("53/UDP", Protocol.UDP, 53, 53, ""),
        ("8000-8100/udp", Protocol.UDP, 8000, 8100, ""),
        ("1-65535/Sctp", Protocol.SCTP, 1, 65535, ""),
        ("0080", Protocol.TCP, 80, 80, ""),
        ("http", None, 0, 0, "http"),
        ("dns-tcp/tcp", Protocol.TCP, 0, 0, "dns-tcp"),
        ("8a", None, 0, 0, "8a"),
    ],
)
def test_ports(text, protocol, first, last, name):
    found = parse_port(text)
    assert (found.protocol, found.first, found.last, found.name) == (protocol, first, last, name)


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "65536", "80/", "80/icmp", "/tcp", "81-80", "80-", "-80", "80-90-100", "a" * 16),
        *("-a", "a--b", "UPPER", "80.5", "8 0", "99999999999999999999", "80/tcp/udp", "http_x"),
    ],
)
def test_what_is_no_port_is_refused(text):
    with pytest.raises(InputError, match="--port"):
        parse_port(text)


def test_spans_are_written_as_the_contract_has_them():
    assert str(Span(Protocol.TCP, 80, 80)) == "80/TCP"
    assert str(Span(Protocol.UDP, 1, 9)) == "1-9/UDP"
