"""The kubeconfig file that kubectl and the client library read.

Owns its content and its file mode: it holds a token.
"""

import base64
import os
from pathlib import Path

from netpol.lab.apiserver.history import encode


def write(
    path: Path,
    *,
    server: str,
    token: str = "",
    ca_pem: bytes = b"",
    namespace: str = "default",
    name: str = "netpol-lab",
) -> None:
    """Write a kubeconfig with one cluster, one user and one context, readable by its owner."""
    cluster: dict[str, str] = {"server": server}
    if ca_pem:
        cluster["certificate-authority-data"] = base64.b64encode(ca_pem).decode()
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token} if token else {}}],
        "contexts": [
            {"name": name, "context": {"cluster": name, "user": name, "namespace": namespace}}
        ],
        "current-context": name,
    }
    draft = path.with_name(path.name + ".new")
    # JSON is YAML; written aside and renamed, so that a reader never sees half of it.
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(encode(content) + b"\n")
    draft.rename(path)
