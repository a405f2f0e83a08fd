"""`netpol-ctl version`."""

from __future__ import annotations

import argparse

from netpol import __version__
from netpol.ctl.output import emit


def run(args: argparse.Namespace) -> int:
    """Print it."""
    emit({"version": __version__}, f"netpol-ctl {__version__}", form=args.output)
    return 0
