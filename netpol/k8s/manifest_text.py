"""Text of a manifest file to plain values (dict, list, str, int, float, bool, None), bounded.

Reads YAML as the Kubernetes tools do: YAML 1.1 scalars, dates stay text, keys that are not text are
written as JSON writes them (`on:` becomes "true", `1:` becomes "1"), merge keys work, no tags but those
of JSON. More lenient in one thing: a lone y or n is text, and so is 5e7 without a point, since that is
what other YAML writers mean by it. Everything is built straight from libyaml's events, so that no input
can cost more than the limits below say: aliases are counted by what they expand to, nesting and node
counts are bounded. Knows nothing of Kubernetes kinds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import yaml

from netpol.lib.errors import InputError

#: Largest file in bytes. etcd takes objects of 1.5 MB; this is a dump of ten thousand of pods.
FILE_MAX_BYTES = 64 << 20
#: Most values (scalars, lists, mappings) of one file.
NODES_MAX = 2_500_000
#: Most values that the aliases and merge keys of one file may stand for.
ALIAS_NODES_MAX = 100_000
#: Deepest nesting. The deepest field of the API that netpol reads lies at 12.
DEPTH_MAX = 64

_SPACE = re.compile(r"\s*")
_TAG = "tag:yaml.org,2002:"
_BOOLS = {
    **dict.fromkeys(("yes", "true", "on"), True),
    **dict.fromkeys(("no", "false", "off"), False),
}
_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_INT = re.compile(r"[-+]?(?:0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|[1-9][0-9_]*|0)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?)\Z"
    r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)
#: Longest digit string worth an int: more is text to everyone (and int() of it takes quadratic time).
_INT_MAX_CHARS = 64


class Document(NamedTuple):
    """One document of a file; `number` counts from 1 as they stand, empty ones included."""

    number: int
    value: Any


def decode_text(raw: bytes, where: str) -> str:
    """Decode a file's bytes.

    Raises:
        InputError: too large, or not UTF-8 text.
    """
    if len(raw) > FILE_MAX_BYTES:
        raise InputError(
            f"{where}: file is too large", needed=f"at most {FILE_MAX_BYTES >> 20} MB of manifests"
        )
    if b"\x00" in raw:
        raise InputError(f"{where}: binary file", needed="YAML or JSON text in UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{where}: binary file",
            needed="YAML or JSON text in UTF-8",
            got=f"byte 0x{raw[e.start]:02x} at offset {e.start}",
        ) from None


def documents(text: str, where: str) -> Iterator[Document]:
    """Parse all documents of a file, JSON or YAML.

    Raises:
        InputError: not YAML, or beyond the limits; the message names file, document and line.
    """
    if text.lstrip()[:1] == "{":
        values = _json(text)
        if values:
            yield from (Document(i, v) for i, v in enumerate(values, 1))
            return
    yield from _Builder(text, where).documents()


def _json(text: str) -> list[Any]:
    """The values of a file that is nothing but JSON objects, one after the other; else none."""
    try:
        found = [msgspec.json.decode(text)]
    except (msgspec.DecodeError, RecursionError, ValueError):
        # The YAML parser reads what is valid otherwise, and words the error of what is not.
        found = _json_stream(text)
    return found if _nodes_within(found) else []


def _json_stream(text: str) -> list[Any]:
    decoder, found, at = json.JSONDecoder(), [], 0
    try:
        while (start := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            value, at = decoder.raw_decode(text, start)
            found.append(value)
    except (RecursionError, ValueError):
        return []
    return found


def _nodes_within(value: Any) -> bool:
    """Whether a JSON value keeps to the limits of depth and count."""
    level, total = [value], 0
    for _ in range(DEPTH_MAX):
        total += len(level)
        if total > NODES_MAX:
            return False
        below: list[Any] = []
        for v in level:
            if isinstance(v, dict):
                below.extend(v.values())
            elif isinstance(v, list):
                below.extend(v)
        if not below:
            return True
        level = below
    return False


class _Open:
    """A list or mapping that is being read."""

    __slots__ = ("anchor", "key", "mapping", "merges", "nodes", "value")

    def __init__(self, value: dict[str, Any] | list[Any], anchor: str | None) -> None:
        self.value = value
        self.mapping = isinstance(value, dict)
        self.anchor = anchor
        self.key: Any = _NO_KEY
        self.merges: list[dict[str, Any]] = []
        self.nodes = 1


_NO_KEY = object()
_MERGE = object()


class _Builder:
    """Builds values out of the event stream of one file."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where
        self._number = 0
        self._nodes = 0
        self._alias_nodes = 0
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._stack: list[_Open] = []

    def _fail(self, what: str, event: Any = None, *, needed: str = "", got: str = "") -> InputError:
        line = f" line {event.start_mark.line + 1}:" if event is not None else ""
        return InputError(
            f"{self._where}: document {max(self._number, 1)}:{line} {what}", needed=needed, got=got
        )

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order."""
        root: Any = None
        parser: Any = yaml.CLoader(self._text)
        try:
            while (event := parser.get_event()) is not None:
                kind = type(event)
                if kind is yaml.DocumentStartEvent:
                    self._number += 1
                    self._anchors.clear()
                    root = None
                elif kind is yaml.DocumentEndEvent:
                    yield Document(self._number, root)
                elif kind is yaml.StreamStartEvent or kind is yaml.StreamEndEvent:
                    pass
                else:
                    done, value = self._event(event, kind)
                    if done:
                        root = value
        except yaml.YAMLError as e:
            raise self._syntax(e) from None
        finally:
            parser.dispose()

    def _syntax(self, e: yaml.YAMLError) -> InputError:
        mark = getattr(e, "problem_mark", None)
        problem = getattr(e, "problem", None) or getattr(e, "reason", None) or "not YAML"
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        return InputError(
            f"{self._where}: document {max(self._number, 1)}: {line}not YAML: {problem}",
            needed="a YAML or JSON manifest",
        )

    def _event(self, event: Any, kind: type) -> tuple[bool, Any]:
        """Take one event; (True, value) when it completes the document's root."""
        if kind is yaml.ScalarEvent:
            self._count(event, 1)
            value = self._scalar(event)
            if event.anchor:
                self._anchors[event.anchor] = (value, 1)
            return self._place(event, value, 1, plain=event.implicit[0])
        if kind is yaml.AliasEvent:
            return self._alias(event)
        if kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            self._open(event, mapping=kind is yaml.MappingStartEvent)
            return False, None
        return self._close(event)

    def _count(self, event: Any, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > NODES_MAX:
            raise self._fail("too many values in one file", event, needed=f"at most {NODES_MAX}")

    def _alias(self, event: Any) -> tuple[bool, Any]:
        if any(o.anchor == event.anchor for o in self._stack):
            raise self._fail(f"alias *{event.anchor} stands inside what it names", event)
        if event.anchor not in self._anchors:
            raise self._fail(f"alias *{event.anchor} names no anchor", event)
        value, nodes = self._anchors[event.anchor]
        self._alias_nodes += nodes
        if self._alias_nodes > ALIAS_NODES_MAX:
            raise self._fail(
                "aliases expand to too many values", event, needed=f"at most {ALIAS_NODES_MAX}"
            )
        return self._place(event, value, nodes, plain=False)

    def _open(self, event: Any, *, mapping: bool) -> None:
        self._count(event, 1)
        if len(self._stack) >= DEPTH_MAX:
            raise self._fail("nested too deeply", event, needed=f"at most {DEPTH_MAX} levels")
        if event.tag not in (None, "!", _TAG + ("map" if mapping else "seq")):
            raise self._fail(f"tag {_short(event.tag)} is not allowed", event, needed="plain YAML")
        if self._stack and self._stack[-1].mapping and self._stack[-1].key is _NO_KEY:
            raise self._fail("a list or mapping as a key", event, needed="a text key")
        self._stack.append(_Open({} if mapping else [], event.anchor))

    def _close(self, event: Any) -> tuple[bool, Any]:
        done = self._stack.pop()
        if done.merges and isinstance(done.value, dict):
            for source in done.merges:
                for k, v in source.items():
                    done.value.setdefault(k, v)
        if done.anchor:
            self._anchors[done.anchor] = (done.value, done.nodes)
        return self._place(event, done.value, done.nodes, plain=False)

    def _place(self, event: Any, value: Any, nodes: int, *, plain: bool) -> tuple[bool, Any]:
        """Put a finished value into what is open."""
        if not self._stack:
            return True, value
        top = self._stack[-1]
        top.nodes += nodes
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key is _NO_KEY:
            top.key = _MERGE if plain and event.value == "<<" else self._key(event, value)
        elif top.key is _MERGE:
            top.merges.extend(self._merge(event, value))
            top.key = _NO_KEY
        else:
            top.value[top.key] = value
            top.key = _NO_KEY
        return False, None

    def _merge(self, event: Any, value: Any) -> list[dict[str, Any]]:
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(s, dict) for s in sources):
            raise self._fail("merge key << without a mapping", event, needed="<<: *ANCHOR")
        return sources

    def _key(self, event: Any, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            return str(value)
        raise self._fail("a key that is not text", event, needed="a text key")

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        tag = event.tag
        if tag is None:
            return resolve(text) if event.implicit[0] else text
        if tag == "!" or tag == _TAG + "str":
            return text
        value = resolve(text)
        name = tag.removeprefix(_TAG)
        kinds: dict[str, type | tuple[type, ...]] = {
            "int": int,
            "float": (int, float),
            "bool": bool,
            "null": type(None),
        }
        if tag.startswith(_TAG) and name in kinds:
            if isinstance(value, kinds[name]):
                return value
            raise self._fail(f"not a value of !!{name}", event, got=_short(text))
        raise self._fail(f"tag {_short(tag)} is not allowed", event, needed="plain YAML")


def resolve(text: str) -> Any:
    """What a plain scalar means (YAML 1.1 as the Kubernetes tools read it)."""
    if text in _NULLS:
        return None
    first = text[0]
    if first in "yYnNtTfFoO" and 2 <= len(text) <= 5:
        low = text.lower()
        if low in _BOOLS and text in (low, low.capitalize(), low.upper()):
            return _BOOLS[low]
        return text
    if first in "0123456789+-.":
        if len(text) <= _INT_MAX_CHARS and _INT.match(text):
            return _integer(text.replace("_", ""))
        if len(text) <= _INT_MAX_CHARS and _FLOAT.match(text):
            return _float(text.replace("_", "").lower())
    return text


def _integer(text: str) -> Any:
    sign = -1 if text[0] == "-" else 1
    digits = text.lstrip("+-")
    try:
        if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
            return sign * int(digits, 8)
        return sign * int(digits, 0)
    except ValueError:
        return text


def _float(text: str) -> Any:
    try:
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
