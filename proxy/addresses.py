"""Addresses that no Service may take from outside, and whose they are. Pure.

Whoever may write a Service could otherwise take over traffic that is none of theirs: of a node, of the
API server, of another Service. ClusterIPs are the API server's to give, so only external addresses and
those of load balancers are asked about here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from netpol.model.net import Prefix, host_prefix, masked, parse_prefix

#: Says why an address is refused, None if it is not.
Refusal = Callable[[bytes], str | None]

#: Ranges that are no addresses of anybody in particular (RFC 1122 section 3.2.1.3, RFC 3927, RFC 4291,
#: RFC 5771), with what they are.
_SPECIAL: tuple[tuple[Prefix, str], ...] = tuple(
    (parse_prefix(text), what)
    for text, what in (
        ("0.0.0.0/8", "unspecified"),
        ("::/128", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("::1/128", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("fe80::/10", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("ff00::/8", "multicast"),
        ("255.255.255.255/32", "broadcast"),
    )
)


def special(address: bytes) -> str | None:
    """What an address is that cannot be anybody's, in words."""
    return next((f"it is {what}" for block, what in _SPECIAL if block.contains(address)), None)


class Forbidden:
    """Blocks that are somebody's, with the owners in words; a look-up costs one step for each length."""

    def __init__(self) -> None:
        self._owners: dict[Prefix, list[str]] = {}
        self._lengths: Counter[tuple[int, int]] = Counter()

    def add(self, block: Prefix, owner: str) -> None:
        """A block is somebody's; `owner` completes "it is ..." or "it lies in ..."."""
        owners = self._owners.setdefault(block, [])
        if not owners:
            self._lengths[len(block.address), block.length] += 1
        owners.append(owner)

    def add_host(self, address: bytes, owner: str) -> None:
        """An address is somebody's."""
        self.add(host_prefix(address), owner)

    def remove(self, block: Prefix, owner: str) -> None:
        """Take back what was added with the same words."""
        owners = self._owners[block]
        owners.remove(owner)
        if not owners:
            del self._owners[block]
            self._lengths[len(block.address), block.length] -= 1

    def why(self, address: bytes) -> str | None:
        """Why nobody may take an address: the owner in words, or None."""
        found = special(address)
        if found is not None:
            return found
        size = len(address)
        # The longest block says most: a node's address rather than the range that it lies in.
        for (width, length), count in sorted(self._lengths.items(), reverse=True):
            if width == size and count:
                owners = self._owners.get(masked(address, length))
                if owners:
                    verb = "it is" if length == size * 8 else "it lies in"
                    return f"{verb} {min(owners)}"
        return None

    def entries(self) -> list[tuple[Prefix, str]]:
        """All that was added."""
        return [(block, owner) for block, owners in self._owners.items() for owner in owners]
