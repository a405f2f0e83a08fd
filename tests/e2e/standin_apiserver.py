"""A program that takes the flags of a kube-apiserver and serves the lab's own API server in its place.

With it a lab walks the whole way to a real API server on machines that have none: processes, relays,
certificates, tokens, remote watches. It needs no etcd, and knows no exec and no logs.
"""

from __future__ import annotations

import asyncio
import csv
import socket
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

from netpol.lab.apiserver import ApiServer, User
from netpol.lab.relay import Relay


def flags(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def users(file: Path) -> dict[str, User]:
    return {
        token: User(name, frozenset({*groups.split(","), "system:authenticated"}))
        for token, name, _, groups in csv.reader(file.read_text().splitlines())
    }


async def main(given: dict[str, str], tokens: dict[str, User]) -> None:
    ranges = tuple(given["service-cluster-ip-range"].split(","))
    server = ApiServer(tokens=tokens, service_cidrs=ranges)
    inner = urlsplit(await server.start())
    relay = Relay(lambda: asyncio.open_connection(inner.hostname, inner.port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given["tls-cert-file"], given["tls-private-key-file"])
    address = (given["bind-address"], int(given["secure-port"]))
    await relay.serve(socket.create_server(address), tls=context)
    await asyncio.Event().wait()


if __name__ == "__main__":
    GIVEN = flags(sys.argv[1:])
    asyncio.run(main(GIVEN, users(Path(GIVEN["token-auth-file"]))))
