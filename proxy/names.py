"""The names and kinds of the proxy's ipsets.

Owns nothing but names: what stands in a set says `proxy.lower`, what a set means to packets `proxy.rules`.
All of them begin with `KNP-SVC-`, which no name of policy does.
"""

from __future__ import annotations

from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import SetKind, SetSpec

#: What sets and chains of the proxy begin with.
PREFIX = "KNP-SVC-"


def _pair(word: str, kind: SetKind, *, marks: bool = False) -> dict[Family, SetSpec]:
    return {f: SetSpec(SetName(f"{PREFIX}{word}{f.value}"), kind, f, marks) for f in FAMILIES}


#: Addresses on our dummy link.
VIP = _pair("VIP", SetKind.HASH_IP)
#: What may be dialled on them.
PORT = _pair("PORT", SetKind.HASH_IP_PORT)
#: What external clients get no answer from: a Local policy, with endpoints on other nodes only.
DROP = _pair("DROP", SetKind.HASH_IP_PORT)
#: What has no endpoint anywhere, and is refused.
REJECT = _pair("REJECT", SetKind.HASH_IP_PORT)
#: What only some sources may dial, and these sources.
LB = _pair("LB", SetKind.HASH_IP_PORT)
SRC = _pair("SRC", SetKind.HASH_IP_PORT_NET)
#: What pods of this node and the node itself dial by a packet mark.
MARK = _pair("MARK", SetKind.HASH_IP_PORT, marks=True)
#: Pod ranges of this node.
POD = _pair("POD", SetKind.HASH_NET)

#: All of them.
SPECS: dict[SetName, SetSpec] = {
    spec.name: spec
    for pair in (VIP, PORT, DROP, REJECT, LB, SRC, MARK, POD)
    for spec in pair.values()
}
