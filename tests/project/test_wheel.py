"""The wheel as a user gets it: what is in it, what it asks for, and its commands in a clean environment.

The clean environment is a new venv that holds the wheel alone and borrows the third-party packages of the
one that runs the tests (a torch of its own would take minutes); the checkout is out of its reach, and the
list of what the wheel asks for is checked against what its code imports.
"""

from __future__ import annotations

import ast
import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_tree import LEAVES, REPO_ROOT, imports_of, project_files, scripts

# Needed by the packages that we import, through a door that only opens when they are there.
NEEDED_BY_OTHERS = {
    "gguf": "transformers reads GGUF models through it",
    "bitsandbytes": "transformers loads 8-bit and 4-bit base models through it",
    "h11": "a floor: uvicorn reads requests with it, and older ones have a hole",
    "urllib3": "a floor: requests fetches with it, and older ones have holes",
    "pillow": "a floor: matplotlib writes pictures with it, and older ones have holes",
    "peft": "reads the adapter folders that lora.py exports",
}
pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in project_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO_ROOT / path, source / path)
    result = run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), "."], cwd=source)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of console commands of a new environment that has the wheel."""
    home = tmp_path_factory.mktemp("env")
    made = run([sys.executable, "-m", "venv", "--without-pip", str(home)], cwd=home)
    assert made.returncode == 0, made.stderr
    python = home / "bin" / "python"
    installed = run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index", str(wheel)],
        cwd=home,
    )
    assert installed.returncode == 0, installed.stderr
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def requirements_file(name: str) -> set[str]:
    lines = [line.split("#", 1)[0].strip() for line in (REPO_ROOT / name).read_text(encoding="utf-8").splitlines()]
    return {normal(line) for line in lines if line}


def normal(line: str) -> str:
    requirement = Requirement(line)
    return f"{canonicalize_name(requirement.name)}{requirement.specifier}"


def required(metadata: email.message.Message, extras: bool) -> list[Requirement]:
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return [requirement for requirement in found if extras or "extra" not in str(requirement.marker or "")]


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = configparser.ConfigParser()
        entry_points.read_string(
            archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        )
    stems = [name.removesuffix(".py") for name in scripts()]
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"stocklora", *[f"{stem}.py" for stem in [*stems, *LEAVES]]}
    sources = {path.as_posix() for path in project_files() if path.parts[0] == "stocklora"}
    assert sources <= set(names)
    samples = {path.name for path in project_files() if path.parts[:2] == ("data", "sample")}
    assert {name.rpartition("/")[2] for name in names if name.startswith("stocklora/_sample/")} == samples
    assert any(name.endswith("LICENSE") for name in names)
    wanted = {f"stocklora-{stem.replace('_', '-')}": f"{stem}:main" for stem in stems}
    assert dict(entry_points["console_scripts"]) == wanted


def test_it_asks_for_what_requirements_txt_lists(metadata: email.message.Message) -> None:
    asked = {normal(f"{item.name}{item.specifier}") for item in required(metadata, extras=False)}
    assert asked == requirements_file("requirements.txt")


def test_it_asks_for_all_that_its_code_imports(wheel: Path, metadata: email.message.Message) -> None:
    homes = packages_distributions()
    asked = [item for item in required(metadata, extras=True) if "dev" not in str(item.marker)]
    listed = {canonicalize_name(item.name) for item in asked}
    always = {canonicalize_name(item.name) for item in required(metadata, extras=False)}
    ours = {"stocklora", *LEAVES}
    used: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".py"):
                continue
            for module, line in imports_of(ast.parse(archive.read(name))):
                root = module.split(".")[0]
                if root in sys.stdlib_module_names or root in ours:
                    continue
                distributions = {canonicalize_name(home) for home in homes.get(root, [root])}
                assert distributions & listed, f"{name}:{line}: {module} is in no requirement"
                used |= distributions & listed
            for module, line in imports_of(ast.parse(archive.read(name)), top_level_only=True):
                distributions = {canonicalize_name(home) for home in homes.get(module.split(".")[0], [])}
                assert not distributions or distributions & always, f"{name}:{line}: {module} is optional"
    idle = {canonicalize_name(item.name) for item in required(metadata, extras=False)} - used
    assert idle <= set(NEEDED_BY_OTHERS), f"required, but imported nowhere: {sorted(idle)}"


def test_the_pinned_versions_are_the_ones_running_and_lie_in_the_ranges() -> None:
    from importlib.metadata import version

    ranges = {canonicalize_name(Requirement(line).name): line for line in requirements_file("requirements.txt")}
    pins = requirements_file("requirements_stable.txt")
    assert {canonicalize_name(Requirement(line).name) for line in pins} == set(ranges)
    for line in pins | requirements_file("requirements-dev.txt"):
        name, pinned = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
        assert version(name).partition("+")[0] == pinned
        if name in ranges:
            assert pinned in Requirement(ranges[name]).specifier


def test_commands_in_a_clean_environment(commands: Path, tmp_path: Path) -> None:
    where = run([str(commands / "python"), "-c", "import stocklora, lora; print(stocklora.__file__)"], cwd=tmp_path)
    assert where.stdout.startswith(str(commands.parent)), where.stderr
    for name in scripts():
        command = f"stocklora-{name.removesuffix('.py').replace('_', '-')}"
        shown = run([str(commands / command), "--help"], cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert "usage:" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_prices_training_and_forecast_in_a_clean_environment(commands: Path, tmp_path: Path) -> None:
    for command in (
        ["stocklora-download", "--source", "sample", "--ticker", "AAPL", "--period", "1y"],
        ["stocklora-train", "--data", "sample_test.csv", "--epochs", "3"],
        ["stocklora-framework"],
    ):
        result = run([str(commands / command[0]), *command[1:]], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("AAPL,")
