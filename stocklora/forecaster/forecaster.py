"""A trained forecaster: built from a specification, loaded from a weights file, asked for the next closes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llm_model import StockForecaster, facts_of
from lora import LoRAError
from stocklora.base_models.folders import check_model_folder, describe_model
from stocklora.base_models.loading import backbone_config, is_causal, load_backbone, quiet_transformers
from stocklora.base_models.quantized import check_quantization
from stocklora.cli.console import UserError, warn
from stocklora.dataset.prepare import Example, make_examples
from stocklora.dataset.prompts import DayEncoder, check_lengths
from stocklora.dataset.windows import DaySequence, last_origin, pack
from stocklora.forecaster.batches import predict
from stocklora.forecaster.methods import load_trained_state, put_on
from stocklora.forecaster.predictions import prediction_rows
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, load_weights
from stocklora.metrics.calibration import Calibration
from stocklora.runtime.machine import memory_errors
from stocklora.volatility.market import Markets, markets_of
from stocklora.volatility.scales import VolatilityScale

LESS_MEMORY = "--batch_size 1, --gradient_checkpointing, --backbone_layers 8, a smaller base model"


@dataclass
class Forecaster:
    """A model with all that turns prices into forecasts.

    Attributes:
        context_tokens: what the base model can read at once.
    """

    model: StockForecaster
    spec: ForecasterSpec
    encoder: DayEncoder
    device: torch.device
    context_tokens: int

    @property
    def levels(self) -> np.ndarray:
        return np.array(self.spec.levels)

    @property
    def scale(self) -> VolatilityScale:
        return VolatilityScale.from_dict(self.spec.scale)

    def examples(self, prices: Mapping[str, pd.DataFrame], sequences: Sequence[DaySequence]) -> list[Example]:
        """Encode sequences; an error rather than a cut when one outgrows the model's context."""
        examples = make_examples(prices, sequences, self.encoder, self.scale.on(prices))
        check_lengths([example.encoded for example in examples], self.context_tokens)
        return examples

    def packed_examples(self, prices: Mapping[str, pd.DataFrame], origins: Mapping[str, range]) -> list[Example]:
        """Examples that forecast from consecutive rows of each ticker, in order; shorter where days write long lines.

        Raises:
            UserError: a single window outgrows the model's context.
        """
        targets = self.spec.targets_per_sequence
        scales, markets = self.scale.on(prices), markets_of(prices)
        while True:
            sequences = [
                sequence
                for name, rows in origins.items()
                for sequence in pack(name, rows, self.spec.window_size, targets)
            ]
            examples = make_examples(prices, sequences, self.encoder, scales, markets)
            longest = max((len(example.encoded.input_ids) for example in examples), default=0)
            if targets == 1 or longest <= self.context_tokens:
                check_lengths([example.encoded for example in examples], self.context_tokens)
                return examples
            targets = max(1, int(0.9 * targets * self.context_tokens / longest))

    def quantiles(self, examples: Sequence[Example], calibrated: bool = True) -> np.ndarray:
        """(origins, horizon, levels) quantiles of the log return, examples in order."""
        raw = predict(self.model, examples, self.device)
        return Calibration.from_dict(self.spec.calibration).apply(raw, self.levels) if calibrated else raw

    def forecast(
        self, prices: Mapping[str, pd.DataFrame], beside: Mapping[str, pd.DataFrame] | None = None
    ) -> list[dict[str, Any]]:
        """The next closes of every ticker from its last row; rows of ``predictions.csv``.

        Args:
            beside: tickers that are not forecast but are part of the market that scale and indicators read.

        Raises:
            UserError: a ticker with fewer days than the window needs.
        """
        window = self.spec.window_size
        short = [f"{name} ({len(frame)})" for name, frame in prices.items() if len(frame) < window + 1]
        known = {name: frame for name, frame in prices.items() if len(frame) >= window + 1}
        if short:
            message = (
                f"a forecast needs {window + 1} rows (the {window} days of the window and the close before them); too "
                f"few for {', '.join(short)}"
            )
            if not known:
                raise UserError(f"{message}; download more days")
            warn(f"{message}; left out")
        everything = {**known, **(beside or {})}
        surprised, markets = self.scale.markets_of(everything), markets_of(everything)
        scales = {name: self.scale.at(frame, surprised.of(name)) for name, frame in known.items()}
        quantiles = self.quantiles([self._last_example(name, frame, scales, markets) for name, frame in known.items()])
        return [
            row
            for index, (name, frame) in enumerate(known.items())
            for row in prediction_rows(name, frame, quantiles[index], self.levels)
        ]

    def _last_example(
        self, name: str, frame: pd.DataFrame, scales: Mapping[str, np.ndarray], markets: Markets
    ) -> Example:
        """The last row as origin, with as much past as in training, less where wild days make long lines."""
        targets = self.spec.targets_per_sequence
        while True:
            sequence = last_origin(name, len(frame), self.spec.window_size, targets)
            (example,) = make_examples({name: frame}, [sequence], self.encoder, scales, markets)
            if targets == 1 or len(example.encoded.input_ids) <= self.context_tokens:
                check_lengths([example.encoded], self.context_tokens)
                return example
            targets = max(1, targets - 5)


def load_encoder(
    model_path: Path,
    prompt: str,
    trust_remote_code: bool = False,
    indicators: Sequence[str] = (),
    *,
    anonymize: bool = True,
) -> DayEncoder:
    """The base model's tokenizer, for one prompt format."""
    from transformers import AutoTokenizer

    quiet_transformers()
    check_model_folder(model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(model_path, "tokenizer", error) from None
    return DayEncoder(tokenizer, prompt, indicators, anonymize=anonymize)


def context_tokens_of(model_path: Path, trust_remote_code: bool = False) -> int:
    try:
        return facts_of(backbone_config(model_path, None, trust_remote_code)).context_tokens
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _unloadable(model_path, "configuration", error) from None


def build_forecaster(
    spec: ForecasterSpec,
    model_path: Path,
    encoder: DayEncoder,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    *,
    fresh: bool = True,
) -> Forecaster:
    """Base model, fresh adapters, head at the starting quantiles: a forecaster that has learned nothing yet.

    Args:
        dtype: what the base computes in. Weights that all train are kept in float32 all the same.
        fresh: False if ``load_trained_state`` follows: nothing is worked out that the state brings.

    Raises:
        UserError: a base model that cannot be loaded or quantized, or adapter targets that it doesn't have.
    """
    quiet_transformers()
    check_model_folder(model_path)
    check_quantization(spec.quantization, device, f"--quantization {spec.quantization}")
    full = spec.method == "full"
    try:
        with memory_errors(LESS_MEMORY):
            backbone = load_backbone(
                model_path,
                torch.float32 if full else dtype,
                spec.backbone_layers,
                trust_remote_code,
                spec.quantization,
                device,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _unloadable(model_path, "weights", error) from None
    if not is_causal(backbone):
        raise UserError(
            f"{model_path} is no causal language model: its forecasts would see the days after them; choose one that "
            f"generates text, such as Qwen3, Llama or GPT-2"
        )
    table = torch.tensor(spec.table, dtype=torch.float64)
    model = StockForecaster(backbone, table, torch.tensor(spec.location or [0.0] * spec.horizon))
    if full and dtype != torch.float32:
        model.autocast_dtype = dtype
    put_on(model, spec.method, spec.lora, fresh)
    context = context_tokens_of(model_path, trust_remote_code)
    with memory_errors(LESS_MEMORY):
        return Forecaster(model.to(device), spec, encoder, device, context)


def load_forecaster(
    weights_path: Path,
    model_path: Path,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[Forecaster, WeightsFile]:
    """A trained forecaster from its weights file and the base model's folder.

    Raises:
        UserError: damaged weights, a base model other than the one they were trained on.
    """
    content = load_weights(weights_path)
    return assemble(content, weights_path, model_path, device, dtype, trust_remote_code), content


def assemble(
    content: WeightsFile,
    weights_path: Path,
    model_path: Path,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Forecaster:
    """A trained forecaster from what a weights file holds.

    Args:
        weights_path: how messages name ``content``.

    Raises:
        UserError: a base model other than the one it was trained on.
    """
    check_base(content.spec, weights_path, model_path)
    spec = content.spec
    encoder = load_encoder(model_path, spec.prompt, trust_remote_code, spec.indicators, anonymize=spec.anonymize)
    forecaster = build_forecaster(spec, model_path, encoder, device, dtype, trust_remote_code, fresh=False)
    try:
        load_trained_state(forecaster.model, {"adapters": content.adapters, "head": content.head})
    except (LoRAError, RuntimeError) as error:
        raise UserError(f"{weights_path} does not fit {model_path}: {error}") from None
    forecaster.model.eval()
    return forecaster


def check_base(spec: ForecasterSpec, weights_path: Path, model_path: Path) -> None:
    """Warn of another revision of the base model than the weights were trained on; refuse another model.

    Raises:
        UserError: another model, or none.
    """
    check_model_folder(model_path)
    trained_on, given = spec.base_model, describe_model(model_path)
    if trained_on["config_sha256"] != given["config_sha256"]:
        raise UserError(
            f"{weights_path} was trained on {trained_on['name']}, but {model_path} is another model; give --model_path "
            f"the folder of {trained_on['name']}"
        )
    if trained_on["revision"] != given["revision"]:
        warn(
            f"{weights_path} was trained on revision {trained_on['revision']} of {trained_on['name']}, but "
            f"{model_path} is {given['revision']}: the forecast may differ"
        )


def _unloadable(model_path: Path, what: str, error: Exception) -> UserError:
    hint = ""
    if "trust_remote_code" in str(error):
        hint = " (it brings Python code of its own: add --trust_remote_code if you trust its author)"
    return UserError(f"cannot load the {what} of the base model in {model_path}: {str(error)[:300]}{hint}")
