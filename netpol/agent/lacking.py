"""What this machine lacks of what an agent with these settings needs."""

from __future__ import annotations

import structlog

from netpol.config import Settings
from netpol.kernel.drivers import Variant
from netpol.kernel.probe import missing_features
from netpol.lib.errors import KernelMissingError
from netpol.model.net import FAMILIES

_log = structlog.get_logger("netpol")


def refuse_lacking(settings: Settings, variant: Variant, *, rejects: bool) -> None:
    """Try for real what is needed; blocking.

    Args:
        settings: the agent's.
        variant: of iptables.
        rejects: whether denied packets are answered.

    Raises:
        KernelMissingError: neither family can work. Where one can, the rooms say what fails of the other.
    """
    missing = missing_features(variant, rejects=rejects)
    if settings.proxy:
        # Only here: without the proxy none of it is loaded.
        from netpol.agent import proxy_node

        more = proxy_node.missing_for_proxy(
            variant, mark_mask=settings.service_mask, scheduler=settings.ipvs_scheduler
        )
        for family, words in more.items():
            missing.setdefault(family, []).extend(words)
    if set(missing) == set(FAMILIES):
        lacks = dict.fromkeys(words for found in missing.values() for words in found)
        raise KernelMissingError("this machine", needed="; ".join(lacks))
    for family, lacking in missing.items():
        _log.error("one family only", without=f"IPv{family}", needed="; ".join(lacking))
