"""A forecaster on disk.

Its weights file holds adapters, head, and the metadata that rebuilds the model; it loads with
``torch.load(weights_only=True)``, so that no file can run code.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora import LoRAError
from stocklora.adapters.files import export_peft, read_peft
from stocklora.adapters.layer import AdapterConfig
from stocklora.base_models.folders import check_empty
from stocklora.cli.console import UserError
from stocklora.forecaster.settings import check_weights_path
from stocklora.metrics.calibration import Calibration
from stocklora.runtime.files import as_json_types, load_plain, replacing

FORMAT = "stocklora-forecaster"
FORMAT_VERSION = 2  # 1: one method (LoRA over an unquantized base), which the specification did not name
SAME_FUNCTION = (
    "method", "quantization", "backbone_layers", "prompt", "window_size", "horizon", "indicators", "anonymize",
)  # fmt: skip
# A folder: an adapter in PEFT's format or a merged model, with the head beside it.
HEAD_NAME = "stocklora_forecaster.pth"
ADAPTER_CONFIG = "adapter_config.json"
HEAD_TENSORS = {"mean", "spread", "linear.weight", "linear.bias"}


@dataclass(frozen=True)
class ForecasterSpec:
    """Everything but the tensors that a forecaster is made of.

    Attributes:
        base_model: name, source and configuration hash of the base model's folder.
        lora: fields of ``AdapterConfig``, for the methods with adapters.
        table: (horizon, levels) starting quantiles.
        scale: ``volatility.VolatilityScale.to_dict()``.
        location: (horizon,) log return that the scaled quantiles stand around; empty for 0.
        indicators: names from ``indicators.INDICATORS``. anonymize: no ticker and no date in the prompt.
        method, quantization, adapt_layers: as the settings of ``train_lora.py``; ``lora`` names the adapted layers.
    """

    base_model: dict[str, Any]
    backbone_layers: int | None
    prompt: str
    window_size: int
    targets_per_sequence: int
    horizon: int
    levels: list[float]
    table: list[list[float]]
    scale: dict[str, Any]
    lora: dict[str, Any]
    calibration: dict[str, float]
    location: list[float] = field(default_factory=list)
    indicators: list[str] = field(default_factory=list)
    anonymize: bool = True
    method: str = "lora"
    quantization: str = "none"
    adapt_layers: int | None = None


def other_setting(first: ForecasterSpec, second: ForecasterSpec) -> tuple[str, str, str] | None:
    """The first setting by which the same weights are another function of the prices: its flag, and both values."""
    for name in SAME_FUNCTION:
        values = [getattr(spec, name) for spec in (first, second)]
        if values[0] != values[1]:
            shown = [" ".join(value) or "nothing" if isinstance(value, list) else str(value) for value in values]
            return f"--{name}", shown[0], shown[1]
    return None


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        adapters: what training changed in the base, by name: the two factors of each adapted layer, or with
            ``full`` each weight (none where training kept nothing). head: the head's state. All on the CPU.
        training: data, seed, versions, settings and scores of the run that made it; for people to read.
    """

    spec: ForecasterSpec
    adapters: dict[str, Any]
    head: dict[str, Any]
    training: dict[str, Any]


def save_weights(path: Path, content: WeightsFile) -> None:
    """Write a weights file, atomically."""
    import torch

    with replacing(path) as temporary:
        torch.save(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "spec": asdict(content.spec),
                "adapters": content.adapters,
                "head": content.head,
                "training": as_json_types(content.training),
            },
            temporary,
        )


def load_weights(path: Path) -> WeightsFile:
    """Read a weights file.

    Args:
        path: the file, or a folder: of an adapter in PEFT's format, or of a merged model (``merge_lora.py``).

    Raises:
        UserError: missing, damaged, of another kind, or of a newer version.
    """
    if path.is_dir():
        return read_folder(path)
    check_weights_path(path)
    again = "; give the best_lora_weights.pth of a run of train_lora.py"
    content = load_plain(path, FORMAT, FORMAT_VERSION, "train_lora.py", again)
    try:
        found = WeightsFile(
            ForecasterSpec(**content["spec"]), content["adapters"], content["head"], content["training"]
        )
        _check(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is incomplete ({error}){again}") from None
    return found


def _check(content: WeightsFile) -> None:
    """What a forecast would be wrong without, silently: head and calibration.

    Raises:
        KeyError, TypeError, ValueError: saying what is missing or broken.
    """
    import torch

    if missing := HEAD_TENSORS - content.head.keys():
        raise ValueError(f"the forecast head has no {', '.join(sorted(missing))}")
    for name, tensor in content.head.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the forecast head's {name} holds numbers that are not finite")
    fitted = Calibration.from_dict(content.spec.calibration)
    if not (math.isfinite(fitted.shrinkage) and math.isfinite(fitted.interval_scale)):
        raise ValueError("the calibration is not finite")


def read_folder(folder: Path) -> WeightsFile:
    """What a weights file of the same forecaster would hold.

    The adapter's own settings win over those that the head remembers.

    Raises:
        UserError: no head, or an adapter that is damaged or uses what PEFT has and we have not.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not (folder / HEAD_NAME).is_file():
        if is_adapter:
            raise UserError(
                f"{folder} is a PEFT adapter without a forecast head ({HEAD_NAME}), and an adapter alone forecasts "
                f"nothing: train one with train_lora.py --method peft, and merge_lora.py --export_peft writes both"
            )
        files = sorted(path.name for path in folder.glob("*.pth"))
        raise UserError(
            f"{folder} is a folder without {HEAD_NAME}; give "
            + (f"the weights file in it: {folder / files[0]}" if files else "a weights file of train_lora.py")
        )
    content = load_weights(folder / HEAD_NAME)
    if not is_adapter:
        return content
    try:
        config, state = read_peft(folder)
    except LoRAError as error:
        raise UserError(f"cannot load the adapter in {folder}: {error}") from None
    if config.init == "pissa":
        raise UserError(
            f"{folder} holds an adapter that began as PEFT's PiSSA, whose start is not in it; save it as plain LoRA "
            f"(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    method = content.spec.method if content.spec.method in ("lora", "peft") else "peft"
    fields = asdict(config) | {"target_modules": list(config.target_modules)}
    return replace(content, spec=replace(content.spec, method=method, lora=fields), adapters=state)


def write_folder(folder: Path, content: WeightsFile, backbone: object) -> None:
    """An adapter as PEFT writes it, and last the head, so that half a folder is seen as half a folder.

    Args:
        backbone: with our own LoRA layers, holding ``content.adapters``.

    Raises:
        UserError: the folder cannot be written, or holds something already.
    """
    check_empty(folder, "--export_peft")
    spec = content.spec
    try:
        export_peft(backbone, folder, base_model=spec.base_model["name"])  # type: ignore[arg-type]
        config, _ = read_peft(folder)
    except LoRAError as error:
        raise UserError(str(error)) from None
    fields = asdict(config) | {"target_modules": AdapterConfig.from_dict(spec.lora).target_modules}
    save_weights(folder / HEAD_NAME, replace(content, spec=replace(spec, lora=fields), adapters={}))
