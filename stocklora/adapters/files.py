"""Adapters on disk: files of our own, and the folders that PEFT reads and writes.

Every file is written under a temporary name and renamed, so that it is the old or the new one, whole. A ``.pth`` is
read with ``weights_only=True``: a pickle can run code, so anything but plain data is refused.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora import (
    ALL_LINEAR,
    DEFAULT_ADAPTER,
    LoRAError,
    LoRALayer,
    adapter_layers,
    check_state,
    linear_layers,
    load_lora_state_dict,
    lora_state_dict,
)
from stocklora.adapters.arithmetic import adapted_names, without_pissa
from stocklora.adapters.biases import bias_modules
from stocklora.adapters.layer import AdapterConfig, attach, principal_factors
from stocklora.base_models.quantized import dense_weight
from stocklora.cli.console import UserError
from stocklora.runtime.files import json_of, replacing


def save_lora(model: nn.Module, path: str | Path, adapter: str | None = None) -> None:
    """Write an adapter and its configuration to ``.pth``/``.pt`` or ``.safetensors``, whole or not at all.

    Raises:
        LoRAError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    config, state = config_of(model, adapter), plain_state(model, adapter)
    _check_suffix(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        _write(path, save(state, metadata={"lora_config": json.dumps(asdict(config))}))
    else:
        buffer = io.BytesIO()
        torch.save({"lora_config": asdict(config), "state": state}, buffer)
        _write(path, buffer.getvalue())


def load_lora(model: nn.Module, path: str | Path, adapter: str = DEFAULT_ADAPTER) -> list[str]:
    """Add an adapter saved by ``save_lora`` to the layers it was made for, and make it the active one.

    ``.pth`` is read with ``weights_only=True``: a pickle can run code, so anything but plain data is refused.

    Returns:
        The dotted names of the adapted layers.

    Raises:
        LoRAError: the file is missing, broken, unsafe, or does not fit the model, which is unchanged then.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        try:
            settings = json_of(metadata["lora_config"])
        except (KeyError, ValueError):
            message = f"{path} carries no lora_config; for an adapter of PEFT's use import_peft on its folder"
            raise LoRAError(message) from None
    else:
        content = _read_pth(path)
        if not isinstance(content, dict) or set(content) != {"lora_config", "state"}:
            raise LoRAError(f"{path} is no LoRA adapter written by save_lora")
        settings, state = content["lora_config"], content["state"]
    return _attach_state(model, AdapterConfig.from_dict(settings), state, adapter)


PARALLEL = ("DataParallel", "DistributedDataParallel")  # torch's wrappers, told by name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and the wrappers of several processes."""
    while (inside := getattr(model, "module" if type(model).__name__ in PARALLEL else "_orig_mod", None)) is not None:
        model = inside
    return model


def plain_state(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """``lora_state_dict`` by the names that layers have in the unwrapped model."""
    return {plain_name(model, name): value for name, value in lora_state_dict(model, adapter).items()}


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name without what ``torch.compile`` and the wrappers of several processes put into it."""
    if type(model).__name__ in PARALLEL:
        name = name.removeprefix("module.")
    wrappers = r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)"
    return re.sub(wrappers, "", name).removesuffix(".")


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise LoRAError(f"cannot tell the format of {path}; name it .pth or .safetensors")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoRAError(f"cannot read {path}: {first_line(error)}") from error


def _read_pth(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LoRAError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch reports a broken or unsafe file in several ways
        raise LoRAError(f"cannot read {path}: broken, or it holds more than plain tensors") from error


def first_line(error: Exception) -> str:
    """What an error says, without the lines that explain it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def config_of(model: nn.Module, adapter: str | None = None) -> AdapterConfig:
    """What an adapter (by default the active one) was made with; a plain ``LoRAConfig`` is one without variants."""
    layer = next(iter(adapter_layers(model, adapter).values()))  # a name is given once, to all of an adapter's layers
    config = layer.configs[adapter or layer.active]
    return config if isinstance(config, AdapterConfig) else AdapterConfig(**asdict(config))


def _attach_state(model: nn.Module, config: AdapterConfig, state: Mapping[str, Tensor], adapter: str) -> list[str]:
    """Add an adapter to exactly the layers that ``state`` names, once it is known to fit."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise LoRAError("the adapter holds no named weights")
    wanted = set(adapted_names(state))
    layers = {name: config.layer(layer, name) for name, layer in linear_layers(model).items() if name in wanted}
    shapes = {f"{name}.{part}": shape for name, layer in layers.items() for part, shape in layer.shapes(config).items()}
    for name, module in bias_modules(model, config.train_bias, layers).items():
        base: Any = module.base if isinstance(module, LoRALayer) else module
        shapes[f"{name}.bias"] = tuple(base.bias.shape)
    check_state(shapes, state)
    attach(model, list(layers), config, adapter, initialize=False)
    load_lora_state_dict(model, state)
    return list(layers)


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    except UserError as error:
        raise LoRAError(str(error)) from error


# -------------------------------------------------------------------------------------------- PEFT folders

_PEFT_PREFIX = "base_model.model."
# Settings that say where the adapter came from or how it was found; its weights mean the same whatever they are.
_PEFT_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
_PEFT_HANDLED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"}
# Initialisations that leave the base as it is. The others train against a changed base, of which only PiSSA's can be
# found again: by the same SVD.
_PEFT_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.(lora_[AB]\.weight|lora_magnitude_vector)|(.+\.)?bias)")


def export_peft(
    model: nn.Module, folder: str | Path, adapter: str | None = None, base_model: str | None = None
) -> None:
    """Write an adapter as PEFT does: ``adapter_model.safetensors``, then ``adapter_config.json``.

    One that began with PiSSA is written as plain LoRA of twice the rank, which needs no SVD to be loaded.

    Args:
        base_model: what PEFT should load the base from; by default the name that ``model.config`` carries.
    """
    from safetensors.torch import save

    found = adapter_layers(model, adapter).items()
    layers = {plain_name(model, name): layer for name, layer in found if layer.lora_A}  # not biases alone
    state, config = without_pissa(plain_state(model, adapter), config_of(model, adapter))
    targets = short_names(model, list(layers))
    bare: Any = unwrapped(model)
    kind = type(bare).__name__
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": base_model or getattr(getattr(bare, "config", None), "_name_or_path", None),
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "fan_in_fan_out": all(layer.transposed for layer in layers.values()),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": config.train_bias,
        "inference_mode": True,
    }
    renamed = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        inside = {"lora_magnitude": "lora_magnitude_vector", "bias": "base_layer.bias" if name in layers else "bias"}
        renamed[f"{_PEFT_PREFIX}{name}.{inside.get(part, f'{part}.weight')}"] = tensor
    folder = Path(folder)
    _write(folder / "adapter_model.safetensors", save(renamed, metadata={"format": "pt"}))
    _write(folder / "adapter_config.json", (json.dumps(content, indent=2) + "\n").encode())


def short_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The ends of layers' plain names where those select these and no other module, as most readers of PEFT expect."""
    ends = {name.rpartition(".")[2] for name in names}
    modules = {plain_name(model, name) for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if modules == set(names) else list(names)


def read_peft(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter saved by PEFT: its settings, and its weights by our names; PiSSA's start is not among them.

    Raises:
        LoRAError: files are missing or broken, or the adapter uses a feature that would not be reproduced (a rank per
            layer, whole trained modules, ...).
    """
    folder = Path(folder)
    try:
        content = json_of((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoRAError(f"cannot read {folder / 'adapter_config.json'}: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise LoRAError(f"{folder} is no LoRA adapter of PEFT's")
    strange = [key for key, value in content.items() if value and key not in _PEFT_HARMLESS | _PEFT_HANDLED]
    # Weights of linear layers are adapted as the layers are; other tensors, such as all experts in one, are not here.
    if all(str(name).endswith(".weight") for name in content.get("target_parameters") or []):
        strange = [key for key in strange if key != "target_parameters"]
    init = content.get("init_lora_weights", True)
    if init not in _PEFT_PLAIN_INITS and init != "pissa":
        strange.append("init_lora_weights")
    if strange:
        named = ", ".join(f"{key}={content[key]!r}" for key in sorted(strange))
        raise LoRAError(f"{folder} uses PEFT features that are not supported here: {named}")
    config = AdapterConfig(
        content.get("r", 8),
        content.get("lora_alpha", 8),
        content.get("lora_dropout", 0.0),
        rslora=bool(content.get("use_rslora")),
        dora=bool(content.get("use_dora")),
        init="pissa" if init == "pissa" else "kaiming",
        train_bias=content.get("bias", "none"),
    )
    weights = _read_peft_weights(folder)
    if foreign := [key for key in weights if not _PEFT_KEY.fullmatch(key)]:
        raise LoRAError(f"{folder} holds weights that are not LoRA's: {', '.join(foreign[:8])}")
    state = {our_name(key): tensor for key, tensor in weights.items()}
    return replace(config, target_modules=tuple(adapted_names(state)) or ALL_LINEAR), state


def _read_peft_weights(folder: Path) -> dict[str, Tensor]:
    """By PEFT's names; the pickle that older versions wrote is read as plain data alone."""
    old = folder / "adapter_model.bin"
    if (folder / "adapter_model.safetensors").exists() or not old.exists():
        return read_safetensors(folder / "adapter_model.safetensors")[0]
    weights = _read_pth(old)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise LoRAError(f"{old} holds no named weights")
    return weights


def import_peft(model: nn.Module, folder: str | Path, adapter: str = DEFAULT_ADAPTER) -> list[str]:
    """Add an adapter saved by PEFT, and make it the active one; returns the names of the adapted layers.

    An adapter of a whole model fits its backbone alone and the other way round: where layers are not found by their
    names (``model.layers.0.mlp``), they are by names without the first part, or with one before (``layers.0.mlp``).

    Raises:
        LoRAError: as ``read_peft``, or the adapter does not fit the model, or fits in more than one way.
    """
    config, state = read_peft(folder)
    state = _renamed_to_fit(model, state)
    names = adapted_names(state)
    if config.init == "pissa":
        for name, layer in linear_layers(model).items():
            if name in names:
                adapted = config.layer(layer, name)  # which refuses a rank that is too much for it
                factors = principal_factors(dense_weight(adapted.base), config.rank, config.scaling)
                state[f"{name}.pissa_A"], state[f"{name}.pissa_B"] = factors
    return _attach_state(model, replace(config, target_modules=tuple(names) or ALL_LINEAR), state, adapter)


def our_name(key: str) -> str:
    """PEFT's name of a weight -> ours."""
    name = key.removeprefix(_PEFT_PREFIX).removesuffix(".weight").removesuffix("_vector")
    return re.sub(r"\.base_layer\.bias$", ".bias", name)


def _renamed_to_fit(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the first part of its names cut off, or one put before them, where that alone makes it fit."""
    names, there = adapted_names(state), set(linear_layers(model))
    if not names or there.issuperset(names):
        return state
    first = names[0]
    prefixes = [("", name.removesuffix(first)) for name in there if name.endswith(f".{first}")]
    prefixes += [(first.removesuffix(name), "") for name in there if first.endswith(f".{name}")]
    fits = []
    for old, new in prefixes:
        renamed = {new + name.removeprefix(old) for name in names}
        if renamed <= there and len(renamed) == len(names):
            fits.append((old, new))
    if len(fits) > 1:
        found = ", ".join(sorted(new + first.removeprefix(old) for old, new in fits))
        raise LoRAError(f"the adapter's {first} could be any of {found}; import it into the part that it was made for")
    # Where nothing fits, the check that follows names what is missing.
    return {new + key.removeprefix(old): tensor for old, new in fits for key, tensor in state.items()} or state
