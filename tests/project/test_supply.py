"""What is installed: files whose hashes are known, no release with a known hole, and under which licences."""

from __future__ import annotations

import re
import runpy

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from source_tree import REPO_ROOT

LOCKS = ("requirements.lock", "requirements-cuda.lock", "requirements-dev.lock")


def listed(name: str) -> dict[str, Requirement]:
    """The requirements in a file, by name."""
    lines = [line.partition("#")[0].strip() for line in (REPO_ROOT / name).read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(item.name): item for item in map(Requirement, filter(None, lines))}


def locked(name: str) -> dict[str, tuple[Version, int]]:
    """Of each package in a lock its version, and how many files it may be."""
    found = {}
    for block in re.split(r"\n(?=\w)", (REPO_ROOT / name).read_text(encoding="utf-8")):
        if entry := re.match(r"([\w.-]+)==([^\s;\\]+)", block):
            hashes = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
            found[canonicalize_name(entry[1])] = Version(entry[2]), hashes
    return found


ADVISORIES = listed("tests/fixtures/advisories.txt")


def lowest(requirement: Requirement) -> Version:
    return min(Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~="))


@pytest.mark.parametrize("name", ADVISORIES)
def test_no_release_with_a_known_hole_is_allowed(name: str) -> None:
    floor = lowest(ADVISORIES[name])
    text = (REPO_ROOT / "tests/fixtures/advisories.txt").read_text(encoding="utf-8")
    assert re.search(rf"^{name}>=\S+\s+# CVE-\d{{4}}-\d{{4,}}", text, re.MULTILINE), "an advisory's number"
    if name in (ranges := listed("requirements.txt")):
        assert lowest(ranges[name]) >= floor, "requirements.txt"
    for lock in LOCKS:
        if name in (versions := locked(lock)):
            assert versions[name][0] >= floor, lock


def test_the_build_backend_has_no_known_hole() -> None:
    text = (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'requires = \["(setuptools[^"]+)"\]', text)
    assert found
    assert lowest(Requirement(found[1])) >= lowest(ADVISORIES["setuptools"])


def test_each_file_of_a_lock_has_a_hash_and_all_that_is_pinned_is_locked() -> None:
    every = {name: entry for lock in LOCKS for name, entry in locked(lock).items()}
    assert len(every) > 150
    assert [name for name, (_, hashes) in every.items() if not hashes] == []
    for path in ("requirements_stable.txt", "requirements-dev.txt", "requirements-peers.txt"):
        for name, requirement in listed(path).items():
            assert requirement.specifier.contains(every[name][0]), f"{name} of {path}"
    assert set(listed("requirements_stable.txt")) <= set(locked("requirements.lock"))
    assert not any("nvidia" in name for name in locked("requirements.lock")), "gigabytes, for a CPU"


def test_the_locks_name_all_that_is_needed() -> None:
    """``make`` installs them with --no-deps: what a package asks for here must stand in one of them."""
    from importlib import metadata

    every = {name for lock in LOCKS for name in locked(lock)}
    missing = set()
    for name in locked("requirements.lock"):
        try:
            asked = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another system
            continue
        for item in map(Requirement, asked):
            if item.marker is None or item.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(item.name)} - every
    assert missing == set()


def test_make_installs_from_the_locks() -> None:
    text = (REPO_ROOT / "Makefile").read_text(encoding="utf-8")
    assert "LOCKED := --no-deps --require-hashes" in text
    installs = re.findall(r"\$\(PIP_INSTALL\) (.*)", text)
    assert len(installs) == 3
    assert all(line.startswith("$(LOCKED) -r requirements") for line in installs)


def test_every_licence_is_listed_as_the_package_says_it() -> None:
    script = runpy.run_path(str(REPO_ROOT / "scripts/make_licences.py"))
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", script["TABLE"].read_text(encoding="utf-8"), re.MULTILINE))
    for lock in script["LOCKS"]:
        for name in script["names_in"](REPO_ROOT / lock):
            said = script["licence_of"](name)
            assert name in rows
            assert said in (None, rows[name]), f"{name}; run scripts/make_licences.py"
