"""`netpol-ctl`, also `kubectl netpol`: arguments, dispatch, and the exit code of everything that fails.

Nothing heavy is imported here: `--help` must come at once. A command is a module with `run(args)`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from netpol import __version__
from netpol.admin.wire import DEFAULT_SOCKET
from netpol.ctl.output import FORMATS, clip
from netpol.lib.errors import NetpolError

_EPILOG = """\
a REF is KIND/NAME (pod, svc, node; namespace by -n), NS/NAME (a pod), NS/KIND/NAME, an address or a CIDR
a PORT is 80, 80/tcp, 8000-8100/udp, or a port's name

exit codes: 0 answered or allow, 1 deny, 2 bad arguments or input, 3 no answer
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{clip(f'{self.prog}: {message} (see {self.prog} --help)')}\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog=_program(),
        description="Explains, renders and checks NetworkPolicies, with a cluster or without one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"netpol-ctl {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    cluster, output, node = _cluster_options(), _output_option(), _socket_option()
    _explain(commands, [cluster, node, output])
    _matrix(commands, [cluster, node, output])
    _render(commands, [cluster, node, output])
    _add(commands, "status", "the state of this node's agent", [node, output])
    _drops(commands, [node, output])
    cleanup = _add(
        commands, "cleanup", "remove all that is netpol's from this node", [node, output]
    )
    cleanup.add_argument("--force", action="store_true", help="also while an agent runs")
    cleanup.add_argument(
        "--kube-proxy", action="store_true", help="instead, remove what a kube-proxy left"
    )
    cleanup.add_argument(
        "--run-dir",
        default="/run/netpol",
        metavar="DIR",
        help="run-dir of the agent (default: /run/netpol)",
    )
    cleanup.add_argument(
        "--state-dir",
        default="/var/lib/netpol",
        metavar="DIR",
        help="state-dir of the agent (default: /var/lib/netpol)",
    )
    _routes(commands, cluster=cluster, node=node, output=output)
    _add(commands, "peers", "the BGP sessions of this node", [node, output])
    _services(commands, [_manifest_options(), node, output])
    # Only its line in --help: the lab's own parser takes its place when it is called (_lab).
    commands.add_parser("lab", help="a cluster on this machine, to try policies in", add_help=False)
    _add(commands, "version", "the version of this program", [output])
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run netpol-ctl and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except NetpolError as e:
        _complain(str(e))
        return e.exit_code
    except BrokenPipeError:
        return _drop_output()
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if os.environ.get("NETPOL_DEBUG"):
            raise
        _complain(
            f"internal error: {type(e).__name__}: {e} (NETPOL_DEBUG=1 shows where; please report it)"
        )
        return 3


def _main(words: list[str]) -> int:
    top = parser()
    if words[:1] == ["lab"]:
        return _lab(top, words)
    if words and not words[0].startswith("-") and words[0] == "help":
        words = ["--help"]
    args = top.parse_args(_settle_words(words))
    _settle(args)
    run: Any = importlib.import_module(f"netpol.ctl.{args.command}").run
    code = run(args)
    sys.stdout.flush()
    return int(code)


def _lab(top: argparse.ArgumentParser, words: list[str]) -> int:
    """The lab brings its own arguments; they are not read unless asked for."""
    lab: Any = importlib.import_module("netpol.lab.cli")
    actions = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]  # noqa: SLF001
    actions[0].choices.pop("lab", None)
    lab.add_parser(actions[0])
    return int(lab.run(top.parse_args(words)))


def _settle_words(words: list[str]) -> list[str]:
    """`routes [ADDRESS]` means `routes show [ADDRESS]`."""
    verbs = ("render", "show", "drain", "-h", "--help")
    if words[:1] == ["routes"] and (len(words) == 1 or words[1] not in verbs):
        return ["routes", "show", *words[1:]]
    return words


def _settle(args: argparse.Namespace) -> None:
    """Fill in what options leave open."""
    if hasattr(args, "namespace"):
        args.namespace_given = args.namespace
    if hasattr(args, "socket"):
        args.socket_given = args.socket is not None
        args.socket = args.socket or os.environ.get("NETPOL_SOCKET") or DEFAULT_SOCKET


def _complain(text: str) -> None:
    print(clip(f"netpol-ctl: {text}"), file=sys.stderr)


def _drop_output() -> int:
    """The reader went away: say nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 3


def _program() -> str:
    """How it was called: kubectl starts plugins by their file's name."""
    called = sys.argv[0].rpartition("/")[2]
    return "kubectl netpol" if called.startswith("kubectl-") else "netpol-ctl"


# -- options ------------------------------------------------------------------------------------


def _add(
    commands: Any, name: str, text: str, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        parents=parents,
        allow_abbrev=False,
    )
    return made


def _manifest_options() -> argparse.ArgumentParser:
    """Options of a command that reads manifests, or asks the node's agent."""
    options = argparse.ArgumentParser(add_help=False)
    _source_group(options)
    return options


def _cluster_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = _source_group(options)
    group.add_argument("--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, ~/.kube/config")
    group.add_argument("--context", metavar="NAME", help="context of the kubeconfig")
    return options


def _source_group(options: argparse.ArgumentParser) -> Any:
    group = options.add_argument_group("where the cluster is read from")
    group.add_argument(
        *("-f", "--filename"),
        dest="files",
        action="append",
        default=[],
        metavar="PATH",
        help="manifests: a file, a folder, or - for stdin; repeatable; no cluster is asked then",
    )
    group.add_argument(
        "--strict", action="store_true", help="manifests the API would refuse: exit 2"
    )
    group.add_argument("-n", "--namespace", metavar="NS", help="default: default, or the context's")
    return group


def _output_option() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("-o", "--output", choices=FORMATS, default="text", help="default: text")
    return options


def _socket_option() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--socket", metavar="PATH", help=f"admin socket of the agent (default: {DEFAULT_SOCKET})"
    )
    return options


def _port_options(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--port",
        dest="ports",
        action="append",
        default=[],
        metavar="PORT",
        help="repeatable; default: the containerPorts that are declared",
    )
    made.add_argument(
        "--ip-family", type=int, choices=(4, 6), help="default: the destination's first"
    )


def _explain(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    made = _add(
        commands, "explain", "who isolates a pod, or whether a connection passes and why", parents
    )
    made.add_argument("ref", nargs="?", metavar="REF", help="a pod, or one end of a connection")
    made.add_argument("--from", dest="source", metavar="REF", help="source of the connection")
    made.add_argument("--to", dest="target", metavar="REF", help="destination of the connection")
    _port_options(made)
    made.add_argument("--fix", action="store_true", help="print policies that would allow it")


def _matrix(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    made = _add(commands, "matrix", "who reaches whom", parents)
    made.add_argument("-A", "--all-namespaces", action="store_true", help="the default without -n")
    _port_options(made)
    made.add_argument(
        "--external", action="append", default=[], metavar="ADDRESS", help="one more row and column"
    )


def _render(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    made = _add(
        commands,
        "render",
        "what a node would get: ipset restore and iptables-restore text",
        parents,
    )
    made.add_argument("--node", required=True, metavar="NODE")
    made.add_argument("--only", choices=("sets", "rules"))
    made.add_argument("--family", type=int, choices=(4, 6), help="default: both")
    made.add_argument(
        "--pod-interfaces", action="append", default=[], metavar="NAME", help="e.g. cni0 or cali+"
    )
    made.add_argument(
        "--hold-unknown-pods",
        action="store_true",
        help="deny addresses of the podCIDR without a pod",
    )
    made.add_argument(
        "--deny-with",
        choices=("drop", "reject"),
        default="drop",
        help="what a denied packet meets (default: drop)",
    )


def _drops(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    drops = _add(commands, "drops", "recent denied packets, and why", parents)
    drops.add_argument("-f", "--follow", action="store_true", help="go on with those to come")
    drops.add_argument("--pod", metavar="REF", help="only those from or to a pod")
    drops.add_argument("-n", "--namespace", metavar="NS", help="namespace of --pod")
    drops.add_argument("--since", metavar="WHEN", help="a span such as 10m, or an RFC 3339 time")


def _services(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    made = _add(commands, "services", "what can be dialled on a node, and where it leads", parents)
    made.add_argument("name", nargs="?", metavar="NAME", help="one Service: NAME or NS/NAME")
    made.add_argument("--node", metavar="NODE", help="the node that is planned (with -f)")
    for flag, dest, text in (
        ("--service-cidr", "service_cidrs", "range that ClusterIPs are taken from"),
        ("--nodeport-addresses", "nodeport_addresses", "the node's addresses that serve NodePorts"),
        ("--external-ip-cidr", "external_ip_cidr", "range that external addresses must lie in"),
    ):
        made.add_argument(
            flag, dest=dest, action="append", default=[], metavar="CIDR", help=f"{text}; repeatable"
        )


def _routes(
    commands: Any,
    *,
    cluster: argparse.ArgumentParser,
    node: argparse.ArgumentParser,
    output: argparse.ArgumentParser,
) -> None:
    routes = commands.add_parser(
        "routes",
        help="what this node routes, and where an address goes; render: BIRD's configuration",
        allow_abbrev=False,
    )
    actions = routes.add_subparsers(dest="action", metavar="ACTION", required=True)
    # `routes [ADDRESS]` is what people type: see _settle_words.
    show = _add(actions, "show", "what this node routes, or where an address goes", [node, output])
    show.add_argument("address", nargs="?", metavar="ADDRESS", help="where do packets to it go?")
    drain = _add(actions, "drain", "prepare this node for maintenance", [node, output])
    drain.add_argument("--off", action="store_true", help="the maintenance is over")
    made = _add(
        actions,
        "render",
        "the whole BIRD configuration that a node would get",
        [cluster, output],
    )
    made.add_argument("--node", required=True, metavar="NODE")
    made.add_argument(
        "--interface", default="eth0", metavar="NAME", help="link to the others (default: eth0)"
    )
    for flag, dest, text in (
        ("--subnet", "subnets", "an L2 segment of nodes (default: all nodes share one)"),
        ("--cluster-cidr", "cluster_cidrs", "range that podCIDRs must lie in"),
        ("--service-cidr", "service_cidrs", "range that no router may announce"),
        (
            "--vip-cidr",
            "vip_cidrs",
            "range of Services' outer addresses, which no router may announce",
        ),
    ):
        made.add_argument(
            flag, dest=dest, action="append", default=[], metavar="CIDR", help=f"{text}; repeatable"
        )
    made.add_argument("--asn", type=int, default=64512, metavar="N", help="default: 64512")
    made.add_argument(
        "--overlay", choices=("never", "cross-subnet", "always"), default="cross-subnet"
    )
    made.add_argument("--encapsulation", choices=("vxlan", "ipip"), default="vxlan")
    made.add_argument(
        "--peers", metavar="FILE", help="YAML list of routers that all nodes peer with"
    )
    made.add_argument("--mesh", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--advertise-pod-cidr", action=argparse.BooleanOptionalAction, default=True)
    for what in ("cluster-ip", "external-ip", "load-balancer-ip"):
        made.add_argument(
            f"--advertise-{what}", action=argparse.BooleanOptionalAction, default=False
        )
    for flag, low, high, default, text in (
        ("--hold-time", 3, 65535, 90, "seconds of silence that end a session between nodes"),
        ("--keepalive-time", 0, 21845, 0, "seconds between signs of life; 0: a third of that"),
        ("--bgp-port", 1, 65535, 179, "TCP port of BGP on all nodes"),
    ):
        made.add_argument(
            flag,
            type=_within(low, high),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    made.add_argument("--graceful-restart", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--drain", action="store_true", help="as while the node is drained")


def _within(low: int, high: int) -> Callable[[str], int]:
    """A reader of numbers between two others."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text[:10]) <= high:
            raise argparse.ArgumentTypeError(f"needed a number of {low}..{high}, got {text!r}")
        return int(text)

    return read


if __name__ == "__main__":
    sys.exit(main())
