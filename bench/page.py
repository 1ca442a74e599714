"""How soon the page is there with 2,000 tickers in its list, and how smoothly the list scrolls.

    python bench/page.py                    # writes bench/results/page.json
    python bench/page.py --tickers 10000

Needs Chromium (Debian: apt install chromium) and playwright (requirements-dev.txt). The first visit, on which prices
are read, is told apart from later ones of a server that was started anew.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, run_benchmark, save_result

SCROLL = """() => new Promise((done) => {
    const box = document.querySelector(".vlist");
    const times = [];
    let last = performance.now();
    const step = (now) => {
        times.push(now - last);
        last = now;
        box.scrollTop += 300;
        if (times.length < 180) requestAnimationFrame(step);
        else done(times.slice(1));
    };
    requestAnimationFrame(step);
})"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tickers", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5, help="visits after the first (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "page.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.cli.console import UserError, say

    if arguments.tickers < 1:
        raise UserError(f"--tickers must be at least 1, got {arguments.tickers}")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        say("no Chromium here, nothing measured; on Debian: apt install chromium")
        return 0
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise UserError("bench/page.py needs playwright; install: pip install -r requirements-dev.txt") from None
    sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
    from web_workspaces import write_many

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_many(Path(folder), arguments.tickers)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        first = visit(browser, Path(folder), arguments.tickers)
        visits = [visit(browser, Path(folder), arguments.tickers) for _ in range(arguments.runs)]
        browser.close()
    middle = {name: round(statistics.median(one[name] for one in visits), 1) for name in first}
    say(f"{arguments.tickers:,} tickers; the first visit, prices being read: rows after {first['rows_ms']:,.0f} ms")
    for name, value in middle.items():
        say(f"{name:<22} {value:,.1f}")
    save_result(
        arguments.output, {"tickers": arguments.tickers, "first_visit": first, "median": middle, "runs": visits}
    )
    return 0


def visit(browser: Any, folder: Path, tickers: int) -> dict[str, float]:
    """One visit of a server that has just started, in a browser that keeps nothing.

    Returns:
        Milliseconds from the navigation's start to ``first_paint_ms`` and to the first rows (``rows_ms``), and of the
        frames while the list scrolls their median and their 95th percentile.
    """
    options = ["--workspace", str(folder), "--port", "0", "--no-open"]
    server = subprocess.Popen([sys.executable, str(ROOT / "web.py"), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(line for line in server.stdout if line.startswith("page: ")).split()[1]
        page = browser.new_page(viewport={"width": 1360, "height": 820})
        start = time.perf_counter()
        page.goto(address, wait_until="commit")
        page.locator(".vrow").first.wait_for(timeout=120_000)
        rows_ms = 1000 * (time.perf_counter() - start)
        page.get_by_text(f"{tickers:,} tickers").wait_for(timeout=120_000)
        paint = page.evaluate("performance.getEntriesByName('first-paint')[0].startTime")
        frames = page.evaluate(SCROLL)
        page.close()
    finally:
        server.terminate()
        server.wait()
    return {
        "first_paint_ms": round(paint, 1), "rows_ms": round(rows_ms, 1),
        "frame_median_ms": round(statistics.median(frames), 1),
        "frame_95th_ms": round(statistics.quantiles(frames, n=20)[-1], 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
