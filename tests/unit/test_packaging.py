"""What gets installed: our packages under names that others use too, and commands that start."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import netpol
import proxy
import routes

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "netpol-agent"
SCRIPTS = {"netpol-agent", "netpol-ctl", "kubectl-netpol", "netpol-bird"}


def _project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, object] = tomllib.load(file)["project"]
    return project


@pytest.mark.parametrize("package", [netpol, proxy, routes], ids=lambda p: p.__name__)
def test_the_packages_are_ours(package: object) -> None:
    """Other distributions install packages named proxy and routes."""
    assert Path(str(package.__file__)).is_relative_to(ROOT)  # type: ignore[attr-defined]


def test_the_distribution_has_a_name_of_its_own() -> None:
    """`netpol` is another project's distribution."""
    found = metadata.distribution(DISTRIBUTION)
    assert found.name == _project()["name"] == DISTRIBUTION
    assert found.version == netpol.__version__
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.distribution("netpol")


def test_commands_lead_to_functions() -> None:
    found = {
        e.name: e
        for e in metadata.distribution(DISTRIBUTION).entry_points
        if e.group == "console_scripts"
    }
    assert set(found) == SCRIPTS
    assert {n: e.value for n, e in found.items()} == _project()["scripts"]
    assert all(callable(e.load()) for e in found.values())


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("netpol-ctl", "netpol-ctl"),
        ("kubectl-netpol", "kubectl netpol"),
        ("netpol-agent", None),
        ("netpol-bird", None),
    ],
)
def test_commands_start_and_know_what_they_are_called(script: str, says: str | None) -> None:
    program = Path(sys.executable).parent / script
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {says or script} ")


def test_types_are_shipped() -> None:
    assert (Path(netpol.__file__).parent / "py.typed").exists()


def test_the_image_has_all_packages_and_the_version_that_manifests_and_pages_name() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^COPY (\w+) /src/\1$", dockerfile, re.MULTILINE)) == {
        "netpol",
        "proxy",
        "routes",
    }
    tags = {
        page: set(
            re.findall(rf"{DISTRIBUTION}:([\w.]+\w)", (ROOT / page).read_text(encoding="utf-8"))
        )
        for page in ("manifests/daemonset.yaml", "README.md", "docs/operations.md")
    }
    assert tags == {page: {netpol.__version__} for page in tags}
