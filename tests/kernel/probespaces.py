"""Namespaces for the probe's tests: pods on a bridge inside a node's namespace, both families.

The bridge calls iptables (br_netfilter), so that rules in the node's FORWARD chain judge pod to pod.
"""

import os
import subprocess
from pathlib import Path

from netpol.lab.probe import ProbeEnd
from netpol.model.net import parse_address


def run(*args, stdin=None, check=True, env=None):
    done = subprocess.run(args, input=stdin, text=True, capture_output=True, check=False, env=env)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(args)}: {done.stdout}{done.stderr}")
    return done


class Bridge:
    """A node namespace with a bridge and `count` pods; `variant` is nft or legacy."""

    def __init__(self, label, count, *, tmp_path):
        self.prefix = f"knpt-{label}-{os.getpid()}"
        self.node = f"{self.prefix}-n"
        self.count = count
        self.pods = [f"{self.prefix}-p{i}" for i in range(count)]
        self.env = {**os.environ, "XTABLES_LOCKFILE": str(tmp_path / "xtables.lock")}

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self):
        lines = [f"netns add {n}" for n in (self.node, *self.pods)]
        run("ip", "-b", "-", stdin="\n".join(lines))
        node = ["link set lo up", "link add br0 type bridge", "link set br0 up"]
        node += ["addr add 10.9.0.1/16 dev br0", "addr add fd09::1/64 dev br0 nodad"]
        for i, pod in enumerate(self.pods):
            node.append(f"link add v{i} type veth peer name eth0 netns {pod}")
            node.append(f"link set v{i} master br0 up")
        run("ip", "-n", self.node, "-b", "-", stdin="\n".join(node))
        run(
            "ip",
            "netns",
            "exec",
            self.node,
            "sysctl",
            "-qw",
            *(f"net.bridge.bridge-nf-call-{t}tables=1" for t in ("ip", "ip6")),
        )
        for i, pod in enumerate(self.pods):
            v4, v6 = self.texts(i)
            run(
                "ip",
                "-n",
                pod,
                "-b",
                "-",
                stdin=(
                    f"link set lo up\nlink set eth0 up\naddr add {v4}/16 dev eth0\n"
                    f"addr add {v6}/64 dev eth0 nodad\n"
                ),
            )

    def __exit__(self, *_):
        for name in (self.node, *self.pods):
            if Path("/run/netns", name).exists():
                run("ip", "netns", "del", name, check=False)

    @staticmethod
    def texts(i):
        return f"10.9.{i // 250 + 1}.{i % 250 + 1}", f"fd09::1:{i + 1:x}"

    def end(self, i):
        return ProbeEnd(f"t/p{i}", self.pods[i], tuple(map(parse_address, self.texts(i))))

    @property
    def ends(self):
        return [self.end(i) for i in range(self.count)]

    def rules(self, variant, family, text):
        """Replace the rules of the node's filter table, FORWARD and the other hooks."""
        tool = f"{'ip' if family == 4 else 'ip6'}tables-{variant}-restore"
        run(
            "ip", "netns", "exec", self.node, tool, stdin=f"*filter\n{text}\nCOMMIT\n", env=self.env
        )
