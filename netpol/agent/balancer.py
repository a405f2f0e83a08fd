"""What gives LoadBalancer Services their addresses, as an agent has it: the controller and its contender."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection

from netpol.aio.clock import Clock
from netpol.config import Settings
from netpol.k8s.api import Api
from netpol.k8s.cache import Store
from netpol.k8s.lease import Elector
from netpol.model.objects import Service
from netpol.model.pools import parse_range
from proxy.lbcontroller import LEASE_NAME, LEASE_NAMESPACE, LoadBalancerController


def make_balancer(
    settings: Settings,
    api: Api,
    store: Store[Service],
    *,
    machines: Callable[[], Collection[bytes]],
    told: Callable[[], None],
    clock: Clock,
) -> LoadBalancerController:
    """The controller of this agent; one of the cluster's leads."""

    def elector(changed: Callable[[bool], None]) -> Elector:
        return Elector(
            api,
            namespace=LEASE_NAMESPACE,
            name=LEASE_NAME,
            # A process that is started again is another contender: the old one may still write.
            identity=f"{settings.node}_{uuid.uuid4()}",
            changed=changed,
            clock=clock,
        )

    return LoadBalancerController(
        api,
        store,
        pools=[parse_range(p) for p in settings.loadbalancer_pools],
        load_balancer_class=settings.loadbalancer_class,
        default_class=settings.loadbalancer_default_class,
        elector=elector,
        told=told,
        machines=machines,
        clock=clock,
    )
