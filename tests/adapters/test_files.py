"""What a saved adapter promises: it comes back as it was, whole or not at all, and no file runs code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from lora_models import FAMILIES, make_model, output, randomize
from source_tree import REPO_ROOT
from torch import nn

import lora
from lora import LoRAError
from stocklora.adapters.files import load_lora, save_lora
from stocklora.adapters.layer import AdapterConfig as LoRAConfig
from stocklora.adapters.layer import apply_lora


def adapted(family: str = "llama", config: LoRAConfig | None = None, seed: int = 1) -> nn.Module:
    model = make_model(family)
    apply_lora(model, config or LoRAConfig(rank=3, alpha=6))
    randomize(model, seed)
    return model.eval()


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


class TestFiles:
    @pytest.mark.parametrize("name", ["a.pth", "a.pt", "deeper/a.safetensors"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_round_trip_onto_a_fresh_base(self, name: str, family: str, tmp_path: Path) -> None:
        config = LoRAConfig(rank=3, alpha=5.0, dropout=0.25)
        model = adapted(family, config)
        save_lora(model, tmp_path / name)
        fresh = make_model(family).eval()
        names = load_lora(fresh, tmp_path / name)
        assert names == list(lora.lora_layers(model))
        assert torch.equal(output(fresh), output(model))
        assert next(iter(lora.lora_layers(fresh).values())).configs == {"default": config}
        load_lora(fresh, tmp_path / name, adapter="again")
        assert torch.equal(output(fresh), output(model))
        assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]

    @pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
    def test_a_failed_write_leaves_the_old_file(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / name
        model = adapted()
        save_lora(model, path)
        old = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        randomize(model, seed=3)
        with pytest.raises(LoRAError, match="cannot write .*No space left"):
            save_lora(model, path)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(self, tmp_path: Path) -> None:
        save_lora(adapted("gpt2"), tmp_path / "gpt2.pth")
        model = make_model()
        with pytest.raises(LoRAError, match="unexpected transformer.h.0"):
            load_lora(model, tmp_path / "gpt2.pth")
        assert not lora.lora_layers(model)

    def test_a_pickle_that_runs_code_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("evil.pth").write_bytes(pickle.dumps({"lora_config": {}, "state": _Attack()}))
        torch.save({"lora_config": {}, "state": _Attack()}, "evil.pt")
        for name in ("evil.pth", "evil.pt"):
            with pytest.raises(LoRAError, match="more than plain tensors"):
                load_lora(make_model(), name)
        assert not Path("pwned").exists()

    @pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
    @pytest.mark.parametrize("content", [None, b"", b"not an adapter"])
    def test_missing_or_broken_files_are_one_line(self, name: str, content: bytes | None, tmp_path: Path) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LoRAError, match=f"cannot read .*{name}") as caught:
            load_lora(make_model(), path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content",
        [
            [1, 2],
            {"weights": torch.zeros(1)},
            {"lora_config": {"r": 8}, "state": {}},
            {"lora_config": {}, "state": {}},
            {"lora_config": {}, "state": 3},
            {"lora_config": None, "state": {}},
            {"lora_config": {"rank": 3}, "state": {3: 4}},
        ],
    )
    def test_other_contents_are_refused(self, content: object, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(LoRAError):
            load_lora(make_model(), tmp_path / "a.pth")

    def test_safetensors_of_others_point_to_import_peft(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(LoRAError, match="use import_peft"):
            load_lora(make_model(), tmp_path / "a.safetensors")

    def test_an_unknown_suffix_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(LoRAError, match=r"name it .pth or .safetensors"):
            save_lora(adapted(), tmp_path / "a.bin")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["own_lora.pth", "own_lora.safetensors"])
def test_a_file_of_an_earlier_version_computes_what_it_did(name: str) -> None:
    """A DoRA adapter, written when all of this was in lora.py, and the hidden state that it gave."""
    from transformers import AutoModel

    earlier = REPO_ROOT / "tests" / "fixtures" / "earlier_weights"
    model = AutoModel.from_pretrained(earlier / "base_qwen3", dtype=torch.float32).eval()
    load_lora(model, earlier / name)
    hidden = model(input_ids=torch.arange(3, 15)[None]).last_hidden_state[0, -1]
    expected = torch.tensor(json.loads((earlier / "own_lora_hidden.json").read_text()))
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
