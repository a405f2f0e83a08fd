"""Every case of the table through the decoder and the plan, and through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from netpol.ctl.main import main
from netpol.ctl.services import describe
from netpol.k8s.decode import decode_object
from netpol.model.net import format_address, parse_address, parse_prefix
from netpol.model.pools import parse_range
from proxy.plan import ProxyOptions, plan_service
from proxy.rows import ServicePlan
from tests.spec.proxy.case import ROWS, VIP4, Case, address, here
from tests.spec.proxy.cases_addresses import ADDRESSES
from tests.spec.proxy.cases_annotations import ANNOTATIONS
from tests.spec.proxy.cases_life import LIFE
from tests.spec.proxy.cases_policies import POLICIES
from tests.spec.proxy.cases_slices import SLICES

CASES = (*ADDRESSES, *SLICES, *POLICIES, *LIFE, *ANNOTATIONS)

_LETTERS = {address(c, f): c for c in "abcdefghij" for f in (4, 6)}


def options_of(case: Case) -> ProxyOptions:
    parse: dict[str, Any] = {"scheduler": str, "balancer_pools": parse_range}
    addresses = ("node_addresses", "api_servers", "gateways", "bgp_peers")
    parse |= dict.fromkeys(addresses, parse_address)
    made: dict[str, Any] = {}
    for name, given in case.options.items():
        one = parse.get(name, parse_prefix)
        made[name] = given if name == "scheduler" else tuple(map(one, given))
    return replace(ProxyOptions(), **made)


def plan_of(case: Case) -> ServicePlan:
    return plan_service(
        decode_object("Service", case.service),
        [decode_object("EndpointSlice", s) for s in case.slices],
        decode_object("Node", case.node or here()),
        options_of(case),
    )


def met(row: dict[str, Any], side: str) -> str:
    """What clients meet, from a row's document."""
    backends = row[side]
    live = " ".join(_LETTERS[b["address"]] for b in backends if b["weight"])
    if side == "backends" and row["action"] != "forward":
        assert not live
        return str(row["action"])
    if not live:
        return "drop" if row["action"] == "drop" else "reject"
    drains = " ".join(_LETTERS[b["address"]] for b in backends if not b["weight"])
    return f"{live}/{drains}" if drains else live


def check(case: Case, rows: list[dict[str, Any]]) -> None:
    mine = [r for r in rows if r["portName"] == case.port]
    found = {(r["kind"], r["address"]): r for r in mine}
    assert len(found) == len(mine)
    for side, wanted in (
        ("backends", case.outside),
        ("localClientBackends", {**case.outside, **case.inside}),
    ):
        shown = {
            short: met(found[where], side) if (where := ROWS[short]) in found else "-"
            for short in wanted
        }
        assert shown == dict(wanted), side
    for short, fields in case.rows.items():
        row = found[ROWS[short]]
        assert {k: row[k] for k in fields} == dict(fields)


def test_claims_are_told_apart_and_assert_something():
    assert len({c.claim for c in CASES}) == len(CASES)
    assert all(c.outside or c.rows or c.refused or c.plan for c in CASES)
    assert len(CASES) >= 80


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.claim)
def test_plan(case: Case):
    plan = plan_of(case)
    check(case, [describe(row) for row in plan.rows])
    assert len(plan.refused) == len(case.refused), plan.refused
    for refused, words in zip(plan.refused, case.refused, strict=True):
        assert words in refused.message
        assert "\n" not in refused.message
    for name, value in case.plan.items():
        assert getattr(plan, name) == value, name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.claim)
def test_row_invariants(case: Case):
    """What holds of every row whatever the case."""
    for row in plan_of(case).rows:
        live = [b for b in row.backends if b.weight]
        assert (row.action == "forward") == bool(live)
        for backends in (row.backends, row.local_client_backends):
            assert list(backends) == sorted(set(backends))
            assert len({(b.address, b.port) for b in backends}) == len(backends)
            assert all(len(b.address) == len(row.address) for b in backends)
            # Draining backends never stand alone: then they would serve.
            assert not backends or any(b.weight for b in backends)
        assert row.kind == "LoadBalancer" or not row.source_ranges
        assert all(r.family is row.family for r in row.source_ranges)
        if row.kind == "ClusterIP":
            assert row.local_client_backends == row.backends


#: Options of plans that the command line has too.
_FLAGS = {
    "nodeport_cidrs": "--nodeport-addresses",
    "external_cidrs": "--external-ip-cidr",
    "service_ranges": "--service-cidr",
}
_TYPED = [c for c in CASES if set(c.options) <= set(_FLAGS)]


@pytest.mark.parametrize("case", _TYPED, ids=lambda c: c.claim)
def test_command_line_prints_the_same(case: Case, tmp_path, capsys):
    file = tmp_path / "all.json"
    items = [case.service, *case.slices, case.node or here()]
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    words = [w for n, given in case.options.items() for v in given for w in (_FLAGS[n], v)]
    code = main(["services", "-f", str(file), "--node", "here", "-o", "json", *words])
    out = json.loads(capsys.readouterr().out)
    assert code == 0
    assert list(out) == ["services"]
    assert out["services"] == [describe(row) for row in plan_of(case).rows]
    check(case, out["services"])


def test_rows_name_what_is_dialled():
    plan = plan_of(next(c for c in ADDRESSES if c.claim.startswith("a ClusterIP")))
    assert [format_address(r.address) for r in plan.rows] == [VIP4]
