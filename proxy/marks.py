"""Packet marks of IPVS servers: which port of a Service has which, kept over restarts, reused when free.

A number is taken while its owner wants it, and stays so until the room says that nothing in the kernel
bears it any more. Who had which before a restart is told by the ledger (`proxy.ledger`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from netpol.model.ids import ObjectKey
from netpol.model.net import Family


class MarkKey(NamedTuple):
    """Who has a mark: one port of one Service in one family.

    `variant` tells apart what rows of the port differ in, which they do not as plans are made today.
    """

    service: ObjectKey
    port_name: str
    family: Family
    variant: int = 0


class Marks:
    """The marks of one node.

    IPVS compares the whole mark, so that a value is the number in the field and nothing beside it.

    Args:
        mask: the field, bits in a row; number 0 is no mark.
    """

    def __init__(self, mask: int) -> None:
        self._shift = (mask & -mask).bit_length() - 1
        self._last = mask >> self._shift
        self._number: dict[MarkKey, int] = {}
        self._taken: set[int] = set()
        self._free: list[int] = []
        self._next = 1

    @property
    def used(self) -> Mapping[MarkKey, int]:
        """The numbers that are taken."""
        return self._number

    def value(self, key: MarkKey) -> int | None:
        """The mark that a key has, without giving it one."""
        number = self._number.get(key)
        return None if number is None else number << self._shift

    def adopt(self, values: Mapping[MarkKey, int]) -> None:
        """Take over what a former agent gave; values outside the field, or given twice, are not taken."""
        for key, value in sorted(values.items()):
            number = value >> self._shift
            fits = number << self._shift == value and 0 < number <= self._last
            if fits and number not in self._taken and key not in self._number:
                self._number[key] = number
                self._taken.add(number)

    def ban(self, values: Iterable[int]) -> None:
        """Never give these: others have servers by them."""
        self._taken |= {v >> self._shift for v in values}

    def assign(self, key: MarkKey) -> int | None:
        """The mark of a key; None where the field has no room for one more."""
        value = self.value(key)
        if value is not None:
            return value
        number = self._take()
        if number is None:
            return None
        self._number[key] = number
        return number << self._shift

    def _take(self) -> int | None:
        while self._free:
            number = self._free.pop()
            if number not in self._taken:
                self._taken.add(number)
                return number
        while self._next <= self._last:
            number, self._next = self._next, self._next + 1
            if number not in self._taken:
                self._taken.add(number)
                return number
        return None

    def release(self, keys: Iterable[MarkKey]) -> None:
        """Nothing in the kernel bears the marks of these any more."""
        for key in keys:
            number = self._number.pop(key, None)
            if number is not None:
                self._taken.discard(number)
                self._free.append(number)
