"""Write docs/licences.md: the licence of every package that the locks name, as its own metadata has it.

python scripts/make_licences.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"requirements.lock": "the program", "requirements-dev.lock": "its tests and tools"}
TABLE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of what is installed

Of every package that the locks name, as its own metadata has it; written by `scripts/make_licences.py`. stocklora
itself is under [its own licence](../LICENSE). What `requirements-cuda.lock` names is NVIDIA's, under NVIDIA's licences
(triton: MIT).
"""


def licence_of(name: str) -> str | None:
    """What a package's metadata says, in one line; None where it is not installed (one of another system's)."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    if expression := facts.get("License-Expression"):
        return expression.strip()
    kinds = [line.rpartition("::")[2].strip() for line in facts.get_all("Classifier") or [] if "License ::" in line]
    named = [kind for kind in kinds if kind != "OSI Approved"]
    if named:
        return ", ".join(dict.fromkeys(named))
    first = (facts.get("License") or "").strip().splitlines()
    return first[0][:60] if first else "not said"


def names_in(lock: Path) -> list[str]:
    return re.findall(r"^([\w.-]+)==", lock.read_text(encoding="utf-8"), re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    lines = [HEAD]
    for lock, what in LOCKS.items():
        lines += [f"\n## Needed by {what}\n", "| package | licence |", "|---|---|"]
        for name in names_in(ROOT / lock):
            lines.append(f"| {name} | {licence_of(name) or 'of another system, not installed here'} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{TABLE}: {sum(line.startswith('| ') for line in lines) - len(LOCKS)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
