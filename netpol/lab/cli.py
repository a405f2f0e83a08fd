"""`netpol-ctl lab`: the arguments of its verbs, and what each prints.

Owns the command line of the lab; netpol-ctl calls `add_parser` and `run`. Everything heavy is imported
when it is needed. Answers go to stdout, progress and remarks to stderr; exit codes are those of all of
netpol-ctl (2 for bad arguments, 3 for no answer).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from netpol.lab.plan import DEFAULT_CNI_BIN_DIR, DEFAULT_NAME, STATE_ROOT
from netpol.lib.errors import InputError, NetpolError, NoAnswerError

Obj = dict[str, Any]

_EPILOG = """\
The lab runs inside network namespaces only. Commands of `kubectl exec` run as root with the pod's network
and names but this machine's files: it is a place to try policies, no sandbox.
"""


def add_parser(subparsers: Any) -> None:
    """Add `lab` and its verbs to netpol-ctl's parser."""
    lab = subparsers.add_parser(
        "lab",
        help="a cluster on this machine out of network namespaces",
        description="A cluster on this machine out of network namespaces, to try policies in.",
        epilog=_EPILOG,
    )
    verbs = lab.add_subparsers(dest="lab_verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default=DEFAULT_NAME, help="which lab (default: lab)")

    up = verbs.add_parser("up", parents=[common], help="build it; returns when all of it is ready")
    _add_up_arguments(up)

    verbs.add_parser("down", parents=[common], help="remove all of it; no error when nothing is up")

    status = verbs.add_parser("status", parents=[common], help="nodes, agents, pods")
    status.add_argument("-o", "--output", choices=("text", "json"), default="text")

    execute = verbs.add_parser("exec", parents=[common], help="run a command in a node's namespace")
    execute.add_argument("node", metavar="NODE")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD")

    verbs.add_parser("kubeconfig", parents=[common], help="print the path of the kubeconfig")

    probe = verbs.add_parser(
        "probe", parents=[common], help="real packets from and to every pod, as a matrix"
    )
    probe.add_argument(
        "--port",
        action="append",
        default=[],
        metavar="N/PROTO",
        help="a number, range or name, with protocol; repeatable (default: what the pods declare)",
    )
    probe.add_argument("--ip-family", choices=("4", "6"), help="judge by this family")
    probe.add_argument("-o", "--output", choices=("text", "json"), default="text")
    probe.add_argument("--timeout-s", type=float, default=30.0, help="for the agents to be in sync")

    demo = verbs.add_parser("demo", parents=[common], help="a guided tour; leaves the lab running")
    _add_up_arguments(demo, manifests=False)


def _add_up_arguments(parser: argparse.ArgumentParser, *, manifests: bool = True) -> None:
    if manifests:
        parser.add_argument(
            "-f", "--filename", action="append", default=[], metavar="PATH", help="manifests"
        )
        parser.add_argument("--nodes", type=int, default=2, help="how many nodes (default: 2)")
        parser.add_argument(
            "--proxy", action="store_true", help="agents serve Services; the kernel must have IPVS"
        )
        parser.add_argument("--no-agent", action="store_true", help="without netpol-agents")
        parser.add_argument(
            "--no-restart", action="store_true", help="leave an agent that ended ended"
        )
        parser.add_argument(
            "--agent-arg",
            action="append",
            default=[],
            metavar="=--FLAG[=VALUE]",
            help="one more argument of every netpol-agent; repeatable",
        )
        parser.add_argument(
            "--subnets", type=int, default=1, help="L2 segments that nodes are in (default: 1)"
        )
        parser.add_argument(
            "--router", choices=("frr",), default="", help="add a BGP router outside the cluster"
        )
    parser.add_argument(
        "--routes",
        choices=("bgp", "static"),
        help="who routes between nodes: agents by BGP, or the lab (default: bgp where BIRD is)",
    )
    parser.add_argument("--iptables", choices=("nft", "legacy"), default="")
    parser.add_argument("--ip-family", choices=("dual", "4"), default="dual")
    parser.add_argument("--cni-dir", type=Path, default=DEFAULT_CNI_BIN_DIR, help="CNI plugins")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="until all must be ready")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; return the exit code. Deliberate errors become one line here."""
    verbs = {
        "up": _up,
        "down": _down,
        "status": _status,
        "exec": _exec,
        "kubeconfig": _kubeconfig,
        "probe": _probe,
        "demo": _demo,
    }
    try:
        code = verbs[args.lab_verb](args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python must not try to flush again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NetpolError as error:
        _say(f"netpol-ctl lab {args.lab_verb}: {error}"[:1500])
        return error.exit_code
    except KeyboardInterrupt:
        _say(f"netpol-ctl lab {args.lab_verb}: interrupted")
        return 130


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _interrupt(number: int, _: object) -> NoReturn:
    """Take a half-made lab down when `lab up` itself is ended, as ^C does."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def _up(args: argparse.Namespace) -> int:
    from netpol.lab import agents, assets, launch, objects, routing
    from netpol.lab.apiserver.resources import Kinds
    from netpol.lab.plan import LabPlan

    began = time.monotonic()
    agents.check_arguments(args.agent_arg)
    routes, note = routing.choose(
        args.routes,
        agent=not args.no_agent,
        needed_for="--subnets" if args.subnets > 1 else "--router" if args.router else "",
        fault=routing.missing(),
    )
    if note:
        _say(note)
    plan = LabPlan(
        name=args.name,
        node_count=args.nodes,
        dual_stack=args.ip_family == "dual",
        iptables=args.iptables,
        agent=not args.no_agent,
        restart_agents=not args.no_restart,
        proxy=args.proxy,
        routes=routes,
        subnets=args.subnets,
        router=args.router,
        agent_args=tuple(args.agent_arg),
        cni_bin_dir=args.cni_dir.absolute(),
    )
    programs = assets.from_environment(os.environ)
    served = {(kind.api_version, kind.kind): kind.namespaced for kind in Kinds()}
    selection = objects.select(
        objects.read(args.filename), nodes=[node.name for node in plan.nodes], served=served
    )
    for note in selection.notes:
        _say(note)
    launch.require_root()
    if plan.proxy:
        _require_proxy()
    if plan.router:
        _require_router()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)

    def say(text: str) -> None:
        _say(f"[{time.monotonic() - began:5.1f} s] {text}")

    launch.up(plan, selection, timeout_s=args.timeout_s, say=say, assets=programs)
    pods = sum(m.obj["kind"] == "Pod" for m in selection.manifests)
    elapsed_s = time.monotonic() - began
    print(f"lab {plan.name!r} is up: {plan.node_count} nodes, {pods} pods, {elapsed_s:.1f} s")
    print(f"export KUBECONFIG={plan.state_dir / 'kubeconfig'}")
    flag = "" if plan.name == DEFAULT_NAME else f" --name {plan.name}"
    print(f"netpol-ctl lab probe{flag}   # who reaches whom, by real packets")
    print(f"netpol-ctl lab down{flag}    # removes all of it")
    return 0


def _require_router() -> None:
    from netpol.lab import frr

    fault = frr.missing()
    if fault is not None:
        raise NoAnswerError("--router frr", needed="FRR (Debian package frr)", got=fault)


def _require_proxy() -> None:
    from netpol.lab import agents

    fault = agents.missing_proxy()
    if fault is not None:
        raise NoAnswerError(
            "--proxy: this machine's kernel cannot serve Services",
            needed="a kernel with IPVS, or no --proxy (headless Services resolve all the same)",
            got=fault,
        )


def _down(args: argparse.Namespace) -> int:
    from netpol.lab import launch
    from netpol.lab.plan import check_name

    check_name(args.name)
    launch.require_root()
    found = launch.down(args.name)
    print(f"lab {args.name!r} is down" if found else f"lab {args.name!r} was not up")
    return 0


def _ask(args: argparse.Namespace, op: str, **arguments: Any) -> Obj:
    from netpol.lab import control, launch
    from netpol.lab.plan import check_name

    check_name(args.name)
    launch.require_root()
    if not launch.is_up(args.name):
        ended = " (it ended; `netpol-ctl lab down` removes the rest)"
        got = ended if launch.leftovers(args.name) else ""
        raise NoAnswerError(f"lab {args.name!r} is not up{got}", needed="`netpol-ctl lab up`")
    return control.ask(STATE_ROOT / args.name / "lab.sock", op, **arguments)


def _status(args: argparse.Namespace) -> int:
    answer = _ask(args, "status")
    answer.pop("ok", None)
    if args.output == "json":
        print(json.dumps(answer, indent=2))
        return 0
    waiting = answer["waiting"]
    troubled = [line for line in answer["agents"] if not line["ready"] or not line["in_sync"]]
    state = "ready" if not waiting and not troubled else "not ready"
    print(
        f"lab {answer['name']!r} is {state}: {len(answer['nodes'])} nodes, "
        f"{len(answer['pods'])} pods, {len(answer['agents'])} agents"
    )
    for text in waiting:
        print(f"  waiting for {text}")
    agents = {line["node"]: line for line in answer["agents"]}
    for node in answer["nodes"]:
        print(
            f"\n{node['name']}  {' '.join(node['addresses'])}  pods {' '.join(node['pod_cidrs'])}"
        )
        if node["name"] in agents:
            print(f"  agent: {_agent_text(agents[node['name']])}")
        if node.get("sessions"):
            print(f"  BGP: {_sessions_text(node['sessions'])}")
        rows = [
            (pod["key"], " ".join(pod["addresses"]) or "no address yet", _ports_text(pod))
            for pod in answer["pods"]
            if pod["node"] == node["name"]
        ]
        for line in _columns(rows):
            print(f"  {line}")
    if answer.get("router"):
        print(f"\n{_router_text(answer['router'])}")
    server = f"{answer['api_server']} ({answer['api_server_program']})"
    print(f"\nAPI server {server}, KUBECONFIG={answer['kubeconfig']}")
    print(f"Service addresses {answer['service_addresses']}.")
    return 0


def _agent_text(line: Obj) -> str:
    state = "ready" if line["ready"] else "not ready"
    if line["ready"] and not line["in_sync"]:
        state = "applying"
    parts = [state, f"pid {line['pid']}" if line["pid"] else "not running"]
    if line["restarts"]:
        parts.append(f"{line['restarts']} restarts")
    if line["problem"]:
        parts.append(line["problem"])
    return ", ".join(parts)


def _sessions_text(sessions: list[Obj]) -> str:
    up = [s["peer"] for s in sessions if s["state"] == "Established"]
    parts = (
        [f"{len(up)} of {len(sessions)} sessions up ({', '.join(up)})"] if up else ["no session"]
    )
    for session in sessions:
        if session["state"] != "Established":
            why = f": {session['lastError']}" if session.get("lastError") else ""
            parts.append(f"{session['peer']} is {session['state']}{why}")
    return ", ".join(parts)


def _router_text(router: Obj) -> str:
    up = [s["peer"] for s in router["sessions"] if s["state"] == "Established"]
    parts = [f"{len(up)} sessions ({', '.join(up)})", f"{len(router['routes'])} routes learnt"]
    if router["problem"]:
        parts = [router["problem"]]
    return f"router  AS {router['asn']}  {' '.join(router['addresses'])}\n  BGP: {', '.join(parts)}"


def _ports_text(pod: Obj) -> str:
    if pod["problem"]:
        return str(pod["problem"])
    return " ".join(f"{number}/{protocol}" for _, protocol, number in pod["ports"]) or "no ports"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _exec(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise InputError("lab exec", needed="NODE -- CMD [ARG ...]", got="no command")
    netns = str(_ask(args, "exec", node=args.node)["netns"])
    sys.stdout.flush()
    lockfile = STATE_ROOT / args.name / args.node / "xtables.lock"
    env = os.environ | {"XTABLES_LOCKFILE": str(lockfile)}
    os.execvpe("ip", ["ip", "netns", "exec", netns, *command], env)  # noqa: S606


def _kubeconfig(args: argparse.Namespace) -> int:
    print(_ask(args, "status")["kubeconfig"])
    return 0


def _probe(args: argparse.Namespace) -> int:
    from netpol.lab import matrix

    wanted = [matrix.parse_port(text) for text in args.port]
    settled = _ask(args, "settle", timeout_s=args.timeout_s)
    pods = _ask(args, "pods")["pods"]
    return matrix.probe(
        pods,
        wanted,
        family=int(args.ip_family) if args.ip_family else None,
        as_json=args.output == "json",
        resource_version=int(settled["resource_version"]),
        ports_file=STATE_ROOT / args.name / "source-port",
    )


def _demo(args: argparse.Namespace) -> int:
    import importlib
    import importlib.util

    if importlib.util.find_spec("netpol.lab.demo") is None:
        raise NoAnswerError("this installation has no demo")
    demo = importlib.import_module("netpol.lab.demo")
    return int(demo.run(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lab's verbs without netpol-ctl (`python -m netpol.lab.cli lab up`)."""
    parser = argparse.ArgumentParser(prog="netpol-ctl")
    add_parser(parser.add_subparsers(required=True))
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
