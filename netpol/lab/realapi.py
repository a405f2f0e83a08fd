"""A real API server for a lab: etcd and kube-apiserver as processes on the lab's own wire.

Owns their command lines, files, start and early end, and the ways to them. Both stand in the switch's
namespace and listen on its loopback alone, so that nobody else on the machine meets etcd and `lab down`
finds them by name. kubectl comes through a relay at the machine's loopback, with TLS from end to end;
agents come as they come to the embedded server, by plain HTTP on the lab's wire.

What a cluster has besides, and the embedded server does by itself, runs beside it: the end of namespaces
(`namespaces`), and a kubelet that answers logs and exec (`nodeapi`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from netpol.kernel.netns import in_netns
from netpol.lab import processes, spaces
from netpol.lab.apiserver import ApiError, kubeconfig
from netpol.lab.apiserver.auth import ADMIN, MASTERS
from netpol.lab.apiserver.tls import Authority, Issued, make_signing_key, server_context
from netpol.lab.assets import API_SERVER_VARIABLE, ETCD_VARIABLE, Assets
from netpol.lab.namespaces import NamespaceController
from netpol.lab.nodeapi import NodeApi
from netpol.lab.plan import API_PORT, LabPlan
from netpol.lab.relay import Relay, Stream
from netpol.lab.remotestore import SERVER_NAME, RemoteStore
from netpol.lab.tide import Tide
from netpol.lib.errors import NetpolError, NoAnswerError

Obj = dict[str, Any]

_SECURE_PORT = 16443
_ETCD_PORT = 2379
_ETCD_PEER_PORT = 2380
_LOOPBACK = "127.0.0.1"
_POLL_S = 0.1
_NAMESPACES_TIMEOUT_S = 10.0
_TOKEN_LIFE_S = 365 * 24 * 3600
_ISSUER = "https://kubernetes.default.svc"
#: Namespaces that the server makes soon after it is ready, and the lab puts something in at once.
_OWN_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
#: Each waits for a controller that no lab runs: the maker of default accounts, the remover of the
#: not-ready taint, the remover of a finalizer.
_NO_ADMISSION = ("ServiceAccount", "TaintNodesByCondition", "StorageObjectInUseProtection")


class RealApi:
    """The API server of one lab.

    Args:
        plan: the lab.
        assets: the programs.
        node_api: what answers for the kubelets.
        token: the admin's.
        timeout_s: how long the start may take.
    """

    def __init__(
        self, plan: LabPlan, assets: Assets, *, node_api: NodeApi, token: str, timeout_s: float
    ) -> None:
        self._plan = plan
        self._assets = assets
        self._node_api = node_api
        self._token = token
        self._timeout_s = timeout_s
        self._authority = Authority()
        self._dir = plan.state_dir / "api"
        context = ssl.create_default_context(cadata=self._authority.ca_pem.decode())
        context.set_alpn_protocols(["http/1.1"])
        self._context = context
        self._servers: dict[str, asyncio.subprocess.Process] = {}
        self._relays = (Relay(self._raw), Relay(self._plain))
        self.url = ""
        self.program = assets.kube_apiserver
        self.store = RemoteStore(
            connect=self._connected,
            unconnected=lambda: in_netns(plan.switch_netns, _tcp_socket),
            port=_SECURE_PORT,
            context=context,
            token=token,
        )
        self._tide = Tide(self.store)

    # The start

    async def start(self) -> None:
        """Start both servers and wait until they serve what a lab needs.

        Raises:
            NetpolError: One ended, was not ready in time, or is too old.
        """
        await asyncio.to_thread(self._write_files)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._run("etcd", self._etcd_line())
                await self._run("kube-apiserver", self._api_line())
                await self._ready()
                await self._check_version()
                await self._await_namespaces()
        except TimeoutError:
            got = "; ".join(f"{name}: {_last_words(self._log(name))}" for name in self._servers)
            needed = f"ready within {self._timeout_s:g} s (--timeout-s)"
            raise NoAnswerError("the real API server", needed=needed, got=got) from None
        raw, plain = self._relays
        kubectl = socket.create_server((_LOOPBACK, 0))
        self.url = f"https://{_LOOPBACK}:{kubectl.getsockname()[1]}"
        await raw.serve(kubectl)
        for address in self._plan.switch_addresses:
            await plain.serve(spaces.listen(self._plan.switch_netns, address, API_PORT))
        await self._node_api.start(self._kubelet_context())

    def _write_files(self) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        addresses = (_LOOPBACK, *self._plan.switch_addresses)
        pairs = {
            "apiserver": self._authority.server("netpol-lab-apiserver", addresses),
            "kubelet-client": self._authority.client("netpol-lab-apiserver"),
        }
        for name, issued in pairs.items():
            processes.replace_text(self._dir / f"{name}.crt", issued.certificate.decode())
            processes.replace_text(self._dir / f"{name}.key", issued.key.decode())
        processes.replace_text(self._dir / "ca.crt", self._authority.ca_pem.decode())
        processes.replace_text(self._dir / "accounts.key", make_signing_key().decode())
        admin = f'{self._token},{ADMIN.name},{ADMIN.name},"{MASTERS}"\n'
        processes.replace_text(self._dir / "tokens.csv", admin)

    def _kubelet_context(self) -> ssl.SSLContext:
        addresses = tuple(address for node in self._plan.nodes for address in node.addresses)
        issued: Issued = self._authority.server("netpol-lab-kubelet", addresses)
        return server_context(issued, client_ca=self._authority.ca_pem)

    def _etcd_line(self) -> list[str]:
        clients = f"http://{_LOOPBACK}:{_ETCD_PORT}"
        peers = f"http://{_LOOPBACK}:{_ETCD_PEER_PORT}"
        return [
            self._assets.etcd,
            f"--data-dir={self._dir / 'etcd'}",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        ]

    def _api_line(self) -> list[str]:
        at = self._dir
        return [
            self._assets.kube_apiserver,
            f"--etcd-servers=http://{_LOOPBACK}:{_ETCD_PORT}",
            f"--bind-address={_LOOPBACK}",
            f"--secure-port={_SECURE_PORT}",
            f"--advertise-address={self._plan.switch_addresses[0]}",
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={at / 'apiserver.crt'}",
            f"--tls-private-key-file={at / 'apiserver.key'}",
            f"--client-ca-file={at / 'ca.crt'}",
            f"--token-auth-file={at / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            f"--service-cluster-ip-range={','.join(self._plan.service_cidrs)}",
            f"--service-account-issuer={_ISSUER}",
            f"--service-account-key-file={at / 'accounts.key'}",
            f"--service-account-signing-key-file={at / 'accounts.key'}",
            f"--kubelet-certificate-authority={at / 'ca.crt'}",
            f"--kubelet-client-certificate={at / 'kubelet-client.crt'}",
            f"--kubelet-client-key={at / 'kubelet-client.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--disable-admission-plugins={','.join(_NO_ADMISSION)}",
            "--allow-privileged=true",
        ]

    async def _run(self, name: str, line: list[str]) -> None:
        with self._log(name).open("ab") as log:
            try:
                # `ip netns exec` ends by exec: the pid is the server's.
                process = await asyncio.create_subprocess_exec(
                    *("ip", "netns", "exec", self._plan.switch_netns, *line),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._dir)},
                    cwd=self._dir,
                    start_new_session=True,
                )
            except OSError as error:
                raise NoAnswerError(f"{name} cannot be started", got=str(error)) from error
        processes.record(self._dir / f"{name}.process", process.pid)
        self._servers[name] = process

    def _log(self, name: str) -> Path:
        return self._dir / f"{name}.log"

    def _check_alive(self) -> None:
        for name, process in self._servers.items():
            if process.returncode is not None:
                raise self._ended(name, process.returncode)

    def _ended(self, name: str, code: int) -> NetpolError:
        variable = ETCD_VARIABLE if name == "etcd" else API_SERVER_VARIABLE
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        program = self._assets.etcd if name == "etcd" else self._assets.kube_apiserver
        return NoAnswerError(
            f"{name} ({variable}={program}) ended by {how}", got=_last_words(self._log(name))
        )

    async def _ready(self) -> None:
        while True:
            self._check_alive()
            try:
                await self.store.call("GET", "/readyz")
            except ApiError:
                await asyncio.sleep(_POLL_S)  # not up, or up and still starting its parts
            else:
                return

    async def _check_version(self) -> None:
        """Refuse a server without what the lab and the agents need."""
        try:
            await self.store.call("GET", "/apis/discovery.k8s.io/v1")
        except ApiError as error:
            if error.code != 404:
                raise NoAnswerError("the real API server", got=error.message) from error
            version = (await self.store.call("GET", "/version")).get("gitVersion")
            raise NoAnswerError(
                f"{API_SERVER_VARIABLE}={self._assets.kube_apiserver} is too old",
                needed="discovery.k8s.io/v1 (Kubernetes 1.21 and later)",
                got=str(version),
            ) from error

    async def _await_namespaces(self) -> None:
        for name in _OWN_NAMESPACES:
            while True:
                try:
                    await self.store.call("GET", f"/api/v1/namespaces/{name}")
                    break
                except ApiError:
                    self._check_alive()
                    await asyncio.sleep(_POLL_S)

    # The ways to it

    def _connected(self) -> socket.socket:
        def work() -> socket.socket:
            return socket.create_connection((_LOOPBACK, _SECURE_PORT), timeout=10)

        return in_netns(self._plan.switch_netns, work)

    async def _raw(self) -> Stream:
        return await self._dial(None)

    async def _plain(self) -> Stream:
        return await self._dial(self._context)

    async def _dial(self, context: ssl.SSLContext | None) -> Stream:
        sock = in_netns(self._plan.switch_netns, _tcp_socket)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (_LOOPBACK, _SECURE_PORT))
            name = SERVER_NAME if context else None
            return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=name)
        except OSError:
            sock.close()
            raise

    # What the lab asks

    def kubeconfig(self, path: Path) -> None:
        """Write the admin's kubeconfig."""
        kubeconfig.write(path, server=self.url, token=self._token, ca_pem=self._authority.ca_pem)

    async def token_for(self, namespace: str, account: str) -> str:
        """Return a token of a ServiceAccount."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": _TOKEN_LIFE_S},
        }
        try:
            return str((await self.store.call("POST", path, body=body))["status"]["token"])
        except ApiError as error:
            what = f"a token for the account {namespace}/{account}"
            raise NoAnswerError(what, got=error.message) from error

    def parts(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what must run as long as it serves."""
        servers = [self._mind(name, process) for name, process in self._servers.items()]
        return [*servers, NamespaceController(self.store).run(), self._tide.run()]

    async def _mind(self, name: str, process: asyncio.subprocess.Process) -> None:
        raise self._ended(name, await process.wait())

    async def horizon(self, version: int) -> Callable[[Obj], int]:
        """Return which version a watch must have seen to know all that is stored at `version`."""
        del version  # a real server tells a quiet watch nothing for a minute: each has its own
        return await self._tide.horizon()

    async def close(self) -> None:
        """End connections; the servers are `lab down`'s."""
        for relay in self._relays:
            await relay.close()
        await self._node_api.close()
        await self.store.close()


def _tcp_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def _last_words(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        lines = []
    return lines[-1][:500] if lines else "it printed nothing"
