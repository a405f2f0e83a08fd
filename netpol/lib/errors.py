"""The errors that netpol raises on purpose: few classes, each saying what, needed, got.

A room catches the class it can act on; the command line maps a class to its exit code
(2 for `InputError`, 3 for `NoAnswerError` and everything about the machine).
"""

from __future__ import annotations


class NetpolError(Exception):
    """Base of all deliberate errors.

    Args:
        what: the failed thing in one short clause.
        needed: what was expected instead, or "".
        got: what was found, or "".
    """

    exit_code = 3

    def __init__(self, what: str, *, needed: str = "", got: str = "") -> None:
        self.what, self.needed, self.got = what, needed, got
        parts = [what]
        if needed:
            parts.append(f"needed {needed}")
        if got:
            parts.append(f"got {got}")
        super().__init__("; ".join(parts))


class InputError(NetpolError):
    """Arguments, a setting or a manifest that cannot be used. Exit code 2."""

    exit_code = 2


class NoAnswerError(NetpolError):
    """The question is fine but nothing can answer it: no such object, no agent, not root."""


class KernelError(NetpolError):
    """The kernel, or a tool that speaks to it, refused a request."""


class KernelMissingError(KernelError):
    """The kernel or the machine lacks a feature, module or program that netpol needs."""


class ApiError(NetpolError):
    """The Kubernetes API answered with an error, or could not be reached."""
