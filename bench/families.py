"""Every family of base models through the scripts: trains, forecasts, merges, exports to PEFT, trains in 4 bits.

    python bench/families.py                                # all of tests/fixtures/families.py, and docs/base_models.md
    python bench/families.py --families "Qwen 3" Mamba      # these alone, as a table on the terminal
    python bench/families.py --families "Qwen 3" --update   # and their rows on the page

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
    parser.add_argument("--update", action="store_true", help="write the rows of --families into the page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from families import FAMILIES
    from family_runs import HEADER, page, row_of, rows_on_page, run_families

    from stocklora.cli.console import UserError, print_table, say
    from stocklora.runtime.files import write_text

    if unknown := [name for name in arguments.families or [] if name not in FAMILIES]:
        raise UserError(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    rows: dict[str, list[str]] = {}
    for name, outcome in run_families(arguments.families or list(FAMILIES)):
        rows[name] = row_of(name, outcome)
        if arguments.families is None or arguments.update:  # at once: a run that is cut off was not for nothing
            on_page = rows_on_page(PAGE.read_text(encoding="utf-8")) | rows
            write_text(PAGE, page([on_page[family] for family in FAMILIES if family in on_page]))
            say(f"{name}: {' '.join(rows[name][2:-1])}")
    print_table("", HEADER, list(rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
