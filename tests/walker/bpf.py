"""Classic BPF as xt_bpf runs it, for the few instructions that netpol's rules use."""

from __future__ import annotations

from tests.walker.packet import Packet, WalkError

#: linux/filter.h: class, size and mode in one number.
LD_W_ABS, TAX, JEQ_X, RET_K = 0x20, 0x07, 0x1D, 0x06

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
        if code not in (LD_W_ABS, TAX, JEQ_X, RET_K):
            raise WalkError(f"BPF instruction {code:#x} is not known here")
        program.append((code, jt, jf, k))
    if len(program) != int(count) or not program or program[-1][0] != RET_K:
        raise WalkError(f"BPF program {text}")
    return program


def header(packet: Packet) -> bytes:
    """The IP header as far as addresses: src at 12 and dst at 16, or at 8 and 24 (RFC 791, RFC 8200)."""
    return bytes(12 if packet.version == 4 else 8) + packet.src.packed + packet.dst.packed


def run(program: list[Instruction], packet: Packet) -> bool:
    """Whether a program takes a packet; a load beyond the packet refuses it."""
    data = header(packet)
    a = x = position = 0
    while True:
        if position >= len(program):
            raise WalkError("a BPF program ran off its end")
        code, jt, jf, k = program[position]
        position += 1
        if code == LD_W_ABS:
            if k + 4 > len(data):
                return False
            a = int.from_bytes(data[k : k + 4], "big")
        elif code == TAX:
            x = a
        elif code == JEQ_X:
            position += jt if a == x else jf
        else:
            return k != 0
