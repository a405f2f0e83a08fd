"""Where the API server is and how to show who we are: in-cluster, kubeconfig, or told explicitly.

Owns the making of `kubernetes.aio` Configurations and the re-reading of token files. Projected
ServiceAccount tokens live about an hour and are replaced on disk, so a token is never kept for long.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, load_kube_config
from kubernetes.aio.config.incluster_config import (
    SERVICE_CERT_FILENAME,
    SERVICE_TOKEN_FILENAME,
    InClusterConfigLoader,
)

from netpol.aio.clock import Clock
from netpol.k8s.errors import ApiError
from netpol.lib.errors import InputError

#: How long a token read from a file is used; kubelet replaces it long before it expires.
TOKEN_PERIOD_S = 60.0


class TokenFile:
    """A bearer token in a file, read again after `TOKEN_PERIOD_S` or when the server refused it."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._read_at = float("-inf")

    def expire(self) -> None:
        """Read the file again before the next request."""
        self._read_at = float("-inf")

    def refresh(self, configuration: Any) -> None:
        """Put the current token into a Configuration (the signature is its hook's)."""
        now = self._clock.monotonic()
        if now - self._read_at < TOKEN_PERIOD_S:
            return
        try:
            token = self._path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ApiError(f"token file {self._path} cannot be read", message=str(e)) from e
        if not token or not token.isprintable():
            raise ApiError(f"token file {self._path} holds no token")
        configuration.api_key["BearerToken"] = f"Bearer {token}"
        self._read_at = now


class Found(NamedTuple):
    """A Configuration of the client library, and its token file if it has one."""

    configuration: Any
    token: TokenFile | None


def explicit(
    url: str,
    *,
    clock: Clock,
    token: str = "",
    token_file: Path | None = None,
    ca_file: Path | None = None,
    verify: bool = True,
) -> Found:
    """Make a Configuration for a server given by its URL."""
    configuration = Configuration(host=url.rstrip("/"))
    if ca_file is not None:
        if not ca_file.is_file():
            raise InputError("the API server's CA", needed="a file", got=str(ca_file))
        configuration.ssl_ca_cert = str(ca_file)
    configuration.verify_ssl = verify
    if token_file is not None:
        return Found(configuration, _attach(configuration, token_file, clock))
    if token:
        configuration.api_key["BearerToken"] = f"Bearer {token}"
    return Found(configuration, None)


def in_cluster(
    *,
    clock: Clock,
    token_file: Path = Path(SERVICE_TOKEN_FILENAME),
    ca_file: Path = Path(SERVICE_CERT_FILENAME),
    environ: dict[str, str] | None = None,
) -> Found:
    """Make a Configuration from what kubelet gives to every pod.

    Raises:
        InputError: this is no pod, or its token or CA is missing.
    """
    configuration = Configuration()
    loader = InClusterConfigLoader(
        token_filename=str(token_file),
        cert_filename=str(ca_file),
        environ=os.environ if environ is None else environ,
    )
    try:
        loader.load_and_set(configuration)
    except (ConfigException, OSError) as e:
        raise InputError("in-cluster API configuration", needed="a pod's", got=str(e)) from e
    return Found(configuration, _attach(configuration, token_file, clock))


async def kubeconfig(path: Path | None = None, *, context: str = "") -> Found:
    """Make a Configuration from a kubeconfig file (default: KUBECONFIG or ~/.kube/config).

    Raises:
        InputError: it cannot be read, or lacks what the context needs.
    """
    configuration = Configuration()
    try:
        await load_kube_config(
            config_file=str(path) if path else None,
            context=context or None,
            client_configuration=configuration,
            persist_config=False,
        )
    except Exception as e:  # the loader lets whatever a malformed file causes pass through
        shown = str(path) if path else "the default kubeconfig"
        raise InputError(f"kubeconfig {shown} cannot be used", got=str(e)) from e
    return Found(configuration, None)


def _attach(configuration: Any, token_file: Path, clock: Clock) -> TokenFile:
    source = TokenFile(token_file, clock=clock)
    configuration.refresh_api_key_hook = source.refresh
    configuration.api_key.setdefault("BearerToken", "")  # the hook is asked only if there is a key
    return source
