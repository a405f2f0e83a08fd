"""HTTP answers: headers, compression, YAML and the Success status.

Owns how bytes leave the server. Knows no objects.
"""

import gzip

from aiohttp import web
from multidict import CIMultiDict

from netpol.lab.apiserver import forms
from netpol.lab.apiserver.errors import Obj

# kube-apiserver compresses answers from this size on.
_GZIP_BYTES = 128 * 1024


def success(details: Obj) -> Obj:
    """Return a Status of kind Success."""
    status: Obj = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    return status | ({"details": details} if details else {})


def answer(
    request: web.Request,
    body: bytes,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    content_type: str = forms.JSON_TYPE,
    yaml: bool = False,
    warnings: tuple[str, ...] = (),
) -> web.Response:
    """Return a response; `warnings` are what kubectl prints as such."""
    fields = CIMultiDict(headers or {})
    for warning in warnings:
        escaped = warning.replace("\\", "\\\\").replace('"', '\\"')
        fields.add("Warning", f'299 - "{escaped}"')
    if yaml and status < 400:
        import yaml as codec

        body = codec.safe_dump(forms.read_json(body), sort_keys=False).encode()
        content_type = "application/yaml"
    if len(body) >= _GZIP_BYTES and "gzip" in request.headers.get("Accept-Encoding", ""):
        body = gzip.compress(body, compresslevel=1)
        fields["Content-Encoding"] = "gzip"
    fields["Content-Type"] = content_type
    fields["Cache-Control"] = "no-cache, private"
    return web.Response(body=body, status=status, headers=fields)
