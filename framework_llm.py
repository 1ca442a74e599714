"""Forecast the next three closes with a fine-tuned language model.

    python framework_llm.py --test_csv sample_test.csv --model_path ./Qwen3-0.6B \\
        --lora_weights ./checkpoints/best_lora_weights.pth --output predictions.csv
    python framework_llm.py --test_csv prices/ --model_path models/smollm2-135m --plot forecast.png
    python framework_llm.py --ticker AAPL MSFT                 # downloads fresh prices itself
    python framework_llm.py --ticker AAPL --explain --paths 1000 --above 280 --below 250
    python framework_llm.py --ticker AAPL --watch 15           # stays; forecasts anew after each close
    python framework_llm.py --test_csv sample_test.csv --lora_weights a.pth b.pth c.pth --ensemble median
    python framework_llm.py --ticker AAPL --lora_weights a.pth b.pth --model_path ./Qwen3-0.6B ./models/gpt2-medium
    python framework_llm.py --ticker AAPL --lora_weights a.pth:0.7 b.pth:0.3     # one model, averaged weights
    python framework_llm.py --ticker AAPL --model_path merged --lora_weights merged     # what merge_lora.py wrote

Window, prompt, horizon and LoRA settings come from the weights file. Writes one row a ticker and day:
Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95.
Exit code 0: all is forecast; 1: some of --ticker did not come, the others are forecast; 2: nothing was written,
and the line says why.
"""

from __future__ import annotations

import sys

from stocklora.cli.settings import SettingsParser
from stocklora.forecaster.settings import ForecastSettings


def build_parser() -> SettingsParser:
    return SettingsParser("framework_llm.py", __doc__, ForecastSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: ForecastSettings) -> int:
    from stocklora.forecaster.run import forecast_prices

    return forecast_prices(settings)


if __name__ == "__main__":
    sys.exit(main())
