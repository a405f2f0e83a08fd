"""What `explain` says of the way: whether this node's routes lead to the pods that policy lets it reach.

Only where the question is about pods of the node that it is asked on, and its agent has the routes room:
nobody else knows. Policy's verdict does not change by it.
"""

from __future__ import annotations

from collections.abc import Sequence

from netpol.admin import client
from netpol.ctl.judge import Finding
from netpol.lib.errors import NetpolError
from netpol.model.net import format_address

#: A healthy agent answers in milliseconds; without one nobody wants to wait.
_TIMEOUT_S = 2.0
#: More destinations than these are asked about by nobody.
_ASKED_MAX = 8


def route_notes(socket: str, found: Sequence[Finding]) -> tuple[str, ...]:
    """Destinations on other nodes that this node has no way to, each once."""
    wanted = dict.fromkeys(
        (f.src.party.node, f.dst.party.address, f.dst.party.node)
        for f in found
        if f.dst.pod is not None and f.src.party.node and f.src.party.node != f.dst.party.node
    )
    out = []
    for source, address, target in list(wanted)[:_ASKED_MAX]:
        text = format_address(address)
        try:
            answer = client.call(socket, "routes", timeout_s=_TIMEOUT_S, address=text)
        except NetpolError:
            return ()  # no agent here, or one without routes
        if not isinstance(answer, dict) or answer.get("node") != source:
            return ()  # another node's agent knows nothing of this one
        where = str(answer.get("where"))
        if answer.get("learnt") is None:
            out.append(f"node {source} has learnt no route to {text} (node {target})")
        elif where.startswith("nowhere"):
            out.append(f"node {source} has a route to {text} (node {target}) that leads {where}")
        elif answer.get("by") != "bird":
            out.append(
                f"node {source} sends packets to {text} (node {target}) another way than BGP says: "
                f"{answer.get('prefix')} {where}"
            )
    return tuple(out)
