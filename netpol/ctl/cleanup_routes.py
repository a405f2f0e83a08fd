"""The routes' part of `netpol-ctl cleanup`: BIRD, its routes, the overlay's links, the files with passwords.

BIRD ends with a word to its peers, which take other ways at once. Its routes bear no mark but that of any
BIRD: they go only where one of ours has run since the boot, and no other one runs. The CNI's file stays: pods
that are there need it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from netpol.lib.errors import KernelMissingError, NetpolError, NoAnswerError
from routes.bird.control import BirdControl
from routes.bird.daemon import BirdDaemon, Folder

#: As the agent names it in its run folder.
FOLDER = "bird"
_DEATH_S, _TRY_S = 5.0, 0.05
_COMMS = ("bird", "bird6")


def clean_routes(run_dir: Path, left: list[str]) -> dict[str, int]:
    """Remove what the routes room made but rules and sets; how much. What stays is added to `left`."""
    removed = {"birds": 0, "routes": 0, "tunnels": 0}
    folder = Folder(run_dir / FOLDER)
    try:
        ours = any(p.exists() for p in (folder.config, folder.socket, folder.pid))
        removed["birds"] = int(asyncio.run(_end(folder)))
        if ours:
            removed["routes"] = _clean_kernel(left)
        removed["tunnels"] = _clean_links()
        _clean_files(folder)
    except KernelMissingError:
        return removed  # a kernel without such links has none of ours
    except (NetpolError, OSError) as e:
        left.append(f"routes: {e}")
    return removed


async def _end(folder: Folder) -> bool:
    """Tell BIRD to end; kill one that does not. Whether there was one."""
    daemon, control = BirdDaemon(folder), BirdControl(folder.socket, answer_s=_DEATH_S)
    try:
        await control.ask("down")
        answered = True
    except NoAnswerError:
        answered = False
    finally:
        await control.close()
    if not answered and daemon.running() is None:
        return False
    for _ in range(round(_DEATH_S / _TRY_S) if answered else 0):
        # Where it has a container of its own, its number means nothing here.
        if daemon.running() is None and not await daemon.answers(control):
            return True
        await asyncio.sleep(_TRY_S)
    await daemon.kill()
    return True


def _clean_kernel(left: list[str]) -> int:
    from netpol.kernel.routes import bird_routes, remove_bird_routes

    if not bird_routes():
        return 0
    others = _other_birds()
    if others:
        pids = ", ".join(map(str, others))
        left.append(f"routes of BIRD: another BIRD runs here (process {pids}), they may be its own")
        return 0
    return remove_bird_routes()


def _other_birds() -> list[int]:
    """BIRDs in this network namespace; ours has ended."""
    here = Path("/proc/thread-self/ns/net").stat().st_ino
    found = []
    for entry in Path("/proc").iterdir():
        try:
            same = entry.name.isdigit() and (entry / "comm").read_text().strip() in _COMMS
            if same and (entry / "ns/net").stat().st_ino == here:
                found.append(int(entry.name))
        except OSError:
            continue  # it ended
    return sorted(found)


def _clean_links() -> int:
    from netpol.kernel.overlay import OverlayState, apply_overlay
    from routes.overlay import LINK_PREFIXES

    return len(apply_overlay(OverlayState(), prefixes=LINK_PREFIXES, prune=True))


def _clean_files(folder: Folder) -> None:
    """Configurations hold passwords; a container that waits for one goes on waiting."""
    if not folder.path.is_dir():
        return
    for pattern in ("bird.*", "drain"):
        for path in folder.path.glob(pattern):
            path.unlink(missing_ok=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()
