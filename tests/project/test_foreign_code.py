"""Files that try to run code, through every door of this program. Each attack would leave a file named ``owned``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chat_models import make_adapter
from packaging.requirements import Requirement
from sft_folders import instruction_rows
from source_tree import REPO_ROOT
from torch import nn

from lora import LoRAError
from stocklora.adapters.files import load_lora, read_peft
from stocklora.backtest.parts import part_path, read_parts
from stocklora.base_models.loading import BaseModel, load_causal_model
from stocklora.cli.console import UserError
from stocklora.cli.settings import read_config
from stocklora.finetune.resume import read_state
from stocklora.forecaster.weights import load_weights
from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.chat.sources import find_sources
from stocklora.instruct.rows.chat_template import prepare_tokenizer
from stocklora.instruct.sft.run import run_training
from stocklora.instruct.sft.settings import Resolved, SftSettings
from stocklora.prices.store import PriceStore
from stocklora.runtime.files import sha256_of

REFUSALS = (UserError, LoRAError)
CPU = torch.device("cpu")


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """What no attack may make."""
    return tmp_path / "owned"


@pytest.fixture
def base(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["shallow_qwen3"], tmp_path / "base"))


def changed(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")


def test_the_attack_works_where_a_file_is_simply_loaded(owned: Path) -> None:
    pickle.loads(pickle.dumps(Attack(owned)))
    assert owned.exists()


# ------------------------------------------------------------------------------------------------------ pickles


def as_array(attack: Attack) -> bytes:
    """An ``.npz`` whose one array is of objects."""
    stream = io.BytesIO()
    names = ("origins", "ewma", "dates", "values", "Date", "Close")
    np.savez(stream, **{name: np.array([attack, attack], dtype=object) for name in names})
    return stream.getvalue()


def as_torch(attack: Attack) -> bytes:
    stream = io.BytesIO()
    content = {"format": "stocklora-forecaster", "format_version": 1, "lora_config": {}, "state": attack}
    torch.save(content, stream)
    return stream.getvalue()


def old_torch(attack: Attack) -> bytes:
    """As torch wrote before its files were zips."""
    stream = io.BytesIO()
    torch.save({"state": attack}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def bare(attack: Attack) -> bytes:
    return pickle.dumps({"format": "stocklora-forecaster", "state": attack})


PICKLES = (as_torch, old_torch, bare)


def state_from(folder: Path, content: bytes) -> None:
    path = folder / "state.pth"
    path.write_bytes(content)
    manifest = {"bytes": len(content), "sha256": sha256_of(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest), encoding="utf-8")
    read_state(path)


def adapter_from(folder: Path, content: bytes) -> None:
    (folder / "a.pth").write_bytes(content)
    load_lora(nn.Sequential(nn.Linear(4, 4)), folder / "a.pth")


def peft_from(folder: Path, content: bytes) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    (folder / "adapter_model.bin").write_bytes(content)
    read_peft(folder)


def weights_from(folder: Path, content: bytes) -> None:
    (folder / "w.pth").write_bytes(content)
    load_weights(folder / "w.pth")


@pytest.mark.parametrize("form", PICKLES)
@pytest.mark.parametrize("door", [weights_from, state_from, adapter_from, peft_from])
def test_pickles_of_ours(
    door: Callable[[Path, bytes], None], form: Callable[[Attack], bytes], tmp_path: Path, owned: Path
) -> None:
    with pytest.raises(REFUSALS) as refused:
        door(tmp_path, form(Attack(owned)))
    assert "\n" not in str(refused.value)
    assert not owned.exists()


def test_arrays_of_objects(tmp_path: Path, owned: Path) -> None:
    content = as_array(Attack(owned))
    (tmp_path / "tickers.json").write_text(json.dumps({"tickers": {"A": 0}, "exchanges": {}}), encoding="utf-8")
    (tmp_path / "00000.npz").write_bytes(content)
    with pytest.raises(UserError, match="allow_pickle=False"):
        PriceStore(tmp_path)["A"]
    part_path(tmp_path, 0, 0).write_bytes(content)
    plan: Any = SimpleNamespace(cuts=[0])
    with pytest.raises(UserError, match="allow_pickle=False"):
        list(read_parts(tmp_path, {"A": pd.DataFrame()}, ["ewma"], plan))
    assert not owned.exists()


@pytest.mark.parametrize("form", PICKLES)
def test_weights_of_a_base_model(form: Callable[[Attack], bytes], base: Path, owned: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(form(Attack(owned)))
    with pytest.raises(UserError) as refused:
        load_causal_model(base, dtype=torch.float32, device=CPU)
    assert "\n" not in str(refused.value)
    assert not owned.exists()


def test_weights_of_an_adapter_that_peft_loads(base: Path, tmp_path: Path, owned: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(as_torch(Attack(owned)))
    with pytest.raises(UserError):
        load_chat_model(base, {"a": adapter})
    assert not owned.exists()


def test_a_checkpoint_of_the_assistant(base: Path, tmp_path: Path, owned: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(instruction_rows(12), ensure_ascii=False), encoding="utf-8")
    settings = SftSettings(
        model_path=base, data_path=[rows], output_dir=tmp_path / "out", use_lora=True, lora_r=2, batch_size=4,
        gradient_accumulation_steps=1, num_epochs=2, dtype="float32", learning_rate=1e-3,
    )  # fmt: skip
    sources = dict.fromkeys([field.name for field in dataclasses.fields(settings)], "default")
    assert run_training(Resolved(settings, sources), "fine_tune_qwen.py") == 0
    checkpoint = min((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again = dataclasses.replace(settings, resume_from_checkpoint=str(checkpoint), num_epochs=3)
    whole = shutil.copytree(checkpoint, tmp_path / "whole")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
        shutil.rmtree(checkpoint)
        shutil.copytree(whole, checkpoint)
        (checkpoint / name).write_bytes(as_torch(Attack(owned)))
        manifest = checkpoint / "stocklora_checkpoint.json"
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        changed(manifest, files=listed | {name: (checkpoint / name).stat().st_size}, sha256={})
        if name == "training_args.bin":  # nobody reads it
            assert run_training(Resolved(again, sources), "fine_tune_qwen.py") == 0
        else:
            with pytest.raises(UserError, match="holds code"):
                run_training(Resolved(again, sources), "fine_tune_qwen.py")
        assert not owned.exists(), name


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [[{}]]"])
def test_yaml_tags(tag: str, tmp_path: Path, owned: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"epochs: {tag.format(owned)}\n", encoding="utf-8")
    with pytest.raises(UserError, match="could not determine a constructor"):
        read_config(tmp_path / "c.yaml")
    assert not owned.exists()


# A class of its own: transformers marks the class that such a file names, and one of its own would stay marked.
CODE = "import os\nos.mkdir({!r})\nfrom transformers import {} as Base\n\nclass Own(Base):\n    pass\n"


@pytest.mark.parametrize(
    ("name", "auto_map", "kind"),
    [
        ("config.json", {"AutoConfig": "own.Own"}, "Qwen3Config"),
        ("config.json", {"AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own"}, "Qwen3ForCausalLM"),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}, "PreTrainedTokenizerFast"),
    ],
)
def test_auto_map(name: str, auto_map: dict[str, Any], kind: str, base: Path, owned: Path) -> None:
    (base / "own.py").write_text(CODE.format(str(owned), kind), encoding="utf-8")
    unknown = {"tokenizer_class": "OwnTokenizer"} if name.startswith("tokenizer") else {"model_type": "unheard_of"}
    for extra in ({}, unknown):  # the second: transformers has no class of its own to take instead
        changed(base / name, auto_map=auto_map, **extra)
        for door in (
            lambda: load_causal_model(base, dtype=torch.float32, device=CPU),
            lambda: prepare_tokenizer(base),
            lambda: BaseModel(base).config,
            lambda: BaseModel(base).tokenizer,
        ):
            with contextlib.suppress(UserError):  # a class that transformers has itself is taken in its place
                door()
        assert not owned.exists()
    if "AutoModel" in auto_map:
        changed(base / name, model_type="qwen3")
    with pytest.raises(Exception):  # noqa: B017 - the foreign class fails in its own way, once its code has run
        prepare_tokenizer(base, trust_remote_code=True)
        load_causal_model(base, dtype=torch.float32, device=CPU, trust_remote_code=True)
        raise RuntimeError
    assert owned.exists()


def test_a_generate_of_its_own(base: Path, owned: Path) -> None:
    (base / "custom_generate").mkdir()
    code = CODE.format(str(owned), "Qwen3Config") + "def generate(*_, **__):\n    return None\n"
    (base / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    load_causal_model(base, dtype=torch.float32, device=CPU)
    assert not owned.exists()
    load_causal_model(base, dtype=torch.float32, device=CPU, trust_remote_code=True)
    assert owned.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:forward"},
        {"_attn_implementation_internal": "kernels-community/flash-attn"},
        {"text_config": {"attn_implementation": {"": "sdpa", "vision": "someone/kernel"}}},
        {"experts_implementation": "someone/kernel"},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "someone/kernel:RMSNorm"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_kernels_of_a_hub(settings: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(base / "config.json", **settings)
    for door in (
        lambda: load_causal_model(base, dtype=torch.float32, device=CPU),
        lambda: load_causal_model(base, dtype=torch.float32, device=CPU, trust_remote_code=True),
        lambda: BaseModel(base),
        lambda: find_sources(base, []),
    ):
        with pytest.raises(UserError, match="names code that would be loaded"):
            door()


def test_a_kernel_would_be_fetched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check stands against; where this fails, transformers has closed that door itself."""
    from transformers import AutoModelForCausalLM

    asked: list[str] = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.load_and_register_attn_kernel", lambda name, *_, **__: asked.append(name)
    )
    changed(base / "config.json", attn_implementation="kernels-community/flash-attn2")
    with pytest.raises(Exception):  # noqa: B017 - it goes on with what is no kernel
        AutoModelForCausalLM.from_pretrained(base)
    assert "kernels-community/flash-attn2" in asked


def test_a_module_that_an_adapter_names(base: Path, tmp_path: Path, owned: Path, monkeypatch: Any) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "own_core.py").write_text(f"import os\nos.mkdir({str(owned)!r})\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed(adapter / "adapter_config.json", megatron_core="own_core", megatron_config={"a": 1})
    with pytest.raises(UserError, match="names code that would be loaded"):
        find_sources(base, [str(adapter)])
    with pytest.raises(LoRAError, match="not supported"):
        read_peft(adapter)
    assert not owned.exists()


# ------------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("package", "old"),
    [("torch", "2.9.1"), ("transformers", "5.2.0"), ("jinja2", "3.1.5")],
)
def test_releases_that_could_be_passed_by_are_not_allowed(package: str, old: str) -> None:
    lines = (REPO_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    allowed = {
        r.name.lower(): r for line in lines if (text := line.partition("#")[0].strip()) for r in [Requirement(text)]
    }
    assert not allowed[package].specifier.contains(old)
    assert tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
