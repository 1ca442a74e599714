"""Base models from a folder, whole or quantized, the same in training and in use."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_model import facts_of, text_config_of
from stocklora.base_models.folders import check_model_folder, describe_model, read_config, without_volatile
from stocklora.base_models.quantized import quantization_config, steady_quantized_layers
from stocklora.cli.console import UserError, one_line

# What transformers raises at a configuration that it cannot make a model of, tokenizers (from Rust) at a vocabulary, a
# model's own code at anything: errors of many kinds, some of them plain exceptions.
UNLOADABLE = Exception


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
    except (UserError, torch.OutOfMemoryError):
        raise
    except UNLOADABLE as error:  # a RuntimeError: weights of other shapes
        raise unloadable(folder, "weights", error) from None
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
    from transformers import AutoConfig

    if (config := options.get("config")) is None:
        config = unscaled(AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code))
        options["config"] = config
    stored = stored_quantization(config)
    if quantization not in ("none", stored) and stored != "none":
        raise UserError(f"{folder} is stored quantized already ({stored}); leave out --quantization {quantization}")
    if stored in ("8bit", "4bit"):
        quantization, options = stored, options | {"device_map": {"": device}}
    elif quantization != "none":
        with torch.device("meta"):
            skeleton = kind.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        options |= {
            "quantization_config": quantization_config(quantization, dtype, skeleton), "device_map": {"": device},
        }  # fmt: skip
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

    @property
    def identity(self) -> dict[str, Any]:
        """``description``, with the configuration itself, for what is trained on it."""
        return self.description | {"config": without_volatile(read_config(self.path))}

    @functools.cached_property
    def tokenizer(self) -> Any:
        quiet_transformers()
        return load_tokenizer(self.path, self.trust_remote_code)

    @functools.cached_property
    def config(self) -> Any:
        """Of all its layers; see ``backbone_config``."""
        try:
            return backbone_config(self.path, None, self.trust_remote_code)
        except UNLOADABLE as error:
            raise unloadable(self.path, "configuration", error) from None

    @functools.cached_property
    def quantization(self) -> str:
        """What the weights are quantized to on disk; see ``stored_quantization``."""
        return stored_quantization(self.config)

    @property
    def context_tokens(self) -> int:
        """What the model can read at once."""
        return facts_of(self.config).context_tokens


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``folder``.

    Raises:
        UserError: there is none, or a damaged one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except BaseException as error:
        # Rust panics at some damaged vocabularies, which Python sees as no Exception.
        if not isinstance(error, UNLOADABLE) and type(error).__name__ != "PanicException":
            raise
        raise unloadable(folder, "tokenizer", error) from None


def unquantized_name(model_path: Path) -> str:
    """What messages call the model that a quantized one was made from."""
    name = str(describe_model(model_path)["name"])
    plain = re.sub(r"(?i)[-_.](unsloth-)?(bnb|gptq|awq|int[48]|fp8|mxfp4|nf4|[48][-_]?bits?).*$", "", name)
    return f"the unquantized {plain}" if plain != name else f"the unquantized model that {name} was made from"


def unloadable(model_path: Path, part: str, error: BaseException, layers: int | None = None) -> UserError:
    """Which part of a base model cannot be loaded, and why; or its first ``layers`` layers, where those were asked."""
    hint = ""
    if "trust_remote_code" in str(error):
        hint = " (it brings Python code of its own: add --trust_remote_code if you trust its author)"
    what = str(error) if isinstance(error, UserError | OSError | ValueError) else f"{type(error).__name__}: {error}"
    if isinstance(error, pickle.UnpicklingError):  # torch advises to run what is in it
        what = "its .bin is damaged, or holds more than tensors, such as code, which is never run; use safetensors"
    elif "ignore_mismatched_sizes" in what:  # which tells of a report that is not shown
        what = "its weights have other shapes than its configuration says"
    elif "Unrecognized configuration class" in what:  # and then a list of all that there are
        what = "it is no causal language model; choose one that generates text, such as Qwen3, Llama or GPT-2"
    if layers is not None and not hint and "cannot be used" not in what:
        hint = f" (it may not go with --backbone_layers {layers}: give another number, or leave it out)"
    return UserError(f"cannot load the {part} of the base model in {model_path}: {one_line(what)[:300]}{hint}")


def backbone_config(model_path: Path, layers: int | None = None, trust_remote_code: bool = False) -> Any:
    """The base model's configuration without dropout, cut to its first ``layers`` layers if given.

    Raises:
        ValueError: more layers than there are.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    return first_layers(steady(config), layers)


def steady(config: Any) -> Any:
    """Make a configuration's model one function, in training and in use.

    The base is frozen: dropout and a router's noise would only blur what the adapters see.
    """
    for part in (config, text_config_of(config)):
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name or name.endswith("_pdrop")):
                setattr(part, name, 0.0)
    return unscaled(config)


def unscaled(config: Any) -> Any:
    """Keep RWKV from halving weights on the way to an answer, for the range of float16: adapters it would not halve."""
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0
    return config


def differences(stored: dict[str, Any], base: BaseModel) -> list[str]:
    """Settings by which a base is another function than one whose ``config.json`` held ``stored``: ``name old -> new``.

    Both are read by transformers as it is installed: what versions call otherwise, or leave out, is no difference.
    """
    from transformers import AutoConfig

    given = AutoConfig.from_pretrained(base.path, trust_remote_code=base.trust_remote_code)
    try:
        was = type(given).from_dict(copy.deepcopy(stored))
    except UNLOADABLE:
        return [f"model_type {stored.get('model_type')} -> {given.model_type}"]
    old, new = (without_volatile(config.to_dict()) for config in (was, given))
    names = sorted(name for name in old.keys() | new.keys() if name != "architectures")
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def first_layers(config: Any, layers: int | None) -> Any:
    """A copy of a configuration, cut to its first ``layers`` layers if given.

    Raises:
        ValueError: more layers than there are.
    """
    config = copy.deepcopy(config)
    if layers is None:
        return config
    part = text_config_of(config)
    had = int(part.num_hidden_layers)
    if not 1 <= layers <= had:
        raise ValueError(f"the base model has {had} layers; {layers} cannot be used")
    part.num_hidden_layers = layers
    # What is said of each layer, or which layers are of a kind, under whatever name.
    for name, value in list(vars(part).items()):
        if isinstance(value, list) and name.endswith(("indices", "idxs", "layer_ids")):
            setattr(part, name, [item for item in value if item < layers])
        elif isinstance(value, list) and len(value) == had and not _are_factors(name, value):
            setattr(part, name, value[:layers])
    return config


def _are_factors(name: str, value: list[Any]) -> bool:
    """Whether a list is one of limits or factors, which may be as many as layers by chance."""
    return all(isinstance(item, float) for item in value) and "layer" not in name and "pattern" not in name


def backbone_class(config: Any) -> Any:
    """``AutoModel``; where a model's own code has no class for that, the one with a vocabulary head around it.

    Raises:
        ValueError: there is neither.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own and "AutoModel" not in own:
        return AutoModelForCausalLM
    if "AutoModel" not in own and config.model_type not in MODEL_MAPPING_NAMES:
        raise ValueError(
            f"there is no language model for its {type(config).__name__}, in transformers or in its own auto_map; "
            f"choose another base"
        )
    return AutoModel


def language_model(model: Any) -> Any:
    """The decoder of text inside a model with a vocabulary head, or that also reads pictures or sound.

    Raises:
        ValueError: there is none.
    """
    if model.get_output_embeddings() is not None:
        if model.base_model is model:
            raise ValueError(
                f"its own code has no AutoModel in its auto_map, and {type(model).__name__} keeps its decoder under "
                f"another name than base_model_prefix says; choose another base"
            )
        model = model.base_model
    if text_config_of(model.config) is model.config:
        return model
    for name in ("language_model", "text_model", "model"):
        inside = getattr(model, name, None)
        if isinstance(inside, nn.Module) and hasattr(inside, "config"):
            return language_model(inside)
    return model


def stored_quantization(config: Any) -> str:
    """What weights are quantized to on disk: ``none``, bitsandbytes' ``8bit`` or ``4bit``, or a method's name."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return "none"
    facts = found if isinstance(found, dict) else found.to_dict()
    bits = {"8bit": facts.get("load_in_8bit"), "4bit": facts.get("load_in_4bit")}
    return next((name for name, used in bits.items() if used), str(facts.get("quant_method", "an unknown method")))


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
    if config is None:
        config = backbone_config(model_path, None, trust_remote_code)
    if (stored := stored_quantization(config)) not in ("none", "8bit", "4bit"):
        raise UserError(
            f"{model_path} is stored quantized by {stored}, which cannot be trained over here; give "
            f"{unquantized_name(model_path)}"
        )
    whole = _from_folder(
        backbone_class(config), model_path, quantization, dtype, device or torch.device("cpu"), trust_remote_code,
        config=first_layers(config, layers),
    )  # fmt: skip
    backbone: nn.Module = language_model(whole)
    return backbone.requires_grad_(False)


def plain_backbone(model_path: Path, layers: int | None = None, trust_remote_code: bool = False) -> Any:
    """As ``load_backbone`` in float32, but with everything that transformers makes of the model by itself."""
    from transformers import AutoConfig

    config = first_layers(AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code), layers)
    whole = backbone_class(config).from_pretrained(
        str(model_path), config=config, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    if stored_quantization(config) != "none":
        steady_quantized_layers(whole)
    return language_model(whole).eval()


def is_causal(backbone: nn.Module, tokens: int = 16) -> bool:
    """Whether earlier hidden states ignore later tokens; an encoder such as BERT would see the future."""
    ids = a_few_tokens(backbone, tokens)
    other = ids.clone()
    other[0, -1] = 0
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        first, second = (hidden_states(backbone, row)[0, :-1].float() for row in (ids, other))
    backbone.train(was_training)
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def a_few_tokens(backbone: nn.Module, tokens: int = 16) -> Tensor:
    """(1, tokens) ids that the backbone knows."""
    config: Any = backbone.config
    ids = torch.arange(1, tokens + 1, device=next(backbone.parameters()).device)[None]
    return ids % int(text_config_of(config).vocab_size)


def hidden_states(backbone: nn.Module, ids: Tensor) -> Tensor:
    """(batch, tokens) ids -> (batch, tokens, hidden) last hidden states."""
    states: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return states


def quiet_transformers() -> None:
    """No loading bars, no advice on kernels for 4-bit inference alone, no notices about names of the future."""
    # bitsandbytes speaks while it is imported, so its logger is told before.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
