"""Kubernetes API server of the lab: in process, on loopback, for real kubectl and client libraries.

`ApiServer` is the entry; `ApiServer.store` is the same cluster without HTTP, for the lab's controllers.
"""

from netpol.lab.apiserver.auth import ADMIN, User
from netpol.lab.apiserver.errors import ApiError, Obj
from netpol.lab.apiserver.exec import ExecRequest, LogRequest, Process
from netpol.lab.apiserver.faults import Faults
from netpol.lab.apiserver.history import CompactedError
from netpol.lab.apiserver.registry import Deleted
from netpol.lab.apiserver.server import ApiServer
from netpol.lab.apiserver.store import Store

__all__ = [
    "ADMIN",
    "ApiError",
    "ApiServer",
    "CompactedError",
    "Deleted",
    "ExecRequest",
    "Faults",
    "LogRequest",
    "Obj",
    "Process",
    "Store",
    "User",
]
