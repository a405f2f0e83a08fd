"""The API server of a lab, whichever it is: what the supervisor asks of it, and the embedded one's answers.

The other one is `realapi`. Everything else of a lab is the same on both.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

from netpol.lab import spaces
from netpol.lab.apiserver import ADMIN, ApiServer
from netpol.lab.objectstore import ObjectStore
from netpol.lab.plan import API_PORT, LabPlan
from netpol.lab.podexec import PodCommands

Obj = dict[str, Any]


class LabApi(Protocol):
    """An API server for kubectl at the machine's loopback, and for agents on the lab's wire."""

    @property
    def store(self) -> ObjectStore:
        """The cluster's objects; of a real server only once it was started."""

    @property
    def program(self) -> str:
        """The program that serves, "" where it is this process."""

    @property
    def url(self) -> str:
        """Where kubectl finds it."""

    async def start(self) -> None:
        """Serve; the network of the lab stands already.

        Raises:
            NetpolError: It does not come up.
        """

    def kubeconfig(self, path: Path) -> None:
        """Write the admin's kubeconfig."""

    async def token_for(self, namespace: str, account: str) -> str:
        """Return a token of a ServiceAccount."""

    def parts(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what must run as long as it serves."""

    async def horizon(self, version: int) -> Callable[[Obj], int]:
        """Return which version a watch must have seen to know all that is stored at `version`.

        The answer takes the line of a watch in an agent's status.
        """

    async def close(self) -> None:
        """End connections; processes are `lab down`'s."""


class EmbeddedApi:
    """The API server in this process."""

    def __init__(self, plan: LabPlan, commands: PodCommands, token: str) -> None:
        self._plan = plan
        self._token = token
        self._server = ApiServer(
            tokens={token: ADMIN},
            exec_hook=commands.exec,
            log_hook=commands.logs,
            tls=True,
            service_cidrs=plan.service_cidrs,
        )

    @property
    def program(self) -> str:
        """Return "": it is this process."""
        return ""

    @property
    def store(self) -> ObjectStore:
        """The cluster's objects."""
        return self._server.store

    @property
    def url(self) -> str:
        """Where kubectl finds it."""
        return self._server.url

    async def start(self) -> None:
        """Listen on the machine's loopback for kubectl, and on the lab's own wire for the agents."""
        await self._server.start()
        for address in self._plan.switch_addresses:
            wire = spaces.listen(self._plan.switch_netns, address, API_PORT)
            await self._server.serve_socket(wire)

    def kubeconfig(self, path: Path) -> None:
        """Write the admin's kubeconfig."""
        self._server.kubeconfig(path, self._token)

    async def token_for(self, namespace: str, account: str) -> str:
        """Return a token of a ServiceAccount."""
        return self._server.token_for(namespace, account)

    def parts(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return nothing: it is served by this loop as it is."""
        return ()

    async def horizon(self, version: int) -> Callable[[Obj], int]:
        """Have every watch told the present version, which all of them must have seen."""
        self._server.store.bookmark_all()
        return lambda _: version

    async def close(self) -> None:
        """Do nothing: the process ends."""
