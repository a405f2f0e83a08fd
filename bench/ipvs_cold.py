"""Inside the guest: a table of IPVS and the addresses of its Services, cold, against the usual tools."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

from bench import services
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.modules import load_module
from netpol.kernel.vips import LINK, DummyVips
from netpol.model.net import Family, format_address, parse_address

SERVICES, ENDPOINTS = 1000, 10
#: The slow one is asked fewer times; noise can only add to either.
ROUNDS, BASELINE_ROUNDS = 4, 2


def run(say: Callable[[str, Any], None]) -> None:
    """All figures, in seconds."""
    _table(say)
    _addresses(say)


def _table(say: Callable[[str, Any], None]) -> None:
    ipvs = NetlinkIpvs()
    load_module("ip_vs_rr")
    ops = services.ipvs_ops(SERVICES, ENDPOINTS)
    text = services.ipvsadm_text(SERVICES, ENDPOINTS)

    def cleared() -> None:
        found = ipvs.dump()
        if (len(found), sum(len(s.reals) for s in found.values())) != (
            SERVICES,
            SERVICES * ENDPOINTS,
        ):
            raise AssertionError("the table is not full")
        subprocess.run(["ipvsadm", "-C"], check=True)

    ours, theirs = [], []
    for round_ in range(ROUNDS):
        begin_s = time.monotonic()
        if ipvs.apply(ops):
            raise AssertionError("operations were refused")
        ours.append(time.monotonic() - begin_s)
        if round_ == ROUNDS - 1:
            begin_s = time.monotonic()
            ipvs.dump()
            say("dump", time.monotonic() - begin_s)
        cleared()
        if round_ < BASELINE_ROUNDS:
            begin_s = time.monotonic()
            subprocess.run(["ipvsadm", "--restore"], input=text, text=True, check=True)
            theirs.append(time.monotonic() - begin_s)
            cleared()
    say("ours", ours)
    say("ipvsadm", theirs)
    ipvs.close()


def _addresses(say: Callable[[str, Any], None]) -> None:
    for command in (
        "ip link add eth0 type dummy",
        "ip link set eth0 up",
        f"ip addr add {services.NODE_ADDRESS}/24 dev eth0",
    ):
        subprocess.run(command.split(), check=True)
    vips = DummyVips()
    addresses = [services.vip(n) for n in range(SERVICES)]
    sources = {Family.V4: parse_address(services.NODE_ADDRESS)}
    lines = "".join(
        f"addr add {a}/32 dev {LINK}\n"
        f"route replace local {a} dev {LINK} table local src {services.NODE_ADDRESS}\n"
        for a in map(format_address, addresses)
    )

    def cleared() -> None:
        there = vips.dump()
        if there is None or len(there) != SERVICES or vips.misrouted(sources):
            raise AssertionError("not all addresses are there")
        vips.remove_link()

    ours, theirs = [], []
    for _ in range(ROUNDS):
        begin_s = time.monotonic()
        if vips.apply(add=addresses, remove=[], sources=sources):
            raise AssertionError("addresses were refused")
        ours.append(time.monotonic() - begin_s)
        cleared()
        begin_s = time.monotonic()
        text = f"link add {LINK} type dummy\nlink set {LINK} up\n{lines}"
        subprocess.run(["ip", "-batch", "-"], input=text, text=True, check=True)
        theirs.append(time.monotonic() - begin_s)
        cleared()
    say("vips", ours)
    say("ip -batch", theirs)
    vips.close()
