"""Settings of the agent: where they come from, and that all faults are told at once."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from netpol.config import Settings, check, load, parser
from netpol.lib.errors import InputError
from netpol.model.net import parse_address
from netpol.model.pools import AddressRange, parse_range


def read(*flags: str, environment: Mapping[str, str] | None = None) -> Settings:
    return load(parser().parse_args(flags), environment or {}, host_name="n1")


SERVER = "--api-server=https://192.0.2.1:6443"


def test_the_proxy_is_off_unless_asked_for() -> None:
    assert not read().proxy
    assert read("--proxy", SERVER).proxy
    assert read(SERVER, environment={"NETPOL_PROXY": "true"}).proxy


def test_policy_may_be_off_beside_the_proxy_only() -> None:
    assert not read("--no-policy", "--proxy", SERVER).policy
    with pytest.raises(InputError, match=r"--no-policy: needed --proxy"):
        read("--no-policy")


def test_all_faults_of_the_proxy_are_told_together() -> None:
    with pytest.raises(InputError) as caught:
        read(
            *("--proxy", SERVER, "--service-ranges=10.96.0.0/33", "--loadbalancer-pools=a-b"),
            *("--ipvs-scheduler=fast", "--drain-seconds=-1", "--proxy-health-addr=10256"),
            *("--loadbalancer-class=a b", "--nodeport-addresses=x", "--external-ip-cidr=y"),
            *("--service-mark-mask=0xffffff00", "--ipvs-udp-timeout=9999999"),
        )

    text = str(caught.value)
    for flag in (
        *("--service-ranges", "--loadbalancer-pools", "--ipvs-scheduler", "--drain-seconds"),
        *("--proxy-health-addr", "--loadbalancer-class", "--nodeport-addresses"),
        *("--external-ip-cidr", "--service-mark-mask", "--ipvs-udp-timeout"),
    ):
        assert f"{flag}: " in text


def test_settings_of_the_proxy_matter_only_with_it() -> None:
    assert check(Settings(node="n", ipvs_scheduler="fast", service_mark_mask="no")) == []


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ((SERVER, "--service-ranges=192.0.2.0/24"), True),
        (("--api-server=https://[fd00::1]", "--service-ranges=fd00::/112"), True),
        ((SERVER, "--service-ranges=10.96.0.0/12", "--service-ranges=fd00::/112"), False),
        (("--api-server=https://cp.example:6443", "--service-ranges=10.96.0.0/12"), False),
    ],
)
def test_the_api_server_is_reached_by_no_address_of_a_service(
    flags: tuple[str, ...], refused: bool
) -> None:
    if refused:
        with pytest.raises(InputError, match="needed --api-server with an address of its own"):
            read("--proxy", *flags)
    else:
        assert read("--proxy", *flags).service_ranges


def test_with_the_service_account_the_service_ranges_must_be_known() -> None:
    with pytest.raises(InputError, match="--service-ranges to tell"):
        read("--proxy")
    assert read("--proxy", "--service-ranges=10.96.0.0/12").proxy


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("192.0.2.0/24", "192.0.2.1", "192.0.2.254"),
        ("192.0.2.0/31", "192.0.2.0", "192.0.2.1"),
        ("192.0.2.7/32", "192.0.2.7", "192.0.2.7"),
        ("192.0.2.10-192.0.2.20", "192.0.2.10", "192.0.2.20"),
        ("fd00::/126", "fd00::", "fd00::3"),
    ],
)
def test_pools_are_cidrs_or_ranges(text: str, first: str, last: str) -> None:
    assert parse_range(text) == AddressRange(parse_address(first), parse_address(last))


@pytest.mark.parametrize("text", ["192.0.2.9-192.0.2.1", "192.0.2.1-fd00::1", "192.0.2.1-", "x"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_range(text)
