"""Weights as folders: an adapter in PEFT's format with our forecast head beside it, or a merged model with its head.

``FOLDER/stocklora_forecaster.pth`` is a weights file without adapters. What trained beside the head stands in PEFT's
``adapter_config.json`` and ``adapter_model.safetensors``, or is part of the merged model's own weights.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import lora
from lora import LoRAConfig, LoRAError
from stocklora.cli.console import UserError
from stocklora.forecaster.weights_file import WeightsFile, load_weights, save_weights

HEAD_NAME = "stocklora_forecaster.pth"
ADAPTER_CONFIG = "adapter_config.json"


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
        config, state = lora.read_peft(folder)
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
        lora.export_peft(backbone, folder, base_model=spec.base_model["name"])  # type: ignore[arg-type]
        config, _ = lora.read_peft(folder)
    except LoRAError as error:
        raise UserError(str(error)) from None
    fields = asdict(config) | {"target_modules": LoRAConfig.from_dict(spec.lora).target_modules}
    save_weights(folder / HEAD_NAME, replace(content, spec=replace(spec, lora=fields), adapters={}))


def check_empty(folder: Path, flag: str) -> None:
    """Raise a UserError unless ``folder`` is free to be filled."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is there already; give a folder that is not, or remove it")
