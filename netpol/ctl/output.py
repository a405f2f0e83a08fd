"""How answers and remarks reach the reader: text, JSON or YAML on stdout, remarks on stderr.

With JSON and YAML, stdout holds the document alone. No message is longer than MESSAGE_MAX_CHARS, and
none carries control characters out of somebody's manifest to the terminal.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

#: A message that needs more than this would hide what it says.
MESSAGE_MAX_CHARS = 1500
FORMATS = ("text", "json", "yaml")

_RED, _GREEN, _OFF = "\x1b[31m", "\x1b[32m", "\x1b[0m"


def emit(document: Any, text: str, *, form: str) -> None:
    """Print an answer in the form that was asked for."""
    if form == "json":
        write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    elif form == "yaml":
        write(to_yaml(document))
    else:
        write(text + "\n")


def write(text: str) -> None:
    """Print to stdout. A reader that went away does not change the exit code of the answer."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_yaml(document: Any) -> str:
    """YAML of plain values, keys in the order given, without aliases."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Never writes anchors: a reader should not have to look things up."""

        def ignore_aliases(self, data: Any) -> bool:
            """Write a value again instead of naming it."""
            return data is not None

    return yaml.dump(
        document, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def remark(text: str) -> None:
    """One line for the reader beside the answer (stderr)."""
    print(clip(text), file=sys.stderr)


def clip(text: str) -> str:
    """A message made fit for one line: bounded, printable."""
    flat = "".join(c if c.isprintable() else " " for c in text.replace("\n", " "))
    if len(flat) <= MESSAGE_MAX_CHARS:
        return flat
    half = (MESSAGE_MAX_CHARS - 5) // 2
    return f"{flat[:half]} ... {flat[-half:]}"


def word(verdict: str, *, upper: bool = False) -> str:
    """A verdict, coloured on a terminal."""
    shown = verdict.upper() if upper else verdict
    if not coloured():
        return shown
    return f"{_GREEN if verdict == 'allow' else _RED}{shown}{_OFF}"


def coloured() -> bool:
    """Whether stdout takes colour: a terminal, and nobody said no (NO_COLOR)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def plural(number: int, one: str, many: str = "") -> str:
    """`1 policy`, `2 policies`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def table(rows: list[list[str]], *, indent: str = "") -> list[str]:
    """Lines with aligned columns; the last column is not padded."""
    if not rows:
        return []
    columns = max(map(len, rows))
    widths = [max((len(r[i]) for r in rows if i < len(r) - 1), default=0) for i in range(columns)]
    return [
        indent
        + "  ".join(
            cell if i == len(row) - 1 else cell.ljust(widths[i]) for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]
