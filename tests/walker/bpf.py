"""Classic BPF as xt_bpf runs it, for the few instructions that netpol's rules use."""

from __future__ import annotations

from tests.walker.packet import Packet, WalkError

#: linux/filter.h: class, size and mode in one number.
LD_W_ABS, LD_H_ABS, LD_B_ABS, LD_H_IND, LD_B_IND = 0x20, 0x28, 0x30, 0x48, 0x50
LDX_MSH, TAX, JEQ_K, JEQ_X, RET_K = 0xB1, 0x07, 0x15, 0x1D, 0x06
LOADS = {LD_W_ABS: 4, LD_H_ABS: 2, LD_B_ABS: 1, LD_H_IND: 2, LD_B_IND: 1}
KNOWN = {*LOADS, LDX_MSH, TAX, JEQ_K, JEQ_X, RET_K}
#: SKF_AD_OFF + SKF_AD_PKTTYPE.
PKTTYPE = 0xFFFFF004
NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58, "sctp": 132}

Instruction = tuple[int, int, int, int]


def parse_program(text: str) -> list[Instruction]:
    """Read `COUNT,CODE JT JF K,...`.

    Raises:
        WalkError: the count is wrong, or an instruction is not known here.
    """
    count, *rest = text.split(",")
    program: list[Instruction] = []
    for part in rest:
        code, jt, jf, k = map(int, part.split())
        if code not in KNOWN:
            raise WalkError(f"BPF instruction {code:#x} is not known here")
        program.append((code, jt, jf, k))
    if len(program) != int(count) or not program or program[-1][0] != RET_K:
        raise WalkError(f"BPF program {text}")
    return program


def header(packet: Packet) -> bytes:
    """What programs may look at: length, protocol and addresses (RFC 791, RFC 8200), source port, chunk."""
    number = NUMBERS[packet.protocol]
    before = bytes(
        [0x45, *bytes(8), number, 0, 0] if packet.version == 4 else [*bytes(6), number, 0]
    )
    ports = (packet.sport or 0).to_bytes(2, "big") + bytes(10)
    return before + packet.src.packed + packet.dst.packed + ports + bytes([packet.chunk])


def run(program: list[Instruction], packet: Packet) -> bool:
    """Whether a program takes a packet; a load beyond the packet refuses it."""
    data = header(packet)
    a = x = position = 0
    while True:
        if position >= len(program):
            raise WalkError("a BPF program ran off its end")
        code, jt, jf, k = program[position]
        position += 1
        if code == LD_B_ABS and k == PKTTYPE:
            a = packet.pkttype
        elif code in LOADS:
            at = k + x if code in (LD_H_IND, LD_B_IND) else k
            if at + LOADS[code] > len(data):
                return False
            a = int.from_bytes(data[at : at + LOADS[code]], "big")
        elif code == LDX_MSH:
            x = (data[k] & 15) * 4
        elif code == TAX:
            x = a
        elif code in (JEQ_K, JEQ_X):
            position += jt if a == (x if code == JEQ_X else k) else jf
        else:
            return k != 0
