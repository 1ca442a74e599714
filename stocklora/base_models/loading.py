"""Base models from a folder, whole or quantized, the same in training and in use."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_model import facts_of
from stocklora.base_models.folders import check_model_folder, describe_model
from stocklora.base_models.quantized import quantization_config, steady_quantized_layers
from stocklora.cli.console import UserError, one_line


def load_causal_model(
    folder: Path,
    *,
    quantization: str = "none",
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """The language model in ``folder`` on ``device``.

    Args:
        quantization: of the linear layers but the output head: ``none``, ``8bit`` (rows of int8 with a scale each) or
            ``4bit`` (nf4 with quantized scales).
        dtype: of the weights; of a quantized model the type that it computes in.

    Raises:
        UserError: the folder is not a whole model, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    check_model_folder(folder)
    try:
        model = _from_folder(AutoModelForCausalLM, folder, quantization, dtype, device, trust_remote_code)
    except ImportError as error:
        if quantization == "none":
            raise UserError(f"cannot load {folder}: {one_line(str(error))[:300]}") from None
        raise UserError(f"{quantization} weights need bitsandbytes: pip install bitsandbytes ({error})") from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # the last: weights of other shapes
        raise UserError(f"cannot load the model in {folder}: {one_line(str(error))[:300]}") from None
    return model.to(device) if quantization == "none" else model


def _from_folder(
    kind: Any,
    folder: Path,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    **options: Any,
) -> Any:
    """A model of one of transformers' classes; a quantized one is made on ``device``, another on the CPU.

    bitsandbytes' layers are made one function of their input alone, in training and in use: see
    ``steady_quantized_layers``. An adapter meets the base it was trained over only in that form.
    """
    if quantization != "none":
        options |= {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
    model = kind.from_pretrained(str(folder), dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if quantization != "none":
        steady_quantized_layers(model)
    return model


class BaseModel:
    """What stands in a base model's folder beside the weights; each part is read once, when it is first asked for.

    Raises:
        UserError: the folder is not a whole model, or a part of it cannot be read.
    """

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        check_model_folder(path)
        self.path, self.trust_remote_code = path, trust_remote_code

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """See ``describe_model``."""
        return describe_model(self.path)

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        quiet_transformers()
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise unloadable(self.path, "tokenizer", error) from None

    @functools.cached_property
    def config(self) -> Any:
        """Of all its layers; see ``backbone_config``."""
        try:
            return backbone_config(self.path, None, self.trust_remote_code)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise unloadable(self.path, "configuration", error) from None

    @property
    def context_tokens(self) -> int:
        """What the model can read at once."""
        return facts_of(self.config).context_tokens


def unloadable(model_path: Path, part: str, error: Exception) -> UserError:
    """Which part of a base model cannot be loaded, and why."""
    hint = ""
    if "trust_remote_code" in str(error):
        hint = " (it brings Python code of its own: add --trust_remote_code if you trust its author)"
    return UserError(f"cannot load the {part} of the base model in {model_path}: {str(error)[:300]}{hint}")


def backbone_config(model_path: Path, layers: int | None = None, trust_remote_code: bool = False) -> Any:
    """The base model's configuration without dropout, cut to its first ``layers`` layers if given.

    Raises:
        ValueError: more layers than there are.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    # The base is frozen: its own dropout would only add noise to what the adapters see.
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return first_layers(config, layers)


def first_layers(config: Any, layers: int | None) -> Any:
    """A copy of a configuration, cut to its first ``layers`` layers if given.

    Raises:
        ValueError: more layers than there are.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"the base model has {config.num_hidden_layers} layers; {layers} cannot be used")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def load_backbone(
    model_path: Path,
    dtype: torch.dtype,
    layers: int | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
    device: torch.device | None = None,
    config: Any = None,
) -> nn.Module:
    """The base model without its vocabulary head, frozen, without dropout of its own.

    Args:
        dtype: of the weights; of a quantized model the type that it computes in, and that of its embeddings.
        layers: use only the first so many layers.
        quantization: of the linear layers: ``none``; ``8bit``: rows of int8 with a scale each; ``4bit``: nf4 with
            quantized scales (Dettmers et al. 2023, arXiv:2305.14314).
        device: where a quantized model is made; an unquantized one is made on the CPU.
        config: the ``backbone_config`` of all layers where it was read before; None reads it.

    Raises:
        ImportError: quantization without bitsandbytes.
    """
    from transformers import AutoModel

    if config is None:
        config = backbone_config(model_path, None, trust_remote_code)
    backbone: nn.Module = _from_folder(
        AutoModel, model_path, quantization, dtype, device or torch.device("cpu"), trust_remote_code,
        config=first_layers(config, layers),
    )  # fmt: skip
    return backbone.requires_grad_(False)


def is_causal(backbone: nn.Module, tokens: int = 16) -> bool:
    """Whether earlier hidden states ignore later tokens; an encoder such as BERT would see the future."""
    config: Any = backbone.config
    device = next(backbone.parameters()).device
    ids = torch.arange(1, tokens + 1, device=device)[None] % int(config.vocab_size)
    other = ids.clone()
    other[0, -1] = 0
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        first, second = (backbone(input_ids=row).last_hidden_state[0, :-1].float() for row in (ids, other))
    backbone.train(was_training)
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def quiet_transformers() -> None:
    """No loading bars, no advice on kernels for 4-bit inference alone, no notices about names of the future."""
    # bitsandbytes speaks while it is imported, so its logger is told before.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
