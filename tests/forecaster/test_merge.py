"""merge_lora.py, adapter folders and averages: the same forecasts in another form, or a line that says why not."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from price_tables import random_prices
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoModelForCausalLM
from tuned_models import CPU, LORA, VARIANTS, built, content_of, exact, spec_of, unsettled

import framework_llm
import merge_lora
import stocklora.forecaster.merge
from stocklora.adapters.layer import AdapterConfig
from stocklora.cli.console import UserError
from stocklora.forecaster.ensemble import Ensemble, average, mean_head
from stocklora.forecaster.forecaster import Forecaster, load_forecaster
from stocklora.forecaster.merge import merge, saved_class
from stocklora.forecaster.settings import ForecastSettings, MergeSettings
from stocklora.forecaster.weights import WeightsFile, load_weights, save_weights
from stocklora.prices.calendar import sessions_between
from stocklora.prices.tables import write_prices

META = {"source": "test", "adjust": "all", "interval": "1d"}
SCORES = {"model": {"pinball_bp": 60.0, "origins": 30}, "naive": {"pinball_bp": 62.5, "origins": 30}}


@pytest.fixture(scope="module")
def prices() -> dict[str, pd.DataFrame]:
    days = sessions_between("AAPL", "2024-01-01", "2024-06-30")
    return {f"T{seed}": random_prices(len(days), seed).set_index(days) for seed in range(2)}


@pytest.fixture(scope="module")
def table(tmp_path_factory, prices) -> Path:
    path = tmp_path_factory.mktemp("prices") / "prices.csv"
    write_prices(prices, path, META)
    return path


def saved(path: Path, model: Path, method: str, quantization: str = "none", seed: int = 0, **lora: Any) -> Path:
    forecaster = unsettled(built(spec_of(model, method, quantization, **lora), model), seed)
    save_weights(path, dataclasses.replace(content_of(forecaster), training={"test_scores": SCORES}))
    return path


def quantiles(weights: Path, model: Path, prices: dict[str, pd.DataFrame]) -> np.ndarray:
    forecaster, _ = load_forecaster(weights, model, CPU, torch.float32)
    return quantiles_of(forecaster, prices)


def quantiles_of(forecaster: Forecaster, prices: dict[str, pd.DataFrame]) -> np.ndarray:
    return forecaster.quantiles(forecaster.packed_examples(prices, {name: range(30, 70) for name in prices}))


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "variant"),
    [("lora", "plain"), ("peft", "plain"), ("full", "plain"), ("lora", "dora"), ("peft", "dora"), ("lora", "pissa"),
     ("peft", "pissa"), ("lora", "rslora")],
)  # fmt: skip
def test_a_merged_model_forecasts_as_the_adapters_did(tiny_models, prices, tmp_path, family, method, variant) -> None:
    model = tiny_models[family]
    weights = saved(tmp_path / "w.pth", model, method, **VARIANTS[variant])
    merge(MergeSettings(lora_weights=weights, model_path=model, output=tmp_path / "merged", device="cpu"))
    before = quantiles(weights, model, prices)
    after = quantiles(tmp_path / "merged", tmp_path / "merged", prices)
    np.testing.assert_allclose(after, before, rtol=2e-4, atol=2e-6)
    assert not list(tmp_path.glob("*.incomplete"))
    # a plain model of its class, with a vocabulary and without any trace of an adapter
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(model)
    assert type(whole) is type(base)
    assert whole.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(whole.get_output_embeddings().weight, base.get_output_embeddings().weight) or method == "full"
    assert tensor_names(tmp_path / "merged") == tensor_names(model)  # tied weights are stored once
    text = torch.arange(3, 40)[None]
    assert not torch.allclose(whole(text).logits, base(text).logits, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_merged_model_is_the_one_that_peft_merges(tiny_models, tmp_path, family) -> None:
    model = tiny_models[family]
    weights = saved(tmp_path / "w.pth", model, "lora")
    merge(MergeSettings(
        lora_weights=weights, model_path=model, output=tmp_path / "merged", export_peft=tmp_path / "adapter",
        device="cpu",
    ))  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(model), tmp_path / "adapter")
    reference = theirs.merge_and_unload()
    ours = AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_what_was_trained_quantized_is_merged_into_the_unquantized_base(
    tiny_model, prices, table, tmp_path, quantization, capsys
) -> None:
    weights = saved(tmp_path / "w.pth", tiny_model, "lora", quantization)
    merge(MergeSettings(
        lora_weights=weights, model_path=tiny_model, output=tmp_path / "merged", verify=True, data=[table], device="cpu"
    ))  # fmt: skip
    text = capsys.readouterr().out
    assert "into the unquantized qwen3" in text
    content = load_weights(weights)
    unquantized = dataclasses.replace(content, spec=dataclasses.replace(content.spec, quantization="none"))
    save_weights(tmp_path / "plain.pth", unquantized)
    merged = quantiles(tmp_path / "merged", tmp_path / "merged", prices)
    np.testing.assert_allclose(merged, quantiles(tmp_path / "plain.pth", tiny_model, prices), rtol=2e-4, atol=2e-6)
    # the printed difference is that of the last days, within the rounding of the print
    trained, _ = load_forecaster(weights, tiny_model, CPU, torch.float32)
    result, _ = load_forecaster(tmp_path / "merged", tmp_path / "merged", CPU, torch.float32)
    last = {name: range(len(frame) - 40, len(frame)) for name, frame in prices.items()}
    forecasts = [each.quantiles(each.packed_examples(prices, last)) for each in (trained, result)]
    apart = 1e4 * np.abs(forecasts[0] - forecasts[1])
    line = next(line for line in text.splitlines() if "as in training" in line)
    largest, mean = (float(cell) for cell in line.split()[-3:-1])
    assert largest == pytest.approx(apart.max(), rel=1e-2)
    assert mean == pytest.approx(apart.mean(), rel=1e-2)
    assert largest > 0.05
    assert "adapters beside a 4-bit base" in text
    same = next(line for line in text.splitlines() if "beside the unquantized base" in line)
    assert float(same.split()[-3]) < 0.01


def test_cut_layers_stay_cut_and_the_stored_type_stays_or_is_chosen(tiny_model, prices, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    spec = dataclasses.replace(spec_of(base, "lora"), backbone_layers=1)
    save_weights(tmp_path / "w.pth", content_of(unsettled(built(spec, base))))
    for dtype, stored in (("auto", torch.bfloat16), ("float32", torch.float32)):
        folder = tmp_path / dtype
        merge(MergeSettings(
            lora_weights=tmp_path / "w.pth", model_path=base, output=folder, dtype=dtype, device="cpu"
        ))  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype is stored
        assert model.config.num_hidden_layers == len(model.model.layers) == 1
        close = 2e-2 if stored is torch.bfloat16 else 2e-4
        before, after = quantiles(tmp_path / "w.pth", base, prices), quantiles(folder, folder, prices)
        assert np.abs(after - before).max() < close * np.abs(before).max()


def test_a_merged_model_and_its_base_are_not_taken_for_each_other(tiny_model, tmp_path) -> None:
    weights = saved(tmp_path / "w.pth", tiny_model, "lora")
    merged = tmp_path / "merged"
    merge(MergeSettings(lora_weights=weights, model_path=tiny_model, output=merged, device="cpu"))
    assert "is another model" in error_of(load_forecaster, weights, merged, CPU, torch.float32)
    assert "is another model" in error_of(load_forecaster, merged, tiny_model, CPU, torch.float32)
    again = MergeSettings(lora_weights=merged, model_path=merged, output=tmp_path / "again", device="cpu")
    assert "nothing to merge" in error_of(merge, again)
    merged.rename(tmp_path / "moved")  # its name is not what it is known by
    load_forecaster(tmp_path / "moved", tmp_path / "moved", CPU, torch.float32)


def test_mistakes_are_one_line_and_leave_nothing(tiny_models, tmp_path, monkeypatch) -> None:
    model = tiny_models["qwen3"]
    weights, head = saved(tmp_path / "w.pth", model, "lora"), saved(tmp_path / "h.pth", model, "head")
    full = saved(tmp_path / "f.pth", model, "full")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()

    def error(**settings: Any) -> str:
        options = {"lora_weights": weights, "model_path": model, "output": tmp_path / "out", "device": "cpu"}
        return error_of(lambda: merge(MergeSettings(**{**options, **settings})))

    assert "has nothing to merge: its forecast head alone" in error(lora_weights=head)
    assert "is another model" in error(model_path=tiny_models["gpt2"])
    assert "is there already" in error(output=tmp_path / "taken")
    assert "is there already" in error(export_peft=tmp_path / "taken")
    assert "has no adapter to export; use --output" in error(lora_weights=full, export_peft=tmp_path / "out2")
    assert "say what to write" in error(output=None)
    assert "--verify looks at a merged model" in error(output=None, export_peft=tmp_path / "out", verify=True)
    assert "give --verify too" in error(data=[tmp_path / "p.csv"])
    broken = load_weights(weights)
    next(iter(broken.adapters.values())).fill_(torch.inf)
    save_weights(tmp_path / "inf.pth", broken)
    assert "not finite" in error(lora_weights=tmp_path / "inf.pth")
    monkeypatch.setattr(
        stocklora.forecaster.merge, "save_weights", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full"))
    )
    assert "disk full" in error()
    assert {path.name for path in tmp_path.iterdir()} == {"w.pth", "h.pth", "f.pth", "inf.pth", "taken"}


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def safetensors_disk_full(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def torch_disk_full(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:874] . PytorchStreamWriter failed writing file data/0")


@pytest.mark.parametrize(
    ("place", "fails"),
    [
        ("transformers.modeling_utils.safe_save_file", safetensors_disk_full),
        ("shutil.copyfile", disk_full),
        ("torch.save", torch_disk_full),
        ("pathlib.Path.mkdir", disk_full),
        ("pathlib.Path.rename", disk_full),
    ],
)
@pytest.mark.parametrize("flag", ["--output", "--export_peft"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_model, tmp_path, monkeypatch, capsys, place, fails, flag):
    weights = saved(tmp_path / "w.pth", tiny_model, "lora")
    monkeypatch.setattr(place, fails)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    options = ["--lora_weights", str(weights), "--model_path", str(tiny_model), flag, str(tmp_path / "out")]
    code = merge_lora.main([*options, "--device", "cpu"])
    printed = capsys.readouterr().err
    if flag == "--export_peft" and place in ("shutil.copyfile", "transformers.modeling_utils.safe_save_file"):
        assert code == 0  # an adapter has none of these
        return
    assert code == 2
    assert re.fullmatch(r"error: cannot write .*(No space left on device|the disk is full; free some space)\n", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_the_script_from_weights_to_forecast(call_script, tiny_model, table, tmp_path, monkeypatch, capsys) -> None:
    saved(tmp_path / "w.pth", tiny_model, "peft", "4bit")
    result = call_script(
        "merge_lora.py", "--lora_weights", "w.pth", "--model_path", tiny_model, "--output", "merged", "--export_peft",
        "adapter", "--verify", "--data", table, "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "how far from the merged model's" in result.stdout
    assert result.stderr == ""
    monkeypatch.chdir(tmp_path)
    for model, weights in (("merged", "merged"), (str(tiny_model), "adapter")):
        options = ["--test_csv", str(table), "--model_path", model, "--lora_weights", weights]
        assert framework_llm.main(options) == 0, capsys.readouterr().err
        assert len(pd.read_csv(tmp_path / "predictions.csv")) == 6
    assert "test pinball loss of this model: 60.00 bp" in capsys.readouterr().out
    assert merge_lora.main(["--lora_weights", "w.pth", "--model_path", str(tiny_model)]) == 2
    assert "say what to write" in capsys.readouterr().err
    assert merge_lora.main(["--lora_weights", "x.pth", "--output", "y"]) == 2
    assert "no weights file x.pth" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ PEFT's folders


@pytest.mark.parametrize("method", ["lora", "peft"])
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "pissa", "bias", "all biases"])
def test_an_exported_adapter_is_pefts_and_forecasts_as_before(tiny_models, prices, tmp_path, method, variant) -> None:
    model = tiny_models["gpt2" if "bias" in variant else "qwen3"]
    weights = saved(tmp_path / "w.pth", model, method, **VARIANTS[variant])
    folder = tmp_path / "adapter"
    merge(MergeSettings(lora_weights=weights, model_path=model, export_peft=folder, device="cpu"))
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "stocklora_forecaster.pth",
    }  # fmt: skip
    before, _ = load_forecaster(weights, model, CPU, torch.float32)
    after, content = load_forecaster(folder, model, CPU, torch.float32)
    assert content.spec.method == method
    if variant == "pissa":  # plain LoRA of twice the rank
        np.testing.assert_allclose(quantiles_of(after, prices), quantiles_of(before, prices), rtol=2e-4, atol=2e-6)
    else:
        assert exact(after.forecast(prices)) == exact(before.forecast(prices))
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(model), folder).eval()
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(
        theirs(input_ids=ids).last_hidden_state, before.model.backbone(input_ids=ids).last_hidden_state,
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_an_adapter_that_peft_saved_loads_with_our_head_beside_it(tiny_model, prices, tmp_path) -> None:
    forecaster = unsettled(built(spec_of(tiny_model, "peft"), tiny_model))
    forecaster.model.backbone.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    folder = tmp_path / "theirs"
    assert "without a forecast head (stocklora_forecaster.pth)" in error_of(load_weights, folder)
    # The head remembers another rank; the adapter knows better.
    content = content_of(forecaster)
    spec = dataclasses.replace(content.spec, lora={**LORA, "rank": 7, "alpha": 1.0})
    save_weights(folder / "stocklora_forecaster.pth", dataclasses.replace(content, spec=spec, adapters={}))
    loaded, _ = load_forecaster(folder, tiny_model, CPU, torch.float32)
    assert exact(loaded.forecast(prices)) == exact(forecaster.forecast(prices))
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "whose start is not in it"),
        ({"peft_type": "IA3"}, "is no LoRA adapter"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        assert words in error_of(load_weights, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert "cannot load the adapter" in error_of(load_weights, folder)


def test_a_folder_without_a_head_says_what_to_give(tiny_model, tmp_path) -> None:
    assert "is a folder without stocklora_forecaster.pth" in error_of(load_weights, tmp_path)
    saved(tmp_path / "best_lora_weights.pth", tiny_model, "lora")
    assert f"give the weights file in it: {tmp_path / 'best_lora_weights.pth'}" in error_of(load_weights, tmp_path)


# ---------------------------------------------------------------------------------------------------- averages


def test_a_mean_head_is_the_mean_of_the_heads(tiny_model) -> None:
    """Whatever the features, and though each has its own centre and spread of them."""
    heads, draw = [], torch.Generator().manual_seed(0)
    for seed in range(3):
        head = unsettled(built(spec_of(tiny_model, "head"), tiny_model), seed).model.head
        head.mean.copy_(torch.randn(32, generator=draw))
        head.spread.copy_(torch.rand(32, generator=draw) + 0.5)
        heads.append(head)
    shares = [0.5, 0.3, 0.2]
    result = mean_head([head.state_dict() for head in heads], shares)
    hidden = torch.randn(20, 32, generator=draw)
    expected = sum(share * head.linear(head.features(hidden)) for share, head in zip(shares, heads, strict=True))
    heads[0].load_state_dict(result)
    torch.testing.assert_close(heads[0].linear(heads[0].features(hidden)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "peft", "full"])
def test_an_average_has_the_mean_update_of_every_layer(tiny_model, tmp_path, method) -> None:
    ranks = [{"rank": 2, "alpha": 6.0}, {"rank": 3, "alpha": 2.0}] if method != "full" else [{}, {}]
    contents, merged = [], []
    for seed, fields in enumerate(ranks):
        path = saved(tmp_path / f"{seed}.pth", tiny_model, method, seed=seed, **fields)
        contents.append(load_weights(path))
        merge(MergeSettings(lora_weights=path, model_path=tiny_model, output=tmp_path / f"m{seed}", device="cpu"))
        merged.append(AutoModel.from_pretrained(tmp_path / f"m{seed}").state_dict())
    result = average(contents, [0.6, 0.2], [tmp_path / "0.pth", tmp_path / "1.pth"])  # 0.75 and 0.25
    save_weights(tmp_path / "average.pth", result)
    merge(MergeSettings(
        lora_weights=tmp_path / "average.pth", model_path=tiny_model, output=tmp_path / "average", device="cpu"
    ))  # fmt: skip
    ours = AutoModel.from_pretrained(tmp_path / "average").state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, 0.75 * merged[0][name] + 0.25 * merged[1][name], rtol=1e-4, atol=1e-6)


def test_an_average_of_one_model_with_itself_is_that_model(tiny_model, prices, tmp_path) -> None:
    weights = saved(tmp_path / "w.pth", tiny_model, "lora")
    ensemble = Ensemble([(weights, tiny_model)] * 2, "mean", CPU, torch.float32, shares=[0.7, 0.3])
    alone = Ensemble([(weights, tiny_model)], "mean", CPU, torch.float32)
    closes = [[row["Predicted_Close"] for row in each.forecast(prices)] for each in (ensemble, alone)]
    np.testing.assert_allclose(closes[0], closes[1], rtol=1e-6)


def differing(content: WeightsFile, **changes: Any) -> WeightsFile:
    return dataclasses.replace(content, spec=dataclasses.replace(content.spec, **changes))


def test_models_without_an_average_are_named(tiny_models, tmp_path) -> None:
    model = tiny_models["qwen3"]
    plain = load_weights(saved(tmp_path / "a.pth", model, "lora"))
    dora = load_weights(saved(tmp_path / "d.pth", model, "lora", dora=True))
    untouched = dataclasses.replace(load_weights(saved(tmp_path / "f.pth", model, "full")), adapters={})
    other = load_weights(saved(tmp_path / "g.pth", tiny_models["gpt2"], "lora"))
    paths = [Path("a.pth"), Path("b.pth")]

    def error(*contents: WeightsFile, shares: tuple[float, ...] = (0.5, 0.5)) -> str:
        return error_of(average, contents, shares, paths)

    assert "a.pth was trained on qwen3 and b.pth on gpt2, which have no average" in error(plain, other)
    assert "--prompt returns and b.pth with ohlcv" in error(plain, differing(plain, prompt="ohlcv"))
    assert "--method lora and b.pth with peft" in error(plain, differing(plain, method="peft"))
    assert "--quantization none and b.pth with 4bit" in error(plain, differing(plain, quantization="4bit"))
    table = (np.array(plain.spec.table) * 1.01).tolist()
    assert "began at different quantiles or volatility scales" in error(plain, differing(plain, table=table))
    assert "combine their forecasts instead" in error(plain, differing(plain, table=table))
    assert "DoRA" in error(dora, dora)
    assert "its training kept nothing" in error(untouched, untouched)
    assert "not all 0" in error(plain, plain, shares=(0.0, 0.0))


def test_weights_after_file_names_average_and_none_combine(tiny_model, table, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.pth", "b.pth")):
        saved(tmp_path / name, tiny_model, "lora", seed=seed)
    options = ["--test_csv", str(table), "--model_path", str(tiny_model), "--dtype", "float32", "--lora_weights"]
    tables = {}
    for arguments in (["a.pth"], ["b.pth"], ["a.pth", "b.pth"], ["a.pth:0.7", "b.pth:0.3"], ["a.pth:7", "b.pth:3"]):
        assert framework_llm.main([*options, *arguments]) == 0, capsys.readouterr().err
        tables[" ".join(arguments)] = pd.read_csv("predictions.csv")["P05"].to_numpy()
    text = capsys.readouterr().out
    assert "average of the weights of 2 models" in text
    assert "0.7 of a.pth: 60.00 bp" in text
    np.testing.assert_array_equal(tables["a.pth:0.7 b.pth:0.3"], tables["a.pth:7 b.pth:3"])
    for first, second in itertools.combinations(list(tables)[:4], 2):
        assert np.abs(tables[first] / tables[second] - 1).max() > 1e-6
    assert framework_llm.main([*options, "a.pth:0.7", "b.pth"]) == 2
    assert "give all of them a weight, such as a.pth:0.7 b.pth:0.3" in capsys.readouterr().err
    assert framework_llm.main([*options, "a.pth:0.7", "c.pth:0.3"]) == 2
    assert "no weights file c.pth" in capsys.readouterr().err


def test_a_weight_is_a_number_after_the_last_colon() -> None:
    def shares(*names: str) -> list[float] | None:
        return ForecastSettings(lora_weights=[Path(name) for name in names]).shares

    assert shares("a.pth", "b.pth") is None
    assert shares("a.pth:1", "b.pth:.5") == [1.0, 0.5]
    assert shares("C:\\x\\a.pth") is None
    assert [path.name for path, _ in ForecastSettings(lora_weights=[Path("d/a.pth:0.7")]).members] == ["a.pth"]
    assert AdapterConfig.from_dict(LORA).rank == 2


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "logging", "Trainer"])
def test_a_configuration_names_no_code_that_is_no_model(name: str) -> None:
    assert saved_class(SimpleNamespace(architectures=[name])) is None
