"""Short stable names out of long structured ones.

Names of chains and sets are hashes over a *separated* encoding of their fields, so that
("team", "adeny") and ("teama", "deny") differ, and equal across restarts, so that counters survive.
"""

from __future__ import annotations

import base64
import hashlib


def digest(*fields: str, chars: int) -> str:
    """Hash fields to `chars` characters of lower-case base32 (5 bits each).

    Every field is preceded by its length, so no choice of contents makes two field lists encode alike.
    """
    h = hashlib.sha256()
    for field in fields:
        raw = field.encode()
        h.update(b"%d:" % len(raw))
        h.update(raw)
    return base64.b32encode(h.digest()).decode("ascii").lower()[:chars]
