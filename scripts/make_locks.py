"""Write the lock files anew, with the hash of every file that may be installed. Needs uv and PyPI.

    pip install uv
    python scripts/make_locks.py

requirements.lock       what the program needs, all of it: `make` installs exactly these files
requirements-cuda.lock  what torch's build for Linux on PyPI needs beside, gigabytes; its CPU build does without
requirements-dev.lock   the tools behind `make test` and `make lint`, and the optional forecasters

Versions that a lock has now stay where the lists allow it; --upgrade takes the newest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_CUDA = re.compile(r"(nvidia|cuda)-|triton$")
# Files that lie on no PyPI: PyTorch's own CPU build, from its index or beside it (Python 3.11, Linux, x86-64).
ELSEWHERE = {"torch": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"]}
PYTHON = "3.11.7"


def compiled(lists: list[str], pins: list[str], *, with_dependencies: bool = True) -> dict[str, str]:
    """What ``uv pip compile`` makes of some lists: name -> its lines, version and hashes."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "constraints.txt"
        known.write_text("\n".join(pins), encoding="utf-8")
        options = ["--universal", "--generate-hashes", "--no-header", "--no-annotate", "--python-version", PYTHON]
        if not with_dependencies:
            options.append("--no-deps")
        command = ["uv", "pip", "compile", "--quiet", *options, "--constraints", str(known), *lists]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text.strip()):
        entries[block.partition("==")[0]] = block
    for name, hashes in ELSEWHERE.items():
        if name in entries:
            entries[name] += "".join(f" \\\n    --hash=sha256:{value}" for value in hashes)
    return entries


def pins_of(path: Path) -> list[str]:
    """``name==version`` of every entry of a lock."""
    return re.findall(r"^[\w.-]+==[^\s;\\]+", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else []


def write(name: str, what: str, entries: dict[str, str]) -> None:
    """Write a lock in the order of its names."""
    lines = [f"# {what}", f"# By scripts/make_locks.py: pip install --no-deps --require-hashes -r {name}"]
    lines += [entries[key] for key in sorted(entries)]
    (ROOT / name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{name}: {len(entries)} packages")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="do not keep the versions that the locks have now")
    arguments = parser.parse_args()
    locks = ("requirements.lock", "requirements-cuda.lock", "requirements-dev.lock")
    pins = [] if arguments.upgrade else [pin for name in locks for pin in pins_of(ROOT / name)]
    of_program = compiled(["requirements_stable.txt"], pins)
    of_all = compiled(["requirements_stable.txt", "requirements-dev.txt"], pins)
    peers = compiled(["requirements-peers.txt"], [], with_dependencies=False)
    cuda = {name: entry for name, entry in of_all.items() if OF_CUDA.match(name)}
    tools = {name: entry for name, entry in {**of_all, **peers}.items() if name not in {*of_program, *cuda}}
    if differing := [name for name in of_program if name not in cuda and of_program[name] != of_all.get(name)]:
        print(f"error: the tools want other versions of {', '.join(differing)}", file=sys.stderr)
        return 1
    write(locks[0], "What the program needs, indirectly too.", {n: e for n, e in of_program.items() if n not in cuda})
    write(locks[1], "What the build of torch that PyPI has for Linux needs beside; its CPU build does without.", cuda)
    write(locks[2], "The tools behind `make test` and `make lint`, and the optional forecasters.", tools)
    return 0


if __name__ == "__main__":
    sys.exit(main())
