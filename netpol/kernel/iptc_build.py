"""python-iptables, loaded once with its repairs, and rules built with it from words.

Loading it starts programs (ldconfig, modprobe), so nothing here is imported before a legacy host needs
it. See `iptc_tables` for what is repaired and why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from netpol.kernel.rule_text import PROTOCOL_WORDS
from netpol.lib.errors import KernelMissingError
from netpol.model.ids import OWN_PREFIX, PROTOCOL_NUMBERS
from netpol.model.net import Family

#: Sets are named with their sides, flags with what is looked at; every other option has one value or none.
_TWO_VALUES = ("--match-set", "--map-set", "--tcp-flags")
_NO_VALUE = ("--map-mark",)
#: MASQUERADE of IPv4 is built without its one range; no kernel with xt_ipvs was there to try it on.
_BY_THE_TOOL = ("MASQUERADE", "ipvs")
_PROTOCOL_NUMBERS = {PROTOCOL_WORDS[p]: number for p, number in PROTOCOL_NUMBERS.items()}


class CannotBuildError(Exception):
    """python-iptables cannot say this; iptables-restore can."""


@dataclass(frozen=True, slots=True)
class Library:
    """What is used of python-iptables."""

    tables: Mapping[Family, Any]
    rules: Mapping[Family, Callable[[Any], Any]]
    match: Callable[[Any, str], Any]
    target: Callable[..., Any]
    errors: tuple[type[Exception], ...]


@cache
def library() -> Library:
    """Load python-iptables and repair it, once.

    Raises:
        KernelMissingError: it, or libip4tc, libip6tc or libxtables, is not installed.
    """
    try:
        import iptc
        from iptc import ip4tc
        from iptc.xtables import XTablesError
    except Exception as e:  # its own loader raises what it pleases
        raise KernelMissingError(
            "loading python-iptables", needed="iptables with its shared libraries", got=str(e)
        ) from e
    for kind in (ip4tc.Match, ip4tc.Target):
        kind.reset = _keeping_udata(kind.reset)
    # ValueError and AttributeError are how it refuses a parameter's value or name.
    errors = (ip4tc.IPTCError, XTablesError, ValueError, AttributeError)
    return Library(
        tables={Family.V4: iptc.Table, Family.V6: iptc.Table6},
        rules={Family.V4: _one_table(iptc.Rule), Family.V6: _one_table(iptc.Rule6)},
        match=ip4tc.Match,
        target=ip4tc.Target,
        errors=errors,
    )


def _keeping_udata(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """Have reset() give the C module scratch memory that lives as long as the object."""

    def repaired(self: Any) -> None:
        reset(self)
        size = getattr(self._module, "udata_size", 0)
        if size:
            self._udata_kept = (ctypes.c_ubyte * size)()
            self._module.udata = ctypes.cast(self._udata_kept, ctypes.c_void_p)

    return repaired


def _one_table(kind: Any) -> Callable[[Any], Any]:
    """Rules that look for a chain in the one table they are made for."""

    class OneTableRule(kind):  # type: ignore[misc]
        def __init__(self, table: Any) -> None:
            self._one_table = table
            super().__init__()

        @property
        def tables(self) -> list[Any]:
            return [self._one_table]

    return OneTableRule


def build_rule(table: Any, family: Family, words: list[str]) -> Any:
    """Build a rule from its words (`rule_text.rule_words`).

    Raises:
        CannotBuildError: a form that python-iptables garbles.
        one of Library.errors: a refusal.
    """
    lib = library()
    rule = lib.rules[family](table)
    rest = iter(words)
    extension: Any = None
    negate = False
    for word in rest:
        if word == "!":
            negate = True
            continue
        mark = "!" if negate else ""
        match word:
            case "-s":
                rule.src = mark + next(rest)
            case "-d":
                rule.dst = mark + next(rest)
            case "-i":
                rule.in_interface = next(rest)
            case "-p":
                # By number: names differ between the library's versions.
                rule.protocol = str(_PROTOCOL_NUMBERS[next(rest)])
            case "-m":
                name = next(rest)
                _refuse_by_name(name)
                extension = lib.match(rule, name)
                rule.add_match(extension)
            case "-j" | "-g":
                name = next(rest)
                _refuse_by_name(name)
                if name.startswith(OWN_PREFIX) and not table.is_chain(name):
                    raise lib.errors[0](f"chain {name} does not exist")
                # Before `rule.target` so that the flag lands in this rule's entry.
                extension = lib.target(rule, name, goto=word == "-g")
                rule.target = extension
            case _:
                _set_parameter(extension, word, rest, negate=negate)
        negate = False
    return rule


def _refuse_by_name(name: str) -> None:
    if name in _BY_THE_TOOL:
        raise CannotBuildError(name)


def _set_parameter(extension: Any, word: str, rest: Iterator[str], *, negate: bool) -> None:
    if word in _NO_VALUE:
        values: list[str] = [""]
    else:
        values = [next(rest) for _ in range(2 if word in _TWO_VALUES else 1)]
    if values[0] == "!":
        raise CannotBuildError(word)  # read as a negation
    if negate:
        values.insert(0, "!")
    extension.set_parameter(word.removeprefix("--"), values)
