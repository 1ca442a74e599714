"""A trained forecaster: built from a specification, loaded from a weights file, asked for the next closes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llm_model import StockForecaster
from lora import LoRAError
from stocklora.adapters.survey import LayerKind, survey_of
from stocklora.base_models.loading import (
    UNLOADABLE,
    BaseModel,
    a_few_tokens,
    differences,
    hidden_states,
    is_causal,
    load_backbone,
    quiet_transformers,
    unloadable,
)
from stocklora.base_models.quantized import check_quantization
from stocklora.cli.console import UserError, listed, warn
from stocklora.dataset.prepare import Example, fitted_to_context, make_examples, split_by_rows
from stocklora.dataset.prompts import DayEncoder, check_lengths
from stocklora.dataset.windows import DaySequence, last_origin, pack
from stocklora.forecaster.batches import predict
from stocklora.forecaster.methods import attach, freeze_first_layers, load_trained_state, sound_targets
from stocklora.forecaster.predictions import prediction_rows
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, load_weights
from stocklora.metrics.calibration import Calibration
from stocklora.runtime.machine import memory_errors
from stocklora.volatility.market import Markets, markets_of
from stocklora.volatility.scales import VolatilityScale

LESS_MEMORY = "--batch_size 1, --gradient_checkpointing, --adapt_layers 8, --backbone_layers 8, a smaller base"


@dataclass
class Forecaster:
    """A model with all that turns prices into forecasts.

    Attributes:
        context_tokens: what the base model can read at once.
        survey: what of the base is adapted and what is not, where it was built for training.
    """

    model: StockForecaster
    spec: ForecasterSpec
    encoder: DayEncoder
    device: torch.device
    context_tokens: int
    survey: list[LayerKind] = field(default_factory=list)

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

    def packed_examples(
        self,
        prices: Mapping[str, pd.DataFrame],
        origins: Mapping[str, range],
        scales: Mapping[str, np.ndarray] | None = None,
        markets: Markets | None = None,
    ) -> list[Example]:
        """Examples that forecast from consecutive rows of each ticker, in order; shorter where days write long lines.

        Args:
            scales: ticker -> (days, horizon). markets: of all tickers. Both by default those of ``prices``.

        Raises:
            UserError: a single window outgrows the model's context.
        """
        scales = self.scale.on(prices) if scales is None else scales
        markets = markets_of(prices) if markets is None else markets

        def examples_of(targets: int) -> list[Example]:
            window = self.spec.window_size
            sequences = [sequence for name, rows in origins.items() for sequence in pack(name, rows, window, targets)]
            return make_examples(prices, sequences, self.encoder, scales, markets)

        return fitted_to_context(examples_of, self.spec.targets_per_sequence, self.context_tokens)[1]

    def quantiles(self, examples: Sequence[Example], calibrated: bool = True) -> np.ndarray:
        """(origins, horizon, levels) quantiles of the log return, examples in order."""
        raw = predict(self.model, examples, self.device)
        return Calibration.from_dict(self.spec.calibration).apply(raw, self.levels) if calibrated else raw

    def forecast(
        self, prices: Mapping[str, pd.DataFrame], market_only: Mapping[str, pd.DataFrame] | None = None
    ) -> list[dict[str, Any]]:
        """The next closes of every ticker from its last row; rows of ``predictions.csv``.

        Args:
            market_only: tickers that are not forecast but are part of the market that scale and indicators read.

        Raises:
            UserError: a ticker with fewer days than the window needs.
        """
        known = with_enough_days(prices, self.spec.window_size, "the window")
        scales = self.scale.on(known, market_only or {})
        # Only day lines with the market's day in them read it.
        read = "market" in self.spec.indicators
        markets = markets_of({**known, **(market_only or {})}) if read else None
        examples = [self._last_example(name, frame, scales, markets) for name, frame in known.items()]
        # By length there is little padding, and the longest first ask for all the memory that the others need.
        order = sorted(range(len(examples)), key=lambda index: -len(examples[index].encoded.input_ids))
        quantiles = self.quantiles([examples[index] for index in order])[np.argsort(order)]
        return [
            row
            for index, (name, frame) in enumerate(known.items())
            for row in prediction_rows(name, frame, quantiles[index], self.levels)
        ]

    def _last_example(
        self, name: str, frame: pd.DataFrame, scales: Mapping[str, np.ndarray], markets: Markets | None
    ) -> Example:
        """The last row as origin, with as much past as in training, less where wild days make long lines."""

        def example_of(targets: int) -> list[Example]:
            sequence = last_origin(name, len(frame), self.spec.window_size, targets)
            return make_examples({name: frame}, [sequence], self.encoder, scales, markets)

        _, (example,) = fitted_to_context(
            example_of, self.spec.targets_per_sequence, self.context_tokens, fewer=lambda targets, _: targets - 5
        )
        return example


def with_enough_days(prices: Mapping[str, pd.DataFrame], window_size: int, window: str) -> dict[str, pd.DataFrame]:
    """The tickers with a window of days and the close before them; a warning names the others.

    Args:
        window: how messages name what has ``window_size`` days.

    Raises:
        UserError: no ticker has them.
    """
    known, short = split_by_rows(prices, window_size + 1)
    if short:
        message = (
            f"a forecast needs {window_size + 1} rows (the {window_size} days of {window} and the close before them); "
            f"too few for {', '.join(short)}"
        )
        if not known:
            raise UserError(f"{message}; download more days")
        warn(f"{message}; left out")
    return known


def build_forecaster(
    spec: ForecasterSpec,
    base: BaseModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fresh: bool = True,
    probe: bool = False,
) -> Forecaster:
    """Base model, fresh adapters, head at the starting quantiles: a forecaster that has learned nothing yet.

    Args:
        base: whose folder has been checked.
        dtype: what the base computes in. Weights that all train are kept in float32 all the same.
        fresh: False if ``load_trained_state`` follows: nothing is worked out that the state brings.
        probe: for training: leave out the layers of ``all-linear`` that an adapter would be lost on, and those that
            ``spec.adapt_layers`` leaves alone. What comes of it is named in the forecaster's specification.

    Raises:
        UserError: a base model that cannot be loaded or quantized, or adapter targets that it doesn't have.
    """
    encoder = DayEncoder(base.tokenizer, spec.prompt, spec.indicators, anonymize=spec.anonymize)
    quiet_transformers()
    check_quantization(spec.quantization, device, f"--quantization {spec.quantization}")
    full = spec.method == "full"
    try:
        with memory_errors(LESS_MEMORY):
            backbone = load_backbone(
                base.path, torch.float32 if full else dtype, spec.backbone_layers, base.trust_remote_code,
                spec.quantization, device, base.config,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except UNLOADABLE as error:
        raise unloadable(base.path, "weights", error, spec.backbone_layers) from None
    check_vocabulary(backbone, base)
    width = width_of_causal(backbone, base.path)
    table = torch.tensor(spec.table, dtype=torch.float64)
    model = StockForecaster(backbone, table, torch.tensor(spec.location or [0.0] * spec.horizon), width)
    if full and dtype != torch.float32:
        model.autocast_dtype = dtype
    survey: list[LayerKind] = []
    if probe:
        with memory_errors(LESS_MEMORY):
            fields, lost = sound_targets(model, spec.lora, spec.adapt_layers)
            if spec.adapt_layers is not None:
                freeze_first_layers(model, spec.adapt_layers)
        spec = replace(spec, lora=fields)
        survey = survey_of(backbone, fields, lost)
    attach(model, spec.method, spec.lora, fresh)
    with memory_errors(LESS_MEMORY):
        return Forecaster(model.to(device), spec, encoder, device, base.context_tokens, survey)


def check_vocabulary(backbone: Any, base: BaseModel) -> None:
    """Refuse a tokenizer that writes numbers in tokens which the base has no embeddings for.

    Raises:
        UserError: naming both sizes.
    """
    try:
        known = int(backbone.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return
    if len(base.tokenizer) <= known:
        return
    text = " ".join(f"{number} -{number}" for number in range(1000)) + "\nDay: Open=1.5, High, Low, Close, Volume=\n"
    highest = max(base.tokenizer(text)["input_ids"])
    if highest >= known:
        raise UserError(
            f"the tokenizer in {base.path} writes token {highest}, and the model there has embeddings for {known:,} "
            f"tokens alone: they are not of one model; fetch it again (download_model.py)"
        )


def width_of_causal(backbone: torch.nn.Module, path: Path) -> int:
    """The width of a base model's hidden states, tried on a few tokens.

    Raises:
        UserError: no such model can be computed with here, or it is none that reads from left to right.
    """
    not_causal = UserError(
        f"{path} is no causal language model: its forecasts would see the days after them; choose one that "
        f"generates text, such as Qwen3, Llama or GPT-2"
    )
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise not_causal
    try:
        with torch.no_grad():
            width = hidden_states(backbone, a_few_tokens(backbone)).shape[-1]
        causal = is_causal(backbone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code may fail in any way
        raise unloadable(path, "layers", error) from None
    if not causal:
        raise not_causal
    return width


def load_forecaster(
    weights_path: Path, model_path: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
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
    base = BaseModel(model_path, trust_remote_code)
    check_base(content.spec, weights_path, base)
    forecaster = build_forecaster(content.spec, base, device, dtype, fresh=False)
    try:
        load_trained_state(forecaster.model, {"adapters": content.adapters, "head": content.head})
    except (LoRAError, RuntimeError) as error:
        raise UserError(f"{weights_path} does not fit {model_path}: {error}") from None
    forecaster.model.eval()
    return forecaster


def check_base(spec: ForecasterSpec, weights_path: Path, base: BaseModel) -> None:
    """Warn of another revision of the base model than the weights were trained on; refuse another model.

    Raises:
        UserError: another model.
    """
    trained_on, given = spec.base_model, base.description
    if trained_on["config_sha256"] != given["config_sha256"]:
        stored = trained_on.get("config")
        changed = differences(stored, base) if stored else [""]
        if changed:
            how = f" ({listed(changed, 3)})" if stored else ""
            raise UserError(
                f"{weights_path} was trained on {trained_on['name']}, but {base.path} is another model{how}; give "
                f"--model_path the folder of {trained_on['name']}"
            )
    if trained_on["revision"] != given["revision"]:
        warn(
            f"{weights_path} was trained on revision {trained_on['revision']} of {trained_on['name']}, but "
            f"{base.path} is {given['revision']}: the forecast may differ"
        )
