"""One run of ``merge_lora.py``: a trained forecaster -> a plain model, or an adapter in PEFT's format.

What was trained is merged into the unquantized base, whatever the base was quantized to in training: rounding the
merged weights to 4 bits again would lose more than the adapter may have gained.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llm_model import StockForecaster, text_config_of
from lora import LoRAError, adapters_disabled
from stocklora.adapters.peft_check import check_peft, name_by_weight
from stocklora.base_models.folders import check_empty, check_files, copy_companions, describe_model, made_whole
from stocklora.base_models.loading import (
    BaseModel,
    a_few_tokens,
    first_layers,
    hidden_states,
    plain_backbone,
    unquantized_name,
)
from stocklora.cli.console import UserError, print_table, say
from stocklora.forecaster.forecaster import Forecaster, assemble, check_base, load_forecaster
from stocklora.forecaster.methods import merge_into_base
from stocklora.forecaster.settings import MergeSettings
from stocklora.forecaster.weights import HEAD_NAME, WeightsFile, load_weights, save_weights, write_folder
from stocklora.metrics.scores import BASIS_POINTS
from stocklora.runtime.files import sha256_of
from stocklora.runtime.machine import choose_device

MERGED_KEY = "stocklora_merged_from"  # in the merged model's configuration, so that it is not taken for its base
VERIFY_DAYS = 40  # forecasts of each ticker
VERIFY_TICKERS = 8


def merge(settings: MergeSettings) -> None:
    """Write what ``settings`` asks for, and say what it is.

    Raises:
        UserError: weights without anything to merge, another base model, or a folder that is there already.
    """
    content = load_weights(settings.lora_weights)
    base = BaseModel(settings.model_path, settings.trust_remote_code)
    check_base(content.spec, settings.lora_weights, base)
    if settings.output is not None and base.quantization != "none":
        raise UserError(
            f"{settings.model_path} is stored quantized ({base.quantization}), and adapters are merged into whole "
            f"weights: give --model_path {unquantized_name(settings.model_path)}"
        )
    method = content.spec.method
    if method == "head":
        raise UserError(
            f"{settings.lora_weights} has nothing to merge: its forecast head alone was trained (--method head), or it "
            f"is a merged model already"
        )
    if settings.export_peft is not None and method == "full":
        raise UserError(
            f"{settings.lora_weights} was trained with --method full and has no adapter to export; use --output"
        )
    for folder, flag in ((settings.output, "--output"), (settings.export_peft, "--export_peft")):
        if folder is not None:
            check_empty(folder, flag)
    device = choose_device(settings.device)
    if settings.export_peft is not None:
        export(settings.export_peft, content, settings, device)
    if settings.output is None:
        return
    write_merged(settings.output, content, settings, device)
    say(f"next: python framework_llm.py --model_path {settings.output} --lora_weights {settings.output}")
    if settings.verify:
        verify(settings.output, content, settings, device)


def export(folder: Path, content: WeightsFile, settings: MergeSettings, device: torch.device) -> None:
    """Write the adapter as PEFT does, with the head beside it, once PEFT has loaded it as the same function.

    Raises:
        UserError: PEFT would make something else of it.
    """
    ours = replace(content, spec=replace(content.spec, method="lora", quantization="none"))
    backbone: Any = assembled(ours, settings, device).model.backbone
    ids = a_few_tokens(backbone, 32)
    with made_whole(folder) as unfinished:
        write_folder(unfinished, content, backbone)
        with torch.no_grad():
            beside = hidden_states(backbone, ids)
            with adapters_disabled(backbone):
                untuned = hidden_states(backbone, ids)
        del backbone
        check_export(unfinished, settings, content, (ids, beside, untuned), device)
    say(f"adapter: {folder} (PEFT's format, and {HEAD_NAME} with head and calibration)")


def check_export(
    folder: Path, settings: MergeSettings, content: WeightsFile, ours: tuple[Tensor, Tensor, Tensor],
    device: torch.device,
) -> None:  # fmt: skip
    """Compare an adapter that PEFT loads over the base, as transformers makes it, with ours.

    Args:
        ours: (1, tokens) ids, the hidden states that our own layers give for them, and those of the base alone.

    Raises:
        UserError: naming what is different.
    """
    ids, beside, untuned = ours
    advice = "use --output for a merged model, or train on other layers (--target_modules)"

    def plain() -> Any:
        layers = content.spec.backbone_layers
        return plain_backbone(settings.model_path, layers, settings.trust_remote_code).to(device)

    try:
        try:
            loaded: Any = check_peft(folder, plain()).eval()
        except LoRAError:
            if not name_by_weight(folder):
                raise
            loaded = check_peft(folder, plain()).eval()
    except LoRAError as error:
        raise UserError(f"cannot export {settings.lora_weights}: {error}; {advice}") from None
    with torch.no_grad():
        apart = (hidden_states(loaded, ids) - beside).norm()
    if not bool(apart <= 1e-2 * (beside - untuned).norm() + 1e-5 * beside.norm()):
        share = float(apart / (beside - untuned).norm())
        raise UserError(
            f"cannot export {settings.lora_weights}: loaded by PEFT it would be another function, {100 * share:.2g}% "
            f"of the adapters' change away; {advice}"
        )


def write_merged(folder: Path, content: WeightsFile, settings: MergeSettings, device: torch.device) -> None:
    """A folder with a plain model, its tokenizer, and the forecast head; whole or not at all."""
    unquantized = replace(content, spec=replace(content.spec, quantization="none"))
    forecaster, weights = assembled(unquantized, settings, device), settings.lora_weights
    try:
        merge_into_base(forecaster.model)
    except (LoRAError, ValueError) as error:
        raise UserError(f"cannot merge {weights}: {error}") from None
    origin = sha256_of(weights / "adapter_model.safetensors" if weights.is_dir() else weights)
    with made_whole(folder) as unfinished:
        save_model(unfinished, forecaster.model, settings, content, origin)
        copy_companions(settings.model_path, unfinished)
        was = content.spec.base_model  # whose memory of the past the merged model still has
        base = describe_model(unfinished) | {"name": f"{was['name']} (merged)", "license": was.get("license")}
        spec = replace(
            content.spec, base_model=base, method="head", quantization="none", lora={}, backbone_layers=None,
            adapt_layers=None,
        )  # fmt: skip
        merged = {"weights": weights.name, "sha256": origin, "base": was}
        training = {**content.training, "merged_from": merged}
        save_weights(unfinished / HEAD_NAME, WeightsFile(spec, {}, content.head, training))
        check_files(unfinished, shown=folder, command="python merge_lora.py")
        size = sum(path.stat().st_size for path in unfinished.iterdir())
    quantized = content.spec.quantization
    trained = f", trained over {quantized.replace('bit', '-bit')} weights," if quantized != "none" else ""
    say(f"merged: {content.spec.method}{trained} into the unquantized {content.spec.base_model['name']}")
    say(f"model: {folder} ({size / 1e6:,.0f} MB)")


def assembled(content: WeightsFile, settings: MergeSettings, device: torch.device) -> Forecaster:
    """In float32, in which merging loses nothing that matters."""
    return assemble(
        content, settings.lora_weights, settings.model_path, device, torch.float32, settings.trust_remote_code
    )


def save_model(
    folder: Path, model: StockForecaster, settings: MergeSettings, content: WeightsFile, origin: str
) -> None:
    """The merged backbone in the class that the base was saved as, with its vocabulary head if it has one."""
    from transformers import AutoConfig

    backbone: Any = model.backbone
    config = AutoConfig.from_pretrained(settings.model_path, trust_remote_code=settings.trust_remote_code)
    stored: Any = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    # Its own configuration, dropout included; only layers that were left out stay out.
    config = first_layers(config, content.spec.backbone_layers)
    whole: Any = backbone
    kind = saved_class(config)
    if kind is None or kind is type(backbone):
        whole.config = config
    else:
        whole = kind.from_pretrained(
            settings.model_path, config=config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
        )
        places = [name for name, module in whole.named_modules() if type(module) is type(backbone)]
        if len(places) != 1:
            raise UserError(
                f"cannot put the merged {type(backbone).__name__} into {type(whole).__name__}, which has "
                f"{len(places)} of them; use --export_peft"
            )
        whole.set_submodule(places[0], backbone)
        backbone.config = text_config_of(config)
        whole.tie_weights()
    setattr(whole.config, MERGED_KEY, origin)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(settings.dtype, stored)
    if isinstance(dtype, torch.dtype):
        whole.to(dtype)
    whole.requires_grad_(False)
    whole.save_pretrained(folder)


def saved_class(config: Any) -> Any:
    """The class that a base was saved as; None where that is its decoder alone."""
    import transformers

    names = config.architectures or [""]
    kind = getattr(transformers, names[0], None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    whole = any("ForCausalLM" in name or "LMHead" in name for name in names)
    return transformers.AutoModelForCausalLM if whole else None


# ------------------------------------------------------------------------------------------------- verification


def difference(quantiles: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """How far two forecasts of the same days lie apart, in basis points of the log return.

    Args:
        quantiles, reference: (origins, horizon, levels) each.

    Returns:
        The largest and the mean distance, and the largest over the mean width of the 80% interval.
    """
    apart = BASIS_POINTS * np.abs(quantiles - reference)
    width = BASIS_POINTS * float((reference[..., -2] - reference[..., 1]).mean())
    return float(apart.max()), float(apart.mean()), float(apart.max()) / width


def verify(folder: Path, content: WeightsFile, settings: MergeSettings, device: torch.device) -> None:
    """Print how far the forecasts of the merged model, loaded anew, lie from those of the adapters beside the base.

    All compute in float32, so that what differs is what merging and quantization changed.
    """
    prices = verification_prices(settings)
    window = content.spec.window_size
    origins = {name: range(max(window, len(frame) - VERIFY_DAYS), len(frame)) for name, frame in prices.items()}

    def forecast(forecaster: Forecaster) -> np.ndarray:
        result = forecaster.quantiles(forecaster.packed_examples(prices, origins))
        gc.collect()
        return result

    merged, _ = load_forecaster(folder, folder, device, torch.float32, settings.trust_remote_code)
    reference = forecast(merged)
    del merged
    quantizations = ["none"]
    if device.type in ("cpu", "cuda") and importlib.util.find_spec("bitsandbytes"):
        quantizations += [content.spec.quantization] if content.spec.quantization == "8bit" else []
        quantizations += ["4bit"] if content.spec.method != "full" else []
    rows = []
    for quantization in quantizations:
        spec = replace(content.spec, quantization=quantization)
        largest, mean, share = difference(forecast(assembled(replace(content, spec=spec), settings, device)), reference)
        base = {"none": "the unquantized base", "8bit": "an 8-bit base", "4bit": "a 4-bit base"}[quantization]
        trained = " (as in training)" if quantization == content.spec.quantization else ""
        what = "the weights file" if content.spec.method == "full" else f"adapters beside {base}"
        rows.append([what + trained, f"{largest:.4g}", f"{mean:.4g}", f"{100 * share:.2g}"])
    days = sum(len(rows) for rows in origins.values())
    say()
    print_table(
        f"Forecasts of {days} days ({', '.join(prices)}): how far from the merged model's, basis points",
        ["", "largest", "mean", "largest, % of the 80% interval"],
        rows,
    )


def verification_prices(settings: MergeSettings) -> Mapping[str, pd.DataFrame]:
    """``--data``, or the last year of the bundled AAPL."""
    from stocklora.dataset.prepare import select_tickers
    from stocklora.prices.sources.fetch import sample_prices
    from stocklora.prices.tables import read_prices

    prices = read_prices(settings.data, reading=settings) if settings.data else sample_prices("AAPL", "1y")[0]
    return select_tickers(prices, list(prices)[:VERIFY_TICKERS])
