"""The wordings of faulty fields, and the checks of names and labels that all kinds share.

Owns how a `Cause` reads and the syntax of names, labels, ports and selectors.
"""

import json
import re
from typing import Any

from netpol.lab.apiserver.errors import Cause, Obj

PROTOCOLS = ("TCP", "UDP", "SCTP")
PORT_MAX = 65535
LABEL_MAX = 63  # RFC 1123
NAME_MAX = 253  # RFC 1123, as Kubernetes caps a subdomain
PORT_NAME_MAX = 15  # RFC 6335

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_PORT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def required(field: str, why: str = "") -> Cause:
    """Say that a field is missing."""
    return Cause(field, "FieldValueRequired", "Required value" + (f": {why}" if why else ""))


def wrong(field: str, value: Any, why: str) -> Cause:
    """Say that a value is not valid."""
    return Cause(field, "FieldValueInvalid", f"Invalid value: {json.dumps(value)}: {why}")


def unsupported(field: str, value: Any, supported: tuple[str, ...]) -> Cause:
    """Say that a value is none of those that there are."""
    known = ", ".join(f'"{one}"' for one in supported)
    text = f"Unsupported value: {json.dumps(value)}: supported values: {known}"
    return Cause(field, "FieldValueNotSupported", text)


def not_allowed(field: str, why: str) -> Cause:
    """Say that a field may not be set here."""
    return Cause(field, "FieldValueForbidden", f"Forbidden: {why}")


def duplicate(field: str, value: Any) -> Cause:
    """Say that a value stands there twice."""
    return Cause(field, "FieldValueDuplicate", f"Duplicate value: {json.dumps(value)}")


def dns_label(field: str, value: Any) -> list[Cause]:
    """Check an RFC 1123 label."""
    text = str(value)
    if len(text) > LABEL_MAX:
        return [wrong(field, value, f"must be no more than {LABEL_MAX} characters")]
    if not _DNS_LABEL.fullmatch(text):
        why = (
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', "
            "and must start and end with an alphanumeric character"
        )
        return [wrong(field, value, why)]
    return []


def dns_subdomain(field: str, value: Any) -> list[Cause]:
    """Check an RFC 1123 subdomain."""
    text = str(value)
    if len(text) > NAME_MAX:
        return [wrong(field, value, f"must be no more than {NAME_MAX} characters")]
    if not _DNS_SUBDOMAIN.fullmatch(text):
        why = (
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, "
            "'-' or '.', and must start and end with an alphanumeric character"
        )
        return [wrong(field, value, why)]
    return []


def path_segment(field: str, value: Any) -> list[Cause]:
    """Check a name that only has to fit into a URL."""
    text = str(value)
    if text in (".", "..") or "/" in text or "%" in text:
        return [wrong(field, value, "may not be '.' or '..' or contain '/' or '%'")]
    return []


def label_key(field: str, value: Any) -> list[Cause]:
    """Check the key of a label or an annotation."""
    prefix, slash, name = str(value).rpartition("/")
    causes = dns_subdomain(field, prefix) if slash else []
    if not name or len(name) > LABEL_MAX or not _QUALIFIED.fullmatch(name):
        why = (
            "name part must consist of alphanumeric characters, '-', '_' or '.', start and end "
            f"with an alphanumeric character, and have at most {LABEL_MAX} characters"
        )
        causes.append(wrong(field, value, why))
    return causes


def label_value(field: str, value: Any) -> list[Cause]:
    """Check the value of a label."""
    text = str(value)
    if len(text) > LABEL_MAX or (text and not _QUALIFIED.fullmatch(text)):
        why = (
            "a valid label must be an empty string or consist of alphanumeric characters, '-', "
            "'_' or '.', start and end with an alphanumeric character, and have at most "
            f"{LABEL_MAX} characters"
        )
        return [wrong(field, value, why)]
    return []


def labels(field: str, found: Any) -> list[Cause]:
    """Check a map of labels."""
    causes = []
    for key, value in (found or {}).items():
        causes += label_key(field, key) + label_value(field, value)
    return causes


def port_number(field: str, value: Any) -> list[Cause]:
    """Check a port number."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= PORT_MAX:
        return [wrong(field, value, f"must be between 1 and {PORT_MAX}, inclusive")]
    return []


def port_name(field: str, value: Any) -> list[Cause]:
    """Check an RFC 6335 service name."""
    text = str(value)
    if len(text) > PORT_NAME_MAX:
        return [wrong(field, value, f"must be no more than {PORT_NAME_MAX} characters")]
    if not _PORT_NAME.fullmatch(text) or "--" in text:
        why = "must contain only lower case letters, digits and single '-' inside"
        return [wrong(field, value, why)]
    if not any(char.isalpha() for char in text):
        return [wrong(field, value, "must contain at least one letter (a-z)")]
    return []


def port_or_name(field: str, value: Any) -> list[Cause]:
    """Check a port that may be a number or a name."""
    return port_name(field, value) if isinstance(value, str) else port_number(field, value)


def protocol(field: str, value: Any) -> list[Cause]:
    """Check a transport protocol."""
    if not value:
        return [required(field)]
    return [] if value in PROTOCOLS else [unsupported(field, value, PROTOCOLS)]


def selector(field: str, found: Obj) -> list[Cause]:
    """Check a LabelSelector."""
    causes = labels(f"{field}.matchLabels", found.get("matchLabels"))
    for place, term in enumerate(found.get("matchExpressions") or ()):
        where = f"{field}.matchExpressions[{place}]"
        operator, values = term.get("operator"), term.get("values")
        causes += label_key(f"{where}.key", term.get("key") or "")
        if operator in ("In", "NotIn"):
            if not values:
                why = "must be specified when `operator` is 'In' or 'NotIn'"
                causes.append(required(f"{where}.values", why))
            for at, value in enumerate(values or ()):
                causes += label_value(f"{where}.values[{at}]", value)
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
                causes.append(not_allowed(f"{where}.values", why))
        else:
            causes.append(wrong(f"{where}.operator", operator, "not a valid selector operator"))
    return causes
