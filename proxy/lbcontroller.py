"""The one process of the cluster that gives LoadBalancer Services their addresses.

Every agent contends for a Lease; the leader settles what `proxy.allocator` says and writes Services'
statuses. It writes only what is its own: Services of our class (class-less ones where configured, unless
another controller wrote their status), guarded by the resourceVersion that the decision was made from.

Before the first decision of a term the Services are listed anew, so that what the last leader wrote is
known whatever this node's watch has seen; what this one writes is taken into the store at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.runner import BoundedRunner
from netpol.aio.tasks import cancel
from netpol.k8s.api import Api
from netpol.k8s.cache import Change, Store
from netpol.k8s.decode import SERVICE, decode
from netpol.k8s.errors import ApiError
from netpol.k8s.lease import Elector
from netpol.k8s.listing import list_all
from netpol.model.ids import ObjectKey
from netpol.model.net import family_of, format_address, parse_address
from netpol.model.objects import Service
from netpol.model.pools import AddressRange
from proxy.allocator import Claim, Grant, settle
from proxy.rows import Refused

_log = structlog.get_logger(__name__)

LEASE_NAMESPACE, LEASE_NAME = "kube-system", "netpol-loadbalancer"
#: Addresses that a Service asks for, separated by commas.
ADDRESSES_ANNOTATION = "netpol.io/loadbalancer-ips"
#: Statuses written at once. Each is a small request; an API server of a small cluster takes some hundred
#: a second.
_AT_ONCE = 16
#: One status. Less than the time between a leader's last renewal and the end of its Lease.
_WRITE_TIMEOUT_S = 4.0
RETRY_S, RETRY_MAX_S = 1.0, 30.0


class LoadBalancerController:
    """Allocates while this process leads.

    Args:
        store: the cluster's Services, which somebody watches; `changed` must be subscribed to it.
        told: called when the faults of some Service changed.
        machines: tells addresses of nodes and routers, which must not be given.
    """

    def __init__(
        self,
        api: Api,
        store: Store[Service],
        *,
        pools: Sequence[AddressRange],
        load_balancer_class: str,
        default_class: bool,
        elector: Callable[[Callable[[bool], None]], Elector],
        told: Callable[[], None] = lambda: None,
        machines: Callable[[], Collection[bytes]] = tuple,
        clock: Clock | None = None,
    ) -> None:
        self._machines = machines
        self._api, self._store, self._pools = api, store, pools
        self._class, self._default_class = load_balancer_class, default_class
        self._told = told
        self.elector = elector(self._leading)
        self._listed = False
        self._written: dict[ObjectKey, str] = {}
        self.faults: dict[ObjectKey, tuple[Refused, ...]] = {}
        self.writes = 0
        self._runner = BoundedRunner(
            self._settle, retry_s=RETRY_S, max_s=RETRY_MAX_S, clock=clock or SystemClock()
        )

    def changed(self, change: Change[Service]) -> None:
        """A Service changed; cheap where it has nothing to do with load balancers."""
        if any(s and _matters(s) for s in (change.before, change.after)):
            self._runner.mark()

    def _leading(self, leading: bool) -> None:  # noqa: FBT001 - a callback's only argument
        self._listed = False
        if leading:
            self._runner.mark()
        elif self.faults:
            self.faults = {}
            self._told()

    async def run_forever(self) -> None:
        """Contend and allocate until cancelled."""
        contending = asyncio.create_task(self.elector.run_forever(), name="lease")
        allocating = asyncio.create_task(self._runner.run_forever(), name="allocating")
        try:
            # Neither ends by itself; if one does, so does all of it, and the agent says so.
            ended, _ = await asyncio.wait(
                (contending, allocating), return_when=asyncio.FIRST_COMPLETED
            )
            for task in ended:
                task.result()
        finally:
            # Nothing is being written any more when the Lease is given back.
            await cancel(allocating)
            await cancel(contending)

    # -- one settling -----------------------------------------------------------------------

    async def _settle(self) -> None:
        if not self.elector.leading:
            return
        if not self._listed:
            for item in (await list_all(self._api, SERVICE)).items:
                self._store.put(item)
            await self._store.wait_synced()
            self._listed = True
        grants = settle(
            self._claims(),
            pools=self._pools,
            reserved=self._reserved(),
            machines=self._machines(),
        )
        faults = {key: grant.faults for key, grant in grants.items() if grant.faults}
        if faults != self.faults:
            self.faults = faults
            self._told()
        wanted = {key: grant.addresses for key, grant in grants.items()} | dict.fromkeys(
            self._left_over(), ()
        )
        todo = [
            (service, wanted[key])
            for key in wanted
            if (service := self._store.get(key)) is not None
            and set(wanted[key]) != {i.address for i in service.ingress}
        ]
        await self._write_all(todo)

    def _ours(self, service: Service) -> bool:
        if service.type != "LoadBalancer":
            return False
        if service.load_balancer_class:
            return service.load_balancer_class == self._class
        # Without a class, an address that we could not have given is some other controller's.
        return self._default_class and all(
            not i.hostname
            and not i.proxied
            and any(pool.contains(i.address) for pool in self._pools)
            for i in service.ingress
        )

    def _claims(self) -> Iterator[Claim]:
        for service in self._store:
            # One that is going keeps what it has until it is gone, and gets nothing new.
            if self._ours(service) and (service.ingress or not service.terminating):
                yield claim_of(service)

    def _reserved(self) -> dict[bytes, list[ObjectKey]]:
        out: dict[bytes, list[ObjectKey]] = {}
        for service in self._store:
            addresses = set(service.external_ips)
            if not self._ours(service):
                addresses |= {i.address for i in service.ingress if i.address}
            for address in addresses:
                out.setdefault(address, []).append(service.key)
        return out

    def _left_over(self) -> list[ObjectKey]:
        """Services that are no load balancers any more and still have what we gave them."""
        for key, uid in list(self._written.items()):
            service = self._store.get(key)
            if service is None or service.uid != uid or not service.ingress:
                del self._written[key]
        return [
            key
            for key in self._written
            if (service := self._store.get(key)) is not None and service.type != "LoadBalancer"
        ]

    # -- writing ----------------------------------------------------------------------------

    async def _write_all(self, todo: list[tuple[Service, tuple[bytes, ...]]]) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(service: Service, addresses: tuple[bytes, ...]) -> None:
            async with limit:
                await self._write(service, addresses)

        results = await asyncio.gather(*(one(*item) for item in todo), return_exceptions=True)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            _log.warning("status not written", services=len(errors), error=str(errors[0]))
            raise errors[0]

    async def _write(self, service: Service, addresses: tuple[bytes, ...]) -> None:
        key = service.key
        left_s = self.elector.left_s
        if left_s <= 0 or self._store.get(key) is not service:
            return  # another leader's matter; or there is news, which has asked for another run
        entries = [{"ip": format_address(a), "ipMode": "VIP"} for a in addresses]
        version = self._store.version(key)
        body = {
            "metadata": {"uid": service.uid, **({"resourceVersion": version} if version else {})},
            "status": {"loadBalancer": {"ingress": entries}},
        }
        path = SERVICE.path(key)
        try:
            async with asyncio.timeout(min(left_s, _WRITE_TIMEOUT_S)):
                raw = await self._api.patch(f"{path}/status", body)
        except ApiError as e:
            if e.status not in (404, 409):
                raise
            await self._reread(key, path)
            if (self._store.get(key), self._store.version(key)) == (service, version):
                raise  # nobody changed it: asked again at once, it would only be refused again
            self._runner.mark()
            return
        self.writes += 1
        self._written[key] = service.uid
        self._take(raw)
        _log.info(
            "addresses given", service=str(key), addresses=[format_address(a) for a in addresses]
        )

    async def _reread(self, key: ObjectKey, path: str) -> None:
        """Somebody changed it meanwhile: the next decision needs the object as it is."""
        try:
            self._take(await self._api.get(path))
        except ApiError as e:
            if e.status != 404:
                raise
            service = self._store.get(key)
            self._store.remove(key, uid=service.uid if service else "")

    def _take(self, raw: bytes) -> None:
        """Let the store know an object before the watch tells it: the next decision needs it."""
        self._store.put(decode(SERVICE, raw))

    def grant_of(self, service: Service) -> Grant:
        """What a Service has, for status."""
        return Grant(
            tuple(i.address for i in service.ingress if i.address),
            self.faults.get(service.key, ()),
        )


def _matters(service: Service) -> bool:
    """Whether a Service claims an address, has one, or uses one that somebody may ask for."""
    return service.type == "LoadBalancer" or bool(service.ingress or service.external_ips)


def claim_of(service: Service) -> Claim:
    """Read what a Service asks for and has."""
    text = dict(service.annotations).get(ADDRESSES_ANNOTATION, "") or service.requested_ip
    requested: list[bytes] = []
    unreadable: list[str] = []
    for word in (w.strip() for w in text.split(",")):
        if not word:
            continue
        try:
            requested.append(parse_address(word))
        except ValueError:
            unreadable.append(word)
    return Claim(
        key=service.key,
        created=service.created,
        families=tuple(dict.fromkeys(family_of(a) for a in service.cluster_ips)),
        requested=tuple(requested),
        held=tuple(dict.fromkeys(i.address for i in service.ingress if i.address)),
        unreadable=tuple(unreadable),
    )


def describe_faults(faults: dict[ObjectKey, tuple[Refused, ...]]) -> list[dict[str, Any]]:
    """The faults for the status document."""
    return [
        {"service": str(key), "reason": f.reason, "message": f.message}
        for key, found in sorted(faults.items())
        for f in found
    ]
