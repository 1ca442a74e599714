"""An adapter merged into its base: a plain model that anything loads, and how far it is from the adapter."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stocklora.base_models.folders import check_empty, check_files, copy_companions, describe_model, made_whole
from stocklora.cli.console import UserError, one_line, print_table, say
from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.chat.model import ChatModel
from stocklora.instruct.chat.settings import InferenceSettings
from stocklora.instruct.chat.sources import BASE, TRAINING_INFO, Sources, training_info
from stocklora.instruct.chat.terminal import QUESTIONS
from stocklora.instruct.rows.chat_template import end_token_ids, prompt_ids
from stocklora.instruct.rows.formats import Message
from stocklora.runtime.files import sha256_of, write_json

VERIFY_TOKENS = 24  # of each greedy answer
# Largest logit difference over the largest logit that rounding accounts for, with much to spare.
MOST_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Reading:
    """What a model says to the questions: (tokens, vocabulary) float32 logits each, and greedy answers."""

    logits: list[torch.Tensor]
    answers: list[str]


def merge_adapter(sources: Sources, settings: InferenceSettings) -> None:
    """Write the merged model to ``settings.merge``, load it anew, and print how it differs from the adapter.

    Merged in float32 and into the unquantized base; stored in the base's own number format unless ``--dtype`` says
    otherwise, and bfloat16 rounds every weight.

    Raises:
        UserError: nothing to merge, a folder that is there already, an adapter that cannot be merged, or a merged
            model that says something else.
    """
    out = settings.merge
    assert out is not None
    name = _chosen(sources, settings)
    check_empty(out, "--merge")
    folder = sources.adapters[name]
    load = partial(
        load_chat_model, device=settings.device, dtype="float32", trust_remote_code=settings.trust_remote_code
    )
    chat = load(sources.base, {name: folder})
    before, start = reading(chat, name), reading(chat, BASE)
    stored = _stored_dtype(sources.base, settings)
    merge_weights(chat, folder)
    check_same(before.logits, logits_of(chat, name), torch.float32, f"{folder} cannot be merged; use it as it is")
    size = _save(chat, name, sources, out, stored)
    del chat
    gc.collect()
    say(f"merged: '{name}' into the unquantized {sources.base_name}, stored as {str(stored).removeprefix('torch.')}")
    say(f"model: {out} ({size / 1e6:,.1f} MB)")
    after = reading(load(out), BASE)
    report(before, start, after)
    check_same(before.logits, after.logits, stored, f"do not use {out}")


def _chosen(sources: Sources, settings: InferenceSettings) -> str:
    """The name of the adapter to merge."""
    names = ", ".join(sources.adapters)
    if not sources.adapters:
        raise UserError(f"{sources.base} is a whole model already: there is nothing to merge")
    if settings.adapter is None and len(sources.adapters) > 1:
        raise UserError(f"--merge takes one adapter; choose with --adapter: {names}")
    name = settings.adapter or next(iter(sources.adapters))
    if name not in sources.adapters:
        raise UserError(f"no adapter '{name}' to merge; there are: {names}")
    return name


def merge_weights(chat: ChatModel, folder: Path) -> None:
    """Make of the only adapter and its base one plain model; ``folder`` is where the adapter came from."""
    untie(chat.model.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are no longer tied
            chat.model = chat.model.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"cannot merge {folder}: {one_line(str(error))[:300]}") from None


def _save(chat: ChatModel, name: str, sources: Sources, out: Path, stored: torch.dtype) -> int:
    """Write the merged model and all that goes with it; its size in bytes."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):
        # Not the empty settings with which we generate: what the base's maker recommends.
        chat.model.generation_config = GenerationConfig.from_pretrained(sources.base)
    chat.model.generation_config.eos_token_id = sorted(end_token_ids(chat.tokenizer(name)))
    folder = sources.adapters[name]
    record = {
        **training_info(folder),
        "base_model": {**describe_model(sources.base), "path": str(sources.base)},
        "merged_from": {
            "adapter": folder.name,
            "sha256": sha256_of(next(folder.glob("adapter_model.*"))),
            "stored_as": str(stored).removeprefix("torch."),
        },
    }
    with made_whole(out) as unfinished:
        chat.model.to(stored).save_pretrained(unfinished)
        chat.tokenizer(name).save_pretrained(unfinished)
        copy_companions(sources.base, unfinished)
        write_json(unfinished / TRAINING_INFO, record)
        check_files(unfinished, shown=out, command="python inference_lora.py --merge")
        return sum(path.stat().st_size for path in unfinished.iterdir())


def untie(network: Any) -> None:
    """Give input and output embeddings weights of their own where an adapter changes one of them.

    Merged into a weight that both share, its change of the one would become the other's as well.
    """
    layers: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
    if not any(hasattr(layer, "get_base_layer") for layer in layers):
        return
    first, last = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers)
    if last is not None and last.weight is first.weight:
        last.weight = torch.nn.Parameter(last.weight.detach().clone(), requires_grad=False)
        network.config.tie_word_embeddings = False


def check_same(
    adapter: Sequence[torch.Tensor], merged: Sequence[torch.Tensor], dtype: torch.dtype, advice: str
) -> None:
    """Raise a UserError if logits are farther apart than rounding of the weights to ``dtype`` accounts for."""
    if not all(bool(torch.isfinite(logits).all()) for logits in merged):
        raise UserError(f"the merged model computes numbers that are not finite; {advice}")
    largest = max(float(logits.abs().max()) for logits in adapter)
    gap = largest_gap(adapter, merged)
    if gap > MOST_ROUNDING.get(dtype, 0.1) * largest:
        raise UserError(f"the merged model is another than the adapter: logits differ by up to {gap:.3g}; {advice}")


def reading(model: ChatModel, adapter: str) -> Reading:
    """Logits of every token of the built-in questions, and the greedy answers to them."""
    with model.using(adapter):
        logits = logits_of(model, adapter)
    asked = [[Message("user", text)] for text in QUESTIONS]
    return Reading(logits, [model.reply(it, adapter=adapter, max_new_tokens=VERIFY_TOKENS) for it in asked])


@torch.inference_mode()
def logits_of(model: ChatModel, adapter: str) -> list[torch.Tensor]:
    """What the network says to the questions as it is; ``adapter`` names the tokenizer."""
    logits = []
    for text in QUESTIONS:
        ids = prompt_ids(model.tokenizer(adapter), [Message("user", text)])[-model.context_tokens :]
        inputs = torch.tensor([ids], device=model.device)  # (1, tokens)
        logits.append(model.model(input_ids=inputs, use_cache=False).logits[0].float().cpu())
    return logits


def report(adapter: Reading, base: Reading, merged: Reading) -> None:
    """Print how far the merged model, and for scale the base, are from the adapter beside the base."""
    rows = []
    for label, other in (("merged model, loaded from disk", merged), ("base model, for scale", base)):
        gap = largest_gap(adapter.logits, other.logits)
        same = sum(mine == theirs for mine, theirs in zip(adapter.answers, other.answers, strict=True))
        rows.append([label, f"{gap:.3g}", f"{same} of {len(adapter.answers)}"])
    print_table(
        f"Compared with the adapter beside its base, float32, on {len(QUESTIONS)} questions",
        ["", "largest logit difference", f"greedy answers equal ({VERIFY_TOKENS} tokens)"],
        rows,
    )


def largest_gap(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Over all tokens and all of the vocabulary that both have."""
    gaps = []
    for one, other in zip(first, second, strict=True):
        words = min(one.shape[-1], other.shape[-1])
        gaps.append(float((one[:, :words] - other[:, :words]).abs().max()))
    return max(gaps)


def _stored_dtype(base: Path, settings: InferenceSettings) -> torch.dtype:
    """``--dtype``, or the number format that the base itself is stored in."""
    from transformers import AutoConfig

    if settings.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    return AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code).dtype or torch.float32
