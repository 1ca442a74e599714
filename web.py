"""A page on this machine: forecasts, training, backtests, the assistant and data, in a browser.

    python web.py                                   # prints the page's address, and opens it where there is a desktop
    python web.py --workspace demo                  # on what quick_start.py has just made
    python web.py --workspace . --port 9000 --no-open

Everything that the page does is one of the other scripts, run in a process of its own in the workspace folder; the page
shows its command, ready to copy. Runs go on when the page is closed and when this server ends, and are found again.
Only this machine can reach it, and only with the address that is printed. No network, no account.
"""

from __future__ import annotations

import sys

from stocklora.cli.settings import SERVER, SettingsParser, check_installed
from stocklora.web.settings import WebSettings


def build_parser() -> SettingsParser:
    return SettingsParser("web.py", __doc__, WebSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: WebSettings) -> None:
    check_installed(SERVER, "web.py")
    from stocklora.web.serve import serve_page

    serve_page(settings)


if __name__ == "__main__":
    sys.exit(main())
