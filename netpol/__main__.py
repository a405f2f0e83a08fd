"""`netpol-agent`, also `python -m netpol`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the agent; returns the exit code (2 for settings, 3 for a machine that cannot)."""
    from netpol.agent import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
