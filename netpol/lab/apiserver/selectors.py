"""Label and field selectors as they stand in a query string.

Owns parsing and matching. Which fields a kind can be selected by is the kind table's business.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from netpol.lab.apiserver.errors import bad_request

_SET = re.compile(r"^\s*(?P<key>[^\s,()!=]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)\s*$")
_COMPARE = re.compile(r"^\s*(?P<key>[^\s,()!=]+)\s*(?P<op>==|!=|=)\s*(?P<value>[^\s,()!=]*)\s*$")
_EXISTS = re.compile(r"^\s*(?P<bang>!?)\s*(?P<key>[^\s,()!=]+)\s*$")
_TOP_LEVEL_COMMA = re.compile(r",(?![^()]*\))")
_FIELD = re.compile(r"^(?P<key>[^=!]+)(?P<op>==|!=|=)(?P<value>.*)$")


class LabelTerm(NamedTuple):
    """One requirement; `values` is empty for the two existence operators."""

    key: str
    op: str
    values: frozenset[str]

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether the labels meet this requirement."""
        match self.op:
            case "in":
                return labels.get(self.key) in self.values
            case "notin":
                return self.key not in labels or labels[self.key] not in self.values
            case "exists":
                return self.key in labels
            case _:
                return self.key not in labels


class FieldTerm(NamedTuple):
    """One requirement on a field; `equal` is False for `!=`."""

    field: str
    equal: bool
    value: str


def matches_labels(terms: tuple[LabelTerm, ...], labels: Mapping[str, str]) -> bool:
    """Tell whether the labels meet every requirement."""
    return all(term.matches(labels) for term in terms)


@lru_cache(maxsize=1024)
def parse_labels(text: str) -> tuple[LabelTerm, ...]:
    """Parse a label selector.

    Raises:
        ApiError: 400 when the text is no selector.
    """
    if not text.strip():
        return ()
    return tuple(_label_term(part, text) for part in _TOP_LEVEL_COMMA.split(text))


def _label_term(part: str, whole: str) -> LabelTerm:
    if found := _SET.match(part):
        values = frozenset(value.strip() for value in found["values"].split(","))
        return LabelTerm(found["key"], found["op"], values)
    if found := _COMPARE.match(part):
        op = "notin" if found["op"] == "!=" else "in"
        return LabelTerm(found["key"], op, frozenset({found["value"]}))
    if found := _EXISTS.match(part):
        return LabelTerm(found["key"], "absent" if found["bang"] else "exists", frozenset())
    raise bad_request(f"unable to parse requirement: {part!r} in label selector {whole!r}")


@lru_cache(maxsize=1024)
def parse_fields(text: str) -> tuple[FieldTerm, ...]:
    """Parse a field selector; whether the fields are supported is checked elsewhere.

    Raises:
        ApiError: 400 when the text is no selector.
    """
    terms = []
    for part in text.split(","):
        if not part.strip():
            continue
        found = _FIELD.match(part.strip())
        if found is None:
            raise bad_request(f"invalid field selector: {text!r}; can't understand {part!r}")
        terms.append(FieldTerm(found["key"].strip(), found["op"] != "!=", found["value"]))
    return tuple(terms)


def field_text(obj: Mapping[str, Any], path: str) -> str:
    """Return the text that a field selector compares for the dotted path in an object."""
    value: Any = obj
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        return _DEFAULTS.get(path, "")
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


# An absent bool compares as its zero value.
_DEFAULTS = {"spec.hostNetwork": "false", "spec.unschedulable": "false"}
