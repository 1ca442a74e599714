"""A causal language model from a folder, whole or quantized, the same in training and in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_model import quantization_config, steady_quantized_layers
from stocklora.base_models.folders import check_model_folder
from stocklora.cli.console import UserError, one_line

QUANTIZATIONS = ("none", "8bit", "4bit")


def load_causal_model(
    folder: Path,
    *,
    quantization: str = "none",
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """The language model in ``folder`` on ``device``.

    bitsandbytes' layers are made one function of their input alone, in training and in use: see
    ``llm_model.steady_quantized_layers``. An adapter meets the base it was trained over only in that form.

    Args:
        quantization: of the linear layers but the output head: ``none``, ``8bit`` (rows of int8 with a scale each) or
            ``4bit`` (nf4 with quantized scales).
        dtype: of the weights; of a quantized model the type that it computes in.

    Raises:
        UserError: the folder is not a whole model, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    check_model_folder(folder)
    options: dict[str, Any] = {}
    if quantization != "none":
        options = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    except ImportError as error:
        if quantization == "none":
            raise UserError(f"cannot load {folder}: {one_line(str(error))[:300]}") from None
        raise UserError(f"{quantization} weights need bitsandbytes: pip install bitsandbytes ({error})") from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # the last: weights of other shapes
        raise UserError(f"cannot load the model in {folder}: {one_line(str(error))[:300]}") from None
    if quantization == "none":
        return model.to(device)
    steady_quantized_layers(model)
    return model
