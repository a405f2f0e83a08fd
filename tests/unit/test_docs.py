"""What the documentation names exists: files, headings, commands, flags, settings, metrics, make targets."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import numbers
from bench.__main__ import GROUPS
from netpol import config
from netpol.ctl import main as ctl
from netpol.lab import cli as lab
from tests.spec.policy.cases import ROWS

ROOT = Path(__file__).parents[2]
DOCS = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: Made by a command that the documentation names.
GENERATED = {"bench/results.json"}
#: Flags of other programs that stand alone in a sentence.
FOREIGN_FLAGS = {"--map-set", "--service-cluster-ip-range"}

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w./-])((?:bench|docs|manifests|netpol|scripts|tests)/[\w./-]*\w)")
_COMMAND = re.compile(r"(?:netpol-ctl|kubectl netpol) +([a-z]+)(?: +([a-z]+))?([^|#\n`]*)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_METRIC = re.compile(r"`(netpol_[a-z_]+?)(?:_total)?`")
_VARIABLE = re.compile(r"NETPOL_[A-Z_]*[A-Z]")
_READ_VARIABLE = re.compile(r"environ(?:ment)?(?:\.get\(|\[)\s*\"(NETPOL_[A-Z_]+)\"")
_LAST_RESORT_HOMES = re.compile(r"(?<![\w.<])/(?:home|root|tmp|Users)(?:/|\b)")

each_doc = pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))


def test_there_is_documentation() -> None:
    names = {str(p.relative_to(ROOT)) for p in DOCS}
    assert {"README.md", "docs/architecture.md", "docs/operations.md", "docs/cli.md"} <= names


# -- files and headings -------------------------------------------------------------------------


@each_doc
def test_links_lead_somewhere(doc: Path) -> None:
    broken = []
    for target in _LINK.findall(doc.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (doc.parent / name) if name else doc
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(target)
    assert not broken


def _anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as the usual renderers make them."""
    found = _HEADING.findall(path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in found}


@each_doc
def test_paths_of_the_repository_exist(doc: Path) -> None:
    named = set(_PATH.findall(doc.read_text(encoding="utf-8"))) - GENERATED
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@each_doc
def test_no_page_names_a_machine(doc: Path) -> None:
    lines = doc.read_text(encoding="utf-8").splitlines()
    assert not [x for x in lines if str(ROOT) in x or _LAST_RESORT_HOMES.search(x)]


@each_doc
def test_make_targets_exist(doc: Path) -> None:
    text = doc.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", text, re.MULTILINE))
    have = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert named <= have


# -- commands -----------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command as a page shows it: its words (lab verbs have two) and what follows."""

    words: tuple[str, ...]
    rest: str


@cache
def _parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every command of netpol-ctl by its words."""
    top = argparse.ArgumentParser()
    lab.add_parser(top.add_subparsers())
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    for name, parser in {**_children(ctl.parser()), **_children(top)}.items():
        found[(name,)] = parser
        found |= {(name, verb): inner for verb, inner in _children(parser).items()}
    return found


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: child for action in actions for name, child in action.choices.items()}


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    return {o for a in parser._actions for o in a.option_strings if o.startswith("--")}


def _commands(text: str) -> Iterator[Command]:
    for first, second, rest in _COMMAND.findall(text):
        if (first, second) in _parsers() or (first == "lab" and second):
            # What follows -- is another program's.
            yield Command((first, second), rest.partition(" -- ")[0])
        else:
            yield Command((first,), f"{second} {rest}")


@each_doc
def test_commands_exist(doc: Path) -> None:
    unknown = []
    for command in _commands(doc.read_text(encoding="utf-8")):
        parser = _parsers().get(command.words)
        known = _flags(parser) if parser else set()
        if parser is None or not set(_FLAG.findall(command.rest)) <= known:
            unknown.append(command)
    assert not unknown


def test_the_tables_of_commands_are_complete() -> None:
    """`netpol-ctl lab` is one row for all of its verbs."""
    wanted = {words[0] for words in _parsers()}
    readme = set(re.findall(r"^\| `netpol-ctl ([a-z]+)", _read("README.md"), re.MULTILINE))
    assert wanted - {"version"} == readme
    table = _read("docs/cli.md").partition("\n## ")[0]
    assert wanted == set(re.findall(r"^\| `([a-z]+)", table, re.MULTILINE))


@each_doc
def test_flags_in_sentences_exist(doc: Path) -> None:
    known = _flags(config.parser()).union(*map(_flags, _parsers().values())) | FOREIGN_FLAGS
    named = set(re.findall(r"`(--[a-z][a-z-]*)", doc.read_text(encoding="utf-8")))
    assert named <= known


# -- settings and metrics -----------------------------------------------------------------------


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _setting_rows(name: str) -> dict[str, str]:
    """Setting to default, from the table of a page's section Settings."""
    section = _read(name).split("\n## Settings\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([a-z-]+)` \| *([^|]*?) *\|", section, re.MULTILINE))


def _defaults() -> dict[str, str]:
    """Setting to default, as the tables write it; "" for none."""
    out = {}
    for field in fields(config.Settings):
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        out[field.name.replace("_", "-")] = f"`{value}`" if value not in ("", ()) else ""
    return out


def test_operations_lists_every_setting_with_its_default() -> None:
    assert {**_setting_rows("docs/operations.md"), "node": ""} == _defaults()


def test_settings_of_the_readme_are_true() -> None:
    rows = _setting_rows("README.md")
    assert rows
    wrong = {k: v for k, v in rows.items() if _defaults()[k] not in ("", v)}
    assert not wrong


@each_doc
def test_variables_exist(doc: Path) -> None:
    named = set(_VARIABLE.findall(doc.read_text(encoding="utf-8")))
    assert named <= _variables()


@cache
def _variables() -> set[str]:
    """The agent's settings, and what some module reads by name."""
    modules = [p for top in ("netpol", "bench", "tests") for p in (ROOT / top).rglob("*.py")]
    read = {
        name
        for module in modules
        for name in _READ_VARIABLE.findall(module.read_text(encoding="utf-8"))
    }
    return read | {f"NETPOL_{field.name.upper()}" for field in fields(config.Settings)}


def test_metrics_exist() -> None:
    agent = sorted((ROOT / "netpol" / "agent").glob("*.py"))
    source = "".join(module.read_text(encoding="utf-8") for module in agent)
    made = set(re.findall(r'(?:gauge|counter)\(\s*"([a-z_]+)"', source))
    named = {m.removeprefix("netpol_") for m in _METRIC.findall(_read("docs/operations.md"))}
    loose = {n for n in named if n.startswith(("watch_", "policy_", "process_"))}
    assert named - loose
    assert named - loose <= made


# -- figures ------------------------------------------------------------------------------------


def _results() -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in json.loads(_read("bench/results.json"))}


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    """`.venv/bin/python -m bench --readme` writes the table anew."""
    readme = _read("README.md")
    assert readme == numbers.renewed(readme, _results())


def test_every_figure_is_measured_and_explained() -> None:
    rows = {row for group in GROUPS.values() for row in group}
    assert set(_results()) == rows
    # Rows of legacy tables share a sentence.
    explained = {name for name in rows if not name.endswith(".legacy")}
    table = (
        _read("docs/benchmarks.md").split("\n## What each row measures\n")[1].partition("\n## ")[0]
    )
    named = [
        name
        for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    ]
    assert sorted(named) == sorted(explained)


# -- what pages promise -------------------------------------------------------------------------


def test_every_row_of_the_semantics_is_there_once_and_in_order() -> None:
    rows = re.findall(r"^\| (\d+[a-z]?) \|", _read("docs/semantics.md"), re.MULTILINE)
    assert sorted(rows) == sorted(ROWS)
    assert rows == sorted(rows, key=lambda r: (int(r.rstrip("ab")), r))


def test_every_decision_has_its_parts_and_is_linked() -> None:
    index = _read("docs/architecture.md")
    numbers = []
    for page in sorted((ROOT / "docs" / "adr").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        numbers.append(page.name[:4])
        assert text.startswith(f"# {page.name[:4]}: "), page.name
        parts = set(_HEADING.findall(text))
        assert {"Context", "Decision", "Consequences", "Rejected"} <= parts, page.name
        assert f"(adr/{page.name})" in index, page.name
    assert numbers
    assert len(numbers) == len(set(numbers))
