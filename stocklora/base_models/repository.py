"""Which files of a model's repository are its base model: one copy of the weights, tokenizer, templates, license."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from stocklora.base_models.folders import has_tokenizer
from stocklora.cli.console import UserError, listed

MODEL_TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "emoji.json", "tokenizer.model",
    "spiece.model", "spm.model", "sentencepiece*.model", "tekken.json", "tiktoken.model", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
CODE = ("*.py", "*.json", "*.txt", "*.model")  # what a model's own Python files are, and read
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each alone, or as an index with shards; the first is preferred
ReadIndex = Callable[[str], Any]  # the JSON of one of a repository's files


@dataclass(frozen=True)
class RemoteFile:
    """A file in a model repository; ``size`` in bytes, hashes where the hub tells them."""

    path: str
    size: int | None
    sha256: str | None = None
    git_oid: str | None = None


def select_files(
    files: Sequence[RemoteFile], model: str, read_index: ReadIndex, *, trust_remote_code: bool = False
) -> list[RemoteFile]:
    """The files that loading needs: config, tokenizer, chat templates and one copy of the weights.

    Safetensors are preferred; PyTorch ``.bin`` stands in where there are none. Python files, and what else a tokenizer
    of the model's own may read, come along only when the user trusts them.

    Raises:
        UserError: the repository has no config.json, no tokenizer, or no weights in either format.
    """
    by_path = {file.path: file for file in files if ".." not in file.path.split("/")}
    if "config.json" not in by_path:
        raise UserError(f"{model} has no config.json: it is not a transformers model (an adapter, or GGUF only?)")
    weights = weight_files(by_path.keys(), model, read_index)
    patterns = (*MODEL_TEXTS, *CODE) if trust_remote_code else MODEL_TEXTS
    chosen = {path for path in by_path if any(matches(path, pattern) for pattern in patterns)}
    chosen = {path for path in chosen if not path.endswith(".index.json")}
    if not has_tokenizer(chosen) and not (trust_remote_code and any(matches(path, "*.py") for path in chosen)):
        code = any(matches(path, "*.py") for path in by_path)
        hint = "; it may be among its own Python files: add --trust_remote_code if you trust its author" if code else ""
        raise UserError(f"{model} has no tokenizer (tokenizer.json or the like){hint or '; choose another model'}")
    return [by_path[path] for path in sorted(chosen)] + [by_path[path] for path in weights]


def weight_files(paths: Collection[str], model: str, read_index: ReadIndex) -> list[str]:
    """The one weight file, or the index with the shards that it names.

    Other copies of the weights stay where they are: ``consolidated*`` and ``original/`` in another project's layout,
    variants in another number format, ONNX, TensorFlow, Flax, GGUF.

    Raises:
        UserError: there is neither, or a shard is missing.
    """
    for single in WEIGHTS:
        if single in paths:
            return [single]
        if (index := f"{single}.index.json") in paths:
            try:
                shards = sorted(set(read_index(index)["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} of {model} names no shards; choose another model") from None
            if missing := [shard for shard in shards if shard not in paths]:
                raise UserError(f"{model} lacks {missing[0]}, which its {index} names; try another --revision")
            return [index, *shards]
    others = sorted(path for path in paths if path.endswith((".gguf", ".safetensors", ".bin", ".pth", ".h5", ".onnx")))
    found = f" (there is {listed(others, 3)})" if others else ""
    raise UserError(
        f"{model} has neither safetensors nor PyTorch weights in transformers' layout in its top folder{found}; choose "
        "another model"
    )


def matches(path: str, pattern: str) -> bool:
    """``fnmatch`` that does not let ``*`` cross a folder."""
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)
