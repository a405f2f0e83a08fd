"""`netpol-ctl lab demo`: the story of a policy on a terminal, told with the commands that a person types.

Every line that begins with $ is run as it stands. The lab stays up at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netpol
from netpol.admin import client
from netpol.lab.plan import DEFAULT_NAME, STATE_ROOT
from netpol.lib.errors import NetpolError, NoAnswerError

#: How long an audit line may take: a window of aggregation and the reader's time-out.
AUDIT_WAIT_S = 6.0


def run(args: argparse.Namespace) -> int:
    """Tell the story; returns the exit code."""
    demo = Demo(args)
    try:
        demo.tell()
    except _CommandError as e:
        print(f"netpol-ctl lab demo: {e}", file=sys.stderr)
        return 3
    return 0


class _CommandError(NoAnswerError):
    """A command of the story ended as it should not."""


class Demo:
    """One telling."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._name = args.name
        self._extra = [] if args.name == DEFAULT_NAME else ["--name", args.name]
        self._up = ["--iptables", args.iptables] if args.iptables else []
        self._up += ["--routes", args.routes] if args.routes else []
        self._state = STATE_ROOT / args.name
        self._bin = Path(sys.executable).parent
        self._address = ""
        self._colour = sys.stdout.isatty()
        self._env = {**os.environ, "PATH": f"{self._bin}:{os.environ.get('PATH', '')}"}

    def tell(self) -> None:
        """All chapters in order."""
        pods, policies = self._manifest("pods.yaml"), self._manifest("policies.yaml")
        self._quiet("netpol-ctl", "lab", "down", *self._extra)
        self._chapter("A cluster: two nodes in network namespaces, real CNI plugins, an agent each")
        self._show("netpol-ctl", "lab", "up", "--nodes", "2", "-f", pods, *self._up, *self._extra)
        self._env["KUBECONFIG"] = str(self._state / "kubeconfig")
        self._show("kubectl", "get", "pods", "-A", "-o", "wide")
        if (self._state / "node1/run/bird").exists():  # else the lab routes, for want of BIRD
            self._show("netpol-ctl", "routes", "--socket", str(self._state / "node1/agent.sock"))
        ports = ["--port", "5432/tcp", "--port", "8000/tcp"]
        self._chapter("Before any policy: real packets, everybody reaches everybody")
        self._show("netpol-ctl", "lab", "probe", *ports, *self._extra)
        self._chapter("Policies, applied with kubectl: web calls api, api calls db, nothing else")
        self._show("kubectl", "apply", "-f", policies)
        self._chapter("After: real packets again")
        self._show("netpol-ctl", "lab", "probe", *ports, *self._extra)
        self._chapter("Why can web not reach the database?")
        question = ["explain", "shop/web", "--to", "shop/db", "--port", "5432/tcp"]
        self._show("netpol-ctl", *question, expect=(1,))
        self._audit()
        self._new_pod()
        self._farewell()

    # -- chapters ---------------------------------------------------------------------------

    def _audit(self) -> None:
        self._chapter("One denied packet, and the audit log's line about it")
        self._address = address = self._kubectl(
            "get", "pod", "-n", "shop", "db", "-o", "jsonpath={.status.podIP}"
        )
        node = self._kubectl("get", "pod", "-n", "shop", "web", "-o", "jsonpath={.spec.nodeName}")
        # The port is nobody's, so that no line of the probes above can be mistaken for this one.
        dial = ["nc", "-z", "-v", "-w", "1", address, "5433"]
        self._show("kubectl", "exec", "-n", "shop", "web", "--", *dial, expect=(1,))
        path = self._state / node / "audit.jsonl"

        def find() -> str | None:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            for line in reversed(lines):
                record = json.loads(line)
                if record["src"].get("pod") == "web" and record["dst"].get("port") == 5433:
                    return str(line)
            return None

        line = self._wait(find, f"a line about the drop in {path}")
        self._say(f"$ tail -n 1 {path}")
        print(line)

    def _new_pod(self) -> None:
        self._chapter("One more api pod beside the first: from the event to the kernel's rules")
        node = self._kubectl("get", "pod", "-n", "shop", "api", "-o", "jsonpath={.spec.nodeName}")
        place = ["--overrides", json.dumps({"spec": {"nodeName": node}})]
        image = ["--image", "shop/api", "--labels", "app=api", "--port", "8000"]
        self._show("kubectl", "run", "-n", "shop", "api-2", *image, *place)
        self._show("kubectl", "wait", "-n", "shop", "pod/api-2", "--for=condition=Ready")
        status = self._wait(lambda: self._in_sync(node), f"the agent of {node} in sync")
        policy = status["rooms"]["policy"]
        print(
            f"{node}: in force {policy['last_apply_ms']} ms after the event, "
            f"{policy['pods']} pods, {policy['classes']} classes, {policy['rules']} rules"
        )
        self._show("netpol-ctl", "explain", "shop/api-2", "--to", "shop/db", "--port", "5432/tcp")

    def _farewell(self) -> None:
        self._chapter("The lab keeps running. Go on by hand:")
        print(f"export KUBECONFIG={self._state / 'kubeconfig'} PATH={self._bin}:$PATH")
        for command in (
            "kubectl label pod -n shop web app=api --overwrite   # then probe again",
            f"netpol-ctl lab probe {' '.join(self._extra)}".rstrip(),
            "netpol-ctl explain shop/web --to shop/db --port 5432/tcp --fix",
            f"kubectl exec -n shop api -- nc -z -v -w 1 {self._address} 5432",
            f"netpol-ctl lab exec {' '.join([*self._extra, 'node1', '--'])} iptables -t mangle -vnL",
            f"netpol-ctl lab down {' '.join(self._extra)}".rstrip(),
        ):
            print(f"  {command}")

    # -- pieces -----------------------------------------------------------------------------

    def _manifest(self, name: str) -> str:
        """One of the shop's files, as a person in the checkout would name it."""
        path = Path(netpol.__file__).parents[1] / "manifests" / "examples" / "shop" / name
        if not path.exists():
            raise NoAnswerError("the demo's manifests", needed=f"a checkout with {path}")
        return os.path.relpath(path)

    def _in_sync(self, node: str) -> dict[str, Any] | None:
        try:
            status = client.call(str(self._state / node / "agent.sock"), "status")
        except NetpolError:
            return None
        return status if isinstance(status, dict) and status["in_sync"] else None

    def _wait(self, ask: Callable[[], Any], what: str) -> Any:
        until = time.monotonic() + AUDIT_WAIT_S
        while True:
            answer = ask()
            if answer:
                return answer
            if time.monotonic() > until:
                raise _CommandError("waiting", needed=what, got=f"nothing in {AUDIT_WAIT_S:.0f} s")
            time.sleep(0.1)

    def _chapter(self, title: str) -> None:
        text = f"== {title}"
        print(f"\n\033[1m{text}\033[0m" if self._colour else f"\n{text}", flush=True)

    def _say(self, text: str) -> None:
        print(f"\033[36m{text}\033[0m" if self._colour else text, flush=True)

    def _show(self, *command: str, expect: tuple[int, ...] = (0,)) -> None:
        self._say(f"$ {shlex.join(command)}")
        done = subprocess.run(command, env=self._env, check=False, stdin=subprocess.DEVNULL)
        if done.returncode not in expect:
            raise _CommandError(
                shlex.join(command),
                needed=f"exit {' or '.join(map(str, expect))}",
                got=str(done.returncode),
            )

    def _quiet(self, *command: str) -> None:
        subprocess.run(command, env=self._env, check=False, capture_output=True)

    def _kubectl(self, *words: str) -> str:
        done = subprocess.run(
            ["kubectl", *words], env=self._env, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise _CommandError("kubectl", got=done.stderr.strip())
        return done.stdout.strip()
