"""`netpol-bird`: BIRD in a container of its own, beside the agent's, so that a new agent ends no session.

Waits for the configuration that the agent writes, then becomes BIRD. Whether it takes over routes of a former
one is decided here, since only here it starts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from netpol.kernel.routes import bird_routes
from netpol.lib.errors import NetpolError
from routes.bird.daemon import Folder, command

_LOOK_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Wait, then be BIRD; returns only when it cannot."""
    parser = argparse.ArgumentParser(prog="netpol-bird", description=__doc__)
    parser.add_argument(
        "--run-dir", default="/run/netpol", metavar="DIR", help="run-dir of the agent"
    )
    parser.add_argument("--user", default="bird", metavar="NAME", help="whom BIRD runs as")
    args = parser.parse_args(argv)
    folder = Folder(Path(args.run_dir) / "bird")
    try:
        return become_bird(folder, user=args.user)
    except NetpolError as e:
        print(f"netpol-bird: {e}", file=sys.stderr)  # noqa: T201
        return e.exit_code
    except OSError as e:
        print(f"netpol-bird: {e}", file=sys.stderr)  # noqa: T201
        return 3


def become_bird(
    folder: Folder,
    *,
    user: str,
    has_routes: Callable[[], bool] = lambda: bool(bird_routes()),
    execute: Callable[[str, list[str]], int] = os.execvp,
) -> int:
    """Wait for the configuration, then run BIRD in this process."""
    while not folder.config.exists():
        time.sleep(_LOOK_S)
    words = command("bird", folder, user=user, recover=has_routes())
    return execute("bird", [*words, "-f"])


if __name__ == "__main__":
    sys.exit(main())
