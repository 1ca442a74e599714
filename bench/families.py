"""Every family of base models through the scripts: trains, forecasts, merges, exports to PEFT, trains in 4 bits.

    python bench/families.py                                # all of tests/fixtures/families.py, and docs/base_models.md
    python bench/families.py --families "Qwen 3" Mamba      # these alone, as a table on the terminal

Each is a tiny random model. What a script says when it refuses is a note; a traceback is a fault of ours and ends up in
the table too. After the one epoch the adapters are set to random numbers, so that everything compared depends on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness import ROOT, run_benchmark

sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
PAGE = ROOT / "docs" / "base_models.md"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", help="of tests/fixtures/families.py (default: all)", metavar="NAME")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from families import FAMILIES
    from family_runs import page, run_families, table

    from stocklora.cli.console import UserError, print_table, say
    from stocklora.runtime.files import write_text

    if unknown := [name for name in arguments.families or [] if name not in FAMILIES]:
        raise UserError(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    outcomes = run_families(arguments.families or list(FAMILIES))
    header, rows = table(outcomes)
    print_table("", header, rows)
    if arguments.families is None:
        write_text(PAGE, page(outcomes))
        say(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
