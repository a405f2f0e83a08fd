"""`lab up --proxy`: what the agents are told, and what is said where the kernel has no IPVS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netpol import config
from netpol.lab import agents
from netpol.lab.cli import main
from netpol.lab.plan import LabPlan


def words(plan: LabPlan) -> list[str]:
    (node, *_) = plan.nodes
    made = agents.command(plan, node, api_url="http://172.31.0.1:6443", path=Path("token"))
    return made[made.index("netpol") + 1 :]


def test_agents_serve_services_where_the_lab_was_asked_to(tmp_path: Path) -> None:
    plan = LabPlan(name="x", state_root=tmp_path, proxy=True)
    assert LabPlan.from_json(plan.as_json()) == plan
    given = words(plan)
    args = config.parser().parse_args(given)
    args.token_file = None  # made when the lab is up
    settings = config.load(args, {}, host_name="n")
    assert settings.proxy
    assert settings.service_ranges == plan.service_cidrs
    assert settings.run_dir.startswith(str(tmp_path))
    assert "--proxy" not in words(LabPlan(name="x", state_root=tmp_path))


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_kernel_without_ipvs_is_said_before_anything_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = agents.missing_proxy()
    if fault is None:
        pytest.skip("this kernel has IPVS")
    assert main(["lab", "up", "--proxy", "--name", "knptnone"]) == 3
    said = capsys.readouterr().err
    assert "this machine's kernel cannot serve Services; needed a kernel with IPVS" in said
