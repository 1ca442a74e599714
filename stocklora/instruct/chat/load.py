"""Chat models from folders: a base, whole or quantized, with the adapters that fit it."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocklora.base_models.folders import TOKENIZER_SETS
from stocklora.base_models.loading import load_causal_model, quiet_transformers
from stocklora.base_models.quantized import check_quantization
from stocklora.cli.console import UserError, one_line, say
from stocklora.instruct.chat.model import LESS_MEMORY, ChatModel, internal_name
from stocklora.instruct.chat.settings import LoadSettings
from stocklora.instruct.chat.sources import BASE, Sources, training_info
from stocklora.instruct.rows.chat_template import fit_embeddings, prepare_tokenizer
from stocklora.runtime.machine import choose_device, choose_dtype, memory_errors


def load_sources(sources: Sources, settings: LoadSettings) -> ChatModel:
    """Load what ``find_sources`` found, with a note where adapters were trained over a base in another form."""
    for name, folder in sources.adapters.items():
        trained = str(training_info(folder).get("quantization") or "none").replace("-", "")
        if trained in ("4bit", "8bit") and trained != settings.quantization:
            say(f"note: '{name}' was trained over {trained[0]}-bit weights; --load_in_{trained} uses it as it was then")
            break
    model = load_chat_model(
        sources.base,
        sources.adapters,
        quantization=settings.quantization,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    model.base_name = sources.base_name
    return model


def load_chat_model(
    base: Path,
    adapters: Mapping[str, Path] | None = None,
    quantization: str = "none",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> ChatModel:
    """A base model with adapters, ready to answer.

    Args:
        base: a whole model's folder. adapters: PEFT adapter folders by name.
        quantization: of the base: ``none``, ``8bit`` or ``4bit``. device, dtype: or ``auto``.

    Raises:
        UserError: it cannot be loaded, or an adapter does not fit the base.
    """
    from transformers import GenerationConfig

    adapters = dict(adapters or {})
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    check_quantization(quantization, place, f"--load_in_{quantization}")
    quiet_transformers()
    tokenizers = {
        name: prepare_tokenizer(folder if _has_tokenizer(folder) else base, trust_remote_code, base)
        for name, folder in adapters.items()
    }
    try:
        tokenizers[BASE] = prepare_tokenizer(base, trust_remote_code)
    except UserError:
        if not tokenizers:  # else the base has no chat template, and is asked by the adapter's
            raise
        tokenizers[BASE] = next(iter(tokenizers.values()))
    with memory_errors(LESS_MEMORY):
        model = load_causal_model(
            base, quantization=quantization, dtype=number_format, device=place, trust_remote_code=trust_remote_code
        )
    # What a maker recommends for sampling (Qwen: top_k 20) would silently be added to what is asked for.
    model.generation_config = GenerationConfig()
    model.requires_grad_(False).eval()
    fit_embeddings(model, max(tokenizers.values(), key=len))
    if adapters:
        model = _with_adapters(model, adapters, base)
    chat = ChatModel(model, tokenizers, list(adapters), base.absolute().name)
    chat.folders, chat.quantization = {BASE: base, **adapters}, quantization
    return chat


def _with_adapters(model: Any, adapters: Mapping[str, Path], base: Path) -> Any:
    """``model`` as a ``PeftModel`` with every adapter loaded to its last weight."""
    import peft

    # With a map of devices PEFT would distribute the model anew.
    with contextlib.suppress(AttributeError):
        del model.hf_device_map
    device = str(next(model.parameters()).device)
    result: Any = None
    for index, (name, folder) in enumerate(adapters.items()):
        internal = internal_name(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # missing weights are an error below
                config = peft.PeftConfig.from_pretrained(str(folder))
                config.inference_mode = True
                if config.is_prompt_learning:
                    raise UserError(f"{folder} is a prompt-tuning adapter; LoRA and its kin can be used here")
                if result is None:
                    result = peft.PeftModelForCausalLM(model, config, adapter_name=internal)
                else:
                    result.add_adapter(internal, config)
                loaded = result.load_adapter(str(folder), adapter_name=internal, torch_device=device)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"the adapter '{name}' in {folder} does not fit the base in {base}; give --base_model the model "
                f"that it was trained over ({one_line(str(error))[:160]})"
            ) from None
        lost = [*loaded.missing_keys, *(key for key in loaded.unexpected_keys if "lora_" in key)]
        if lost:
            raise UserError(
                f"the adapter '{name}' in {folder} does not fit the base in {base}: {len(lost)} weights have no "
                f"counterpart, {lost[0]} among them; give --base_model the model that it was trained over"
            )
    return result.requires_grad_(False)


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_SETS)
