"""Whatever nodes, peers and Services there are: BIRD takes the configuration, the same each time."""

from __future__ import annotations

import subprocess
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netpol.model.net import Prefix, host_prefix, masked
from netpol.model.objects import Node
from routes.bird.render import node_name, render
from routes.options import (
    Community,
    Encapsulation,
    ExternalPeer,
    ImportPolicy,
    OverlayMode,
    RouteOptions,
)
from routes.plan import plan

pytestmark = pytest.mark.kernel

v4 = st.tuples(st.integers(1, 223), *[st.integers(0, 255)] * 3).map(bytes)
v6 = st.binary(min_size=15, max_size=15).map(lambda b: b"\xfd" + b)
address = v4 | v6
asns = st.integers(1, 4_294_967_294)


@st.composite
def blocks(draw: st.DrawFn) -> Prefix:
    base = draw(address)
    return masked(base, draw(st.integers(1, len(base) * 8)))


names = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"),
    min_size=1,
    max_size=80,
)
annotations = st.fixed_dictionaries(
    {},
    optional={
        "netpol.io/node.asn": asns.map(str),
        "netpol.io/rr.server": st.integers(1, 9).map(str),
        "netpol.io/rr.client": st.integers(1, 9).map(str),
        "netpol.io/node.bgp.communities": st.sampled_from(["64512:1", "no-export,64512:1:2", "x"]),
        "netpol.io/bgp-local-addresses": st.just("10.0.0.1,fd00::1"),
    },
)


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    found = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    return [
        Node(
            name=name,
            addresses=tuple(draw(st.lists(address, max_size=3))),
            pod_cidrs=tuple(draw(st.lists(blocks(), max_size=3))),
            annotations=tuple(sorted(draw(annotations).items())),
        )
        for name in found
    ]


def some(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(strategy, max_size=3).map(tuple)


communities = st.builds(Community, st.integers(0, 65535), st.integers(0, 65535)) | st.builds(
    Community, asns, asns, asns
)
imports = st.builds(
    ImportPolicy,
    enabled=st.booleans(),
    only=some(blocks()),
    reject=some(blocks()),
    default_route=st.booleans(),
    limit=st.integers(1, 10_000_000),
)
peers = st.builds(
    ExternalPeer,
    address=address,
    asn=asns,
    port=st.integers(1, 65535),
    password=st.text(
        st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"'), max_size=80
    ),
    multihop=st.integers(0, 255),
    bfd=st.booleans(),
    graceful_restart=st.booleans(),
    reflector=st.booleans(),
    imports=imports,
    export=some(blocks()),
    communities=some(communities),
    prepend=st.none() | st.tuples(asns, st.integers(1, 5)),
    local_pref=st.none() | st.integers(0, 4_294_967_295),
    med=st.none() | st.integers(0, 4_294_967_295),
    hold_s=st.integers(3, 65535),
)
options = st.builds(
    RouteOptions,
    asn=asns,
    cluster_cidrs=some(blocks()),
    service_cidrs=some(blocks()),
    vip_cidrs=some(blocks()),
    subnets=some(blocks()),
    overlay=st.sampled_from(OverlayMode),
    encapsulation=st.sampled_from(Encapsulation),
    mesh=st.booleans(),
    peers=some(peers),
    advertise_pod_cidr=st.booleans(),
    graceful_restart=st.booleans(),
    listen_port=st.integers(1, 65535),
    drain=st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(nodes(), options, st.lists(address.map(host_prefix), max_size=4))
def test_bird_takes_every_configuration(
    cluster: list[Node], chosen: RouteOptions, vips: list[Prefix]
) -> None:
    made = plan(cluster, cluster[0].name, chosen, vips=vips)
    text = render(made)
    assert text == render(plan(list(reversed(cluster)), cluster[0].name, chosen, vips=vips[::-1]))
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(
            ["bird", "-p", "-c", file.name], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, f"{done.stderr}\n{text}"


@given(st.lists(names, unique=True))
def test_no_two_nodes_share_a_protocol(found: list[str]) -> None:
    made = [node_name(n) for n in found]
    assert len(set(made)) == len(made)
    assert all(len(n) <= 64 for n in made)
