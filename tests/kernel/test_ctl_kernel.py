"""What `netpol-ctl render` prints loads with the real tools, and `cleanup` takes all of it away again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

REPOSITORY = Path(__file__).parents[2]
WORLD = REPOSITORY / "tests" / "spec" / "ctl" / "worlds" / "corners.yaml"


@pytest.fixture
def space(tmp_path):
    """A network namespace with a foreign rule in it; runs commands there."""
    name = f"knpt-ctl-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    environment = {**os.environ, "XTABLES_LOCKFILE": str(tmp_path / "lock")}

    def run(*command, text=""):
        done = subprocess.run(
            ["ip", "netns", "exec", name, *command],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env=environment,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}\n{text}"
        return done.stdout

    yield run
    subprocess.run(["ip", "netns", "del", name], check=True)


def ctl(*words):
    return (sys.executable, "-m", "netpol.ctl.main", *words)


def rendered(run, *words):
    return run(*ctl("render", "--node", "node-a", "-f", str(WORLD), *words))


@pytest.mark.parametrize("deny_with", ["drop", "reject"])
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_rendered_text_loads_and_cleanup_removes_it(space, variant, deny_with, tmp_path):
    foreign = "*mangle\n:OTHER - [0:0]\n-A FORWARD -j OTHER\n-A OTHER -p tcp -j ACCEPT\nCOMMIT\n"
    space(f"iptables-{variant}-restore", "--noflush", text=foreign)
    before = saved(space, variant)
    space("ipset", "create", "foreign", "hash:ip")

    space("ipset", "restore", text=rendered(space, "--only", "sets"))
    for family, tool in (("4", "iptables"), ("6", "ip6tables")):
        text = rendered(space, "--only", "rules", "--family", family, "--deny-with", deny_with)
        space(f"{tool}-{variant}-restore", "--noflush", text=text)
        assert "-A FORWARD -j KNP-" in space(f"{tool}-{variant}-save", "-t", "mangle")
        answers = "-A OUTPUT -j KNP-REJECT" in space(f"{tool}-{variant}-save")
        assert answers == (deny_with == "reject")
    assert any(s.startswith("KNP-") for s in space("ipset", "list", "-n").split())

    socket = str(tmp_path / "none.sock")
    assert space(*ctl("cleanup", "--socket", socket)).startswith("removed ")
    assert saved(space, variant) == before
    assert space("ipset", "list", "-n").split() == ["foreign"]
    assert "KNP-" not in space(f"ip6tables-{variant}-save")
    assert "KNP-" not in space(f"iptables-{variant}-save")
    assert space(*ctl("cleanup", "--socket", socket)) == "nothing of netpol here\n"


def test_cleanup_removes_all_rooms(space, tmp_path):
    """A chain, a jump and a set of each, in every table that any of them has."""
    for room in ("SVC", "RT"):
        space("ipset", "create", f"KNP-{room}-S4", "hash:ip")
        for table, hook in (("mangle", "PREROUTING"), ("filter", "INPUT"), ("nat", "POSTROUTING")):
            text = (
                f"*{table}\n:KNP-{room}-A - [0:0]\n-A KNP-{room}-A -m set --match-set KNP-{room}-S4 src"
                f" -j RETURN\n-A {hook} -j KNP-{room}-A\nCOMMIT\n"
            )
            space("iptables-nft-restore", "--noflush", text=text)

    said = space(*ctl("cleanup", "--socket", str(tmp_path / "none.sock")))

    assert said == "removed 6 chains, 6 jumps, 2 sets\n"
    assert "KNP-" not in space("iptables-nft-save")
    assert space("ipset", "list", "-n") == ""


def saved(run, variant):
    lines = run(f"iptables-{variant}-save", "-t", "mangle").splitlines()
    return [x for x in lines if not x.startswith("#")]


def test_cleanup_forgets_the_pod_ranges_and_nothing_else_there(space, tmp_path):
    ours, other = tmp_path / "node.json", tmp_path / "other.json"
    for file in (ours, other):
        file.write_text("{}")
    words = ctl("cleanup", "--socket", str(tmp_path / "none.sock"), "--state-dir", str(tmp_path))
    assert "1 file" in space(*words)
    assert not ours.exists()
    assert other.exists()
    assert space(*words) == "nothing of netpol here\n"


def test_cleanup_makes_no_table_by_looking(space, tmp_path):
    space(*ctl("cleanup", "--socket", str(tmp_path / "none.sock")))
    assert space("cat", "/proc/net/ip_tables_names") == ""
    assert space("iptables-nft-save") == ""


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_cleanup_ends_enforcement_though_a_foreign_rule_holds_a_chain(space, variant, tmp_path):
    space("ipset", "restore", text=rendered(space, "--only", "sets"))
    for family, tool in (("4", "iptables"), ("6", "ip6tables")):
        text = rendered(space, "--only", "rules", "--family", family)
        space(f"{tool}-{variant}-restore", "--noflush", text=text)
    space(f"iptables-{variant}", "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "-j", "KNP-OK")

    words = ctl("cleanup", "--socket", str(tmp_path / "none.sock"))
    said = space("sh", "-c", '"$@" 2>&1; echo "exit $?"', "sh", *words)

    assert said.endswith("exit 3\n")
    assert "not all of it could be removed" in said
    assert (
        "-j KNP-"
        not in space(f"iptables-{variant}-save", "-t", "mangle")
        .replace("-A PREROUTING -p tcp -j KNP-OK", "")
        .partition("-A KNP-")[0]
    )
    assert "KNP-" not in space(f"ip6tables-{variant}-save")
    assert not [s for s in space("ipset", "list", "-n").split() if s.endswith("MAP6")]


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_cleanup_removes_one_family_where_the_other_has_no_tools(space, variant, tmp_path):
    space("ipset", "restore", text=rendered(space, "--only", "sets"))
    text = rendered(space, "--only", "rules", "--family", "4")
    space(f"iptables-{variant}-restore", "--noflush", text=text)
    # A folder with everything that is on the path, but for the tools of one family.
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in ("/usr/sbin", "/sbin", "/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if not tool.name.startswith("ip6tables") and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)

    words = ctl("cleanup", "--socket", str(tmp_path / "none.sock"))
    said = space("env", f"PATH={tools}", "sh", "-c", '"$@" 2>&1; echo "exit $?"', "sh", *words)

    assert "ip6tables-nft-save" in said
    assert said.endswith("exit 0\n")
    assert "KNP-" not in space(f"iptables-{variant}-save")
    assert space("ipset", "list", "-n") == ""
