"""Which API server to ask and how to prove who asks: kubeconfig files, or the pod's service account.

Standard library and the bounded YAML reader only: the `kubernetes` package would cost the command line
200 ms at every start.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol.k8s import manifest_text
from netpol.lib.errors import InputError, NoAnswerError

#: Where a pod finds its service account.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: A credential plugin that needs longer waits for a human.
EXEC_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Access:
    """An API server and the credentials for it."""

    server: str
    namespace: str
    tls: ssl.SSLContext | None
    headers: dict[str, str]


def named(path: str | None, *, context: str | None = None) -> Access | None:
    """The API server that the user names: --kubeconfig, else KUBECONFIG, else None.

    Raises:
        InputError: a kubeconfig that cannot be used.
        NoAnswerError: KUBECONFIG names no file.
    """
    if path:
        return _from_files([path], context)
    files = [p for p in os.environ.get("KUBECONFIG", "").split(os.pathsep) if p]
    if not files:
        return None
    there = [p for p in files if Path(p).exists()]
    if not there:
        raise NoAnswerError(f"KUBECONFIG names no file that exists: {files[0]}")
    return _from_files(there, context)


def found(*, context: str | None = None) -> Access:
    """The API server that is found without being named: the pod's service account, ~/.kube/config.

    Raises:
        InputError: a kubeconfig that cannot be used.
        NoAnswerError: there is none.
    """
    if os.environ.get("KUBERNETES_SERVICE_HOST") and (SERVICE_ACCOUNT / "token").exists():
        return _in_cluster()
    home = Path("~/.kube/config").expanduser()
    if home.exists():
        return _from_files([str(home)], context)
    raise NoAnswerError(
        "no cluster to ask",
        needed="-f MANIFESTS, an agent on this node, --kubeconfig FILE or KUBECONFIG",
    )


def default_namespace(path: str | None, *, context: str | None = None) -> str:
    """The namespace of the context in use; "default" where no kubeconfig says one."""
    try:
        return (named(path, context=context) or found(context=context)).namespace
    except NoAnswerError:
        return "default"


def _in_cluster() -> Access:
    host, port = (
        os.environ["KUBERNETES_SERVICE_HOST"],
        os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
    )
    shown = f"[{host}]" if ":" in host else host
    try:
        token = (SERVICE_ACCOUNT / "token").read_text(encoding="utf-8").strip()
        namespace = (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        tls = ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt"))
    except (OSError, ssl.SSLError) as e:
        raise NoAnswerError("the pod's service account cannot be read", got=str(e)) from e
    return Access(f"https://{shown}:{port}", namespace, tls, {"Authorization": f"Bearer {token}"})


def _from_files(paths: list[str], context: str | None) -> Access:
    merged: dict[str, dict[str, tuple[dict[str, Any], Path]]] = {}
    current = context or ""
    for path in paths:
        document = _read(path)
        current = current or _text(document, "current-context")
        for kind, single in (("clusters", "cluster"), ("users", "user"), ("contexts", "context")):
            for entry in document.get(kind) or ():
                if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                    value = entry.get(single)
                    held = value if isinstance(value, dict) else {}
                    merged.setdefault(kind, {}).setdefault(entry["name"], (held, Path(path).parent))
    where = paths[0]
    if not current:
        raise InputError(f"{where}: no current-context", needed="current-context, or --context")
    chosen = _entry(merged, "contexts", current, where)[0]
    cluster, cluster_base = _entry(merged, "clusters", _text(chosen, "cluster"), where)
    user: dict[str, Any] = {}
    user_base = cluster_base
    if _text(chosen, "user"):
        user, user_base = _entry(merged, "users", _text(chosen, "user"), where)
    server = _text(cluster, "server").rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise InputError(f"{where}: server of cluster", needed="an http(s) URL", got=repr(server))
    if isinstance(user.get("exec"), dict):
        user = {**user, **_exec(user["exec"])}
    try:
        tls = _tls(cluster, cluster_base, user, user_base) if server.startswith("https") else None
        headers = _headers(user, user_base)
    except (OSError, ssl.SSLError, binascii.Error, ValueError) as e:
        raise InputError(f"{where}: credentials cannot be used", got=str(e)) from e
    return Access(server, _text(chosen, "namespace") or "default", tls, headers)


def _read(path: str) -> dict[str, Any]:
    try:
        raw = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"kubeconfig {path} cannot be read", got=e.strerror or str(e)) from None
    for document in manifest_text.documents(manifest_text.decode_text(raw, path), path):
        if isinstance(document.value, dict):
            return document.value
        break
    raise InputError(f"kubeconfig {path}", needed="a mapping", got="something else")


def _entry(
    merged: dict[str, dict[str, tuple[dict[str, Any], Path]]], kind: str, name: str, where: str
) -> tuple[dict[str, Any], Path]:
    found = merged.get(kind, {}).get(name)
    if found is None:
        raise InputError(f"{where}: no {kind[:-1]} named {name!r}")
    return found


def _text(source: dict[str, Any], key: str) -> str:
    value = source.get(key)
    return value if isinstance(value, str) else ""


def _headers(user: dict[str, Any], base: Path) -> dict[str, str]:
    token = _text(user, "token")
    if not token and _text(user, "tokenFile"):
        token = (base / _text(user, "tokenFile")).read_text(encoding="utf-8").strip()
    if token:
        return {"Authorization": f"Bearer {token}"}
    if _text(user, "username"):
        pair = f"{_text(user, 'username')}:{_text(user, 'password')}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}
    return {}


def _tls(
    cluster: dict[str, Any], cluster_base: Path, user: dict[str, Any], user_base: Path
) -> ssl.SSLContext:
    authority = _pem(cluster, "certificate-authority", cluster_base)
    context = ssl.create_default_context(cadata=authority.decode() if authority else None)
    if cluster.get("insecure-skip-tls-verify") is True:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate = _pem(user, "client-certificate", user_base)
    if certificate:
        _load_chain(context, certificate, _pem(user, "client-key", user_base))
    return context


def _pem(source: dict[str, Any], key: str, base: Path) -> bytes:
    data = _text(source, f"{key}-data")
    if data:
        return base64.b64decode(data)
    name = _text(source, key)
    return (base / name).read_bytes() if name else b""


def _load_chain(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Load a client certificate; ssl takes files only, so it gets one that has no name on disk."""
    fd = os.memfd_create("netpol-client-certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, certificate + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _exec(plugin: dict[str, Any]) -> dict[str, Any]:
    """Run a credential plugin (client.authentication.k8s.io)."""
    command = [_text(plugin, "command"), *map(str, plugin.get("args") or ())]
    extra = {
        e["name"]: str(e.get("value", ""))
        for e in plugin.get("env") or ()
        if isinstance(e, dict) and isinstance(e.get("name"), str)
    }
    info = {"kind": "ExecCredential", "apiVersion": _text(plugin, "apiVersion"), "spec": {}}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=True,
            timeout=EXEC_TIMEOUT_S,
            env={**os.environ, **extra, "KUBERNETES_EXEC_INFO": json.dumps(info)},
        )
        status = json.loads(done.stdout)["status"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as e:
        raise NoAnswerError(f"credential plugin {command[0]!r} failed", got=str(e)) from e
    out = {"token": status.get("token", "")}
    for key, name in (
        ("clientCertificateData", "client-certificate-data"),
        ("clientKeyData", "client-key-data"),
    ):
        if status.get(key):
            out[name] = base64.b64encode(status[key].encode()).decode()
    return out
