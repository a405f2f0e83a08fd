"""Reading /proc/net/ip_vs: the kernel's own text, and what must not be guessed from other text."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from netpol.kernel.ipvs import Forward, IpvsTable, RealServer, parse_ipvs, read_ipvs
from netpol.lib.errors import KernelError
from netpol.model.ids import Protocol
from netpol.model.ruleset import AddressPort

#: As Linux 6.1 printed it, trailing blanks included.
SAMPLE = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  [fd00:0010:0096:0000:0000:0000:0000:0010]:0050 rr 
  -> [fd00:0010:0244:0001:0000:0000:0000:0020]:1F90      Masq    1      0          0         
TCP  0A60000E:0050 rr  
  -> 0AF40117:0050      Tunnel  1      0          0         
TCP  0A60000D:0050 rr  
  -> 0AF40116:0050      Route   1      0          0         
TCP  0A60000A:0050 rr  
  -> 0AF40214:1F90      Masq    0      0          0         
  -> 0AF40114:1F90      Masq    1      3          17        
UDP  0A60000A:0035 rr ops  
TCP  0A60000C:0000 rr  persistent 30000 FFFFFFFF
  -> 0AF40115:0000      Masq    1      0          0         
SCTP  0A600010:0F1C rr  
  -> 0AF40118:0F1C      Masq    1      0          0         
FWM  00000007 rr 
  -> 0AF40119:0050      Masq    1      0          0         
TCP  0A600011:0016 rr  
"""  # noqa: W291


def key(address: str, port: int, protocol: Protocol = Protocol.TCP) -> AddressPort:
    return AddressPort(ipaddress.ip_address(address).packed, protocol, port)


def real(address: str, forward: Forward = Forward.NAT) -> RealServer:
    return RealServer(ipaddress.ip_address(address).packed, forward)


def parse(*lines: str) -> IpvsTable:
    return parse_ipvs([*SAMPLE.splitlines()[:3], *lines])


def test_the_kernels_text():
    table = parse_ipvs(SAMPLE.splitlines())
    assert table.services == {
        key("fd00:10:96::10", 80): {real("fd00:10:244:1::20")},
        key("10.96.0.14", 80): {real("10.244.1.23", Forward.TUNNEL)},
        key("10.96.0.13", 80): {real("10.244.1.22", Forward.ROUTE)},
        key("10.96.0.10", 80): {real("10.244.2.20"), real("10.244.1.20")},
        key("10.96.0.10", 53, Protocol.UDP): set(),
        key("10.96.0.12", 0): {real("10.244.1.21")},
        key("10.96.0.16", 3868, Protocol.SCTP): {real("10.244.1.24")},
        key("10.96.0.17", 22): set(),  # after a mark's: none of its real servers
    }
    assert (table.fwmarks, table.strange) == (1, ())


def test_an_empty_table_is_not_none():
    assert parse() == IpvsTable()


@pytest.mark.parametrize(
    "line",
    [
        "DCCP  0A60000A:0050 rr  ",
        "TCP  0A60000A0050 rr  ",
        "TCP  0A6000:0050 rr  ",
        "TCP  0A60000G:0050 rr  ",
        "TCP  0A60000A:50 rr  ",
        "TCP  [fd00::10:0050 rr  ",
        "TCP",
    ],
)
def test_a_service_line_that_is_not_understood_is_put_aside_with_its_real_servers(line: str):
    table = parse(
        "TCP  0A60000B:0050 rr  ", line, "  -> 0AF40114:1F90      Masq    1      0          0"
    )
    assert table.services == {key("10.96.0.11", 80): set()}
    assert table.strange == (line.strip(),)


@pytest.mark.parametrize(
    "line",
    [
        "  -> 0AF40114:1F90      Magic   1      0          0",
        "  -> 0AF40114           Masq    1      0          0",
        "  -> 0AF40114:1F90",
    ],
)
def test_a_service_with_a_real_server_that_is_not_understood_is_not_known(line: str):
    good = "  -> 0AF40114:1F90      Masq    1      0          0"
    table = parse("TCP  0A60000A:0050 rr  ", good, line, good, "TCP  0A60000B:0050 rr  ")
    assert table.services == {key("10.96.0.11", 80): set()}
    assert table.strange == (line.strip(),)


def test_a_service_that_is_shown_twice_has_all_its_real_servers():
    one, two = "  -> 0AF40114:1F90 Masq 1 0 0", "  -> 0AF40115:1F90 Masq 1 0 0"
    table = parse("TCP  0A60000A:0050 rr", one, "TCP  0A60000A:0050 rr", two)
    assert table.services == {key("10.96.0.10", 80): {real("10.244.1.20"), real("10.244.1.21")}}


def test_strange_lines_are_named_up_to_a_number():
    assert len(parse(*[f"what {n}" for n in range(99)]).strange) == 5


def test_no_file_is_no_ipvs(tmp_path: Path):
    assert read_ipvs(tmp_path / "ip_vs") is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path):
    with pytest.raises(KernelError, match="directory"):
        read_ipvs(tmp_path)


def test_reading_a_file(tmp_path: Path):
    path = tmp_path / "ip_vs"
    path.write_text(SAMPLE)
    assert read_ipvs(path) == parse_ipvs(SAMPLE.splitlines())
