"""Every way to tune: the same numbers in a new process, PEFT as a reference, and traps that quantization sets."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from price_tables import random_prices
from torch import nn
from transformers import PretrainedConfig
from tuned_models import CPU, VARIANTS, built, content_of, exact, spec_of, unsettled

from llm_model import padded_tokens
from stocklora.base_models.loading import BaseModel, load_backbone
from stocklora.base_models.quantized import check_quantization
from stocklora.cli.console import UserError
from stocklora.dataset.prepare import prepare
from stocklora.finetune.fit import finetune
from stocklora.finetune.optimization import Optimization, compiled, standardize_head
from stocklora.finetune.report import save_run
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.batches import CPU_TOKENS, KeptStates, collate, predict
from stocklora.forecaster.forecaster import build_forecaster, load_forecaster
from stocklora.forecaster.methods import load_trained_state, parameter_groups, trained_state
from stocklora.forecaster.weights import load_weights, save_weights
from stocklora.runtime.distributed import Alone

pytestmark = pytest.mark.usefixtures("undrawn")

ARTEFACTS = [
    *[(method, stored, "plain") for method in ("lora", "peft", "head") for stored in ("none", "8bit", "4bit")],
    ("full", "none", "plain"),
    ("lora", "none", "pissa"),
    ("peft", "none", "pissa"),
    ("peft", "none", "bias"),
    ("lora", "4bit", "pissa dora"),
    ("peft", "8bit", "dora"),
]


@pytest.fixture(scope="module")
def prices() -> dict[str, Any]:
    return {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}


# --------------------------------------------------------------------------------------- files in a new process

Cases = list[tuple[str, str, str, str]]


def forecast_each(cases: Cases, result: Path) -> None:
    """In a process of its own: write the forecasts of weights files to the last bit."""
    prices, found = {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}, {}
    for name, weights, model, dtype in cases:
        forecaster, _ = load_forecaster(Path(weights), Path(model), CPU, getattr(torch, dtype))
        found[name] = exact(forecaster.forecast(prices))
    result.write_text(json.dumps(found))


def reloaded(nursery: Any, cases: Cases, folder: Path) -> dict[str, Any]:
    """By case the forecasts of its file in a new process."""
    process = nursery.Process(target=forecast_each, args=(cases, folder / "result.json"))
    process.start()
    process.join(300)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


FITS: list[dict[str, Any]] = [
    {}, {"method": "peft", "quantization": "4bit", "use_dora": True}, {"method": "full"}, {"method": "head"},
    {"method": "peft", "adapt_layers": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory, tiny_models, prices, nursery) -> dict[str, tuple[Any, Any, Path]]:
    """By case the forecasts of the model that was saved, those of its file in a new process, and the file."""
    folder = tmp_path_factory.mktemp("artefacts")
    here: dict[str, Any] = {}
    cases: Cases = []
    for index, (method, quantization, variant) in enumerate(ARTEFACTS):
        model = tiny_models["gpt2" if "bias" in variant or index % 3 == 0 else "qwen3"]
        # Odd ones in bfloat16, in which most things go wrong.
        dtype = torch.bfloat16 if index % 2 else torch.float32
        forecaster = unsettled(built(spec_of(model, method, quantization, **VARIANTS[variant]), model, dtype), index)
        name = f"{method} {quantization} {variant}"
        path = folder / f"{index}.pth"
        save_weights(path, content_of(forecaster))
        here[name] = exact(forecaster.forecast(prices))
        cases.append((name, str(path), str(model), str(dtype).removeprefix("torch.")))
    for index, flags in enumerate(FITS):
        settings = TrainLoraSettings(
            model_path=tiny_models["qwen3"], window_size=20, epochs=1, batch_size=4, required_gain=0.0, device="cpu",
            scale="ewma", dtype="float32", head_learning_rate=1e-2, save_dir=folder / f"fit{index}", **flags,
        )  # fmt: skip
        run = finetune(prices, settings)
        run.outcome.best_epoch = 1
        unsettled(run.forecaster, 100 + index)
        save_run(run, settings)
        here[str(flags)] = exact(run.forecaster.forecast(prices))
        cases.append((str(flags), str(run.weights_path), str(settings.model_path), "float32"))
    there = reloaded(nursery, cases, folder)
    assert len({json.dumps(rows) for rows in here.values()}) == len(cases)  # no two alike, or little is shown
    return {name: (here[name], there[name], Path(path)) for name, path, *_ in cases}


@pytest.mark.parametrize("case", [*(" ".join(case) for case in ARTEFACTS), *map(str, FITS)])
def test_a_file_gives_the_same_forecasts_in_a_new_process_to_the_last_bit(artefacts, case) -> None:
    here, there, _ = artefacts[case]
    assert here == there


@pytest.mark.parametrize("flags", FITS, ids=str)
def test_training_saves_its_method_and_all_that_belongs_to_it(artefacts, flags) -> None:
    content = load_weights(artefacts[str(flags)][2])
    assert content.spec.method == flags.get("method", "lora")
    assert content.spec.quantization == flags.get("quantization", "none")
    assert bool(content.adapters) == (content.spec.method != "head")
    assert content.spec.calibration.keys() == {"shrinkage", "interval_scale"}
    assert any(name.endswith("lora_magnitude") for name in content.adapters) == flags.get("use_dora", False)


def test_many_tickers_get_the_forecasts_that_each_gets_alone(tiny_model, monkeypatch) -> None:
    """Whatever their lines' lengths and however many passes; the scale does not read the other tickers here."""
    monkeypatch.setattr("stocklora.forecaster.forecaster.predict", functools.partial(predict, tokens_per_batch=1500))
    table = {f"T{rows}": random_prices(rows, rows) for rows in (40, 160, 25, 90, 31, 140)}
    forecaster = unsettled(built(spec_of(tiny_model, "lora"), tiny_model))
    together = forecaster.forecast(table)
    assert [row["Ticker"] for row in together[::3]] == list(table)
    alone = [row for name, frame in table.items() for row in forecaster.forecast({name: frame})]
    closes = [[row["Predicted_Close"] for row in rows] for rows in (together, alone)]
    np.testing.assert_allclose(*closes, rtol=1e-6)


def test_a_full_run_that_kept_nothing_writes_a_small_file(tiny_model, tmp_path, prices) -> None:
    run = finetune(prices, TrainLoraSettings(
        model_path=tiny_model, window_size=20, epochs=0, device="cpu", scale="ewma", save_dir=tmp_path, method="full",
    ))  # fmt: skip
    assert load_weights(run.weights_path).adapters == {}
    forecaster, _ = load_forecaster(run.weights_path, tiny_model, CPU, torch.float32)
    whole = forecaster.model.backbone.state_dict()
    base = load_backbone(tiny_model, torch.float32).state_dict()
    assert all(torch.equal(whole[name], base[name]) for name in base)


def test_a_file_of_the_first_version_loads(tiny_model, tmp_path, prices) -> None:
    forecaster = unsettled(built(spec_of(tiny_model, "lora"), tiny_model))
    save_weights(tmp_path / "new.pth", content_of(forecaster))
    content = torch.load(tmp_path / "new.pth", weights_only=True)
    del content["spec"]["method"], content["spec"]["quantization"]
    torch.save({**content, "format_version": 1}, tmp_path / "old.pth")
    old, _ = load_forecaster(tmp_path / "old.pth", tiny_model, CPU, torch.float32)
    assert (old.spec.method, old.spec.quantization) == ("lora", "none")
    assert exact(old.forecast(prices)) == exact(forecaster.forecast(prices))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content["head"].pop("linear.bias"), "the forecast head has no linear.bias"),
        (lambda content: content["head"]["spread"].fill_(torch.nan), "head's spread holds numbers that are not"),
        (lambda content: content["spec"]["calibration"].pop("shrinkage"), "shrinkage"),
        (
            lambda content: content["spec"]["calibration"].update(interval_scale=np.nan),
            "calibration is not finite",
        ),
        (lambda content: content["spec"].update(method="magic"), "no method 'magic'"),
        (lambda content: content["spec"]["lora"].update(magic=1), "unknown LoRA setting magic"),
        (lambda content: content["adapters"].popitem(), "does not fit"),
        (lambda content: content["adapters"].update(extra=torch.zeros(1)), "does not fit"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "peft"])
def test_a_file_without_all_of_its_parts_is_refused(tiny_model, tmp_path, damage, words, method) -> None:
    save_weights(tmp_path / "w.pth", content_of(built(spec_of(tiny_model, method), tiny_model)))
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        load_forecaster(tmp_path / "w.pth", tiny_model, CPU, torch.float32)


# ------------------------------------------------------------------------------------------ PEFT as a reference


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_peft_computes_what_we_do_from_the_same_state(tiny_models, prices, variant, quantization) -> None:
    if "pissa" in variant and quantization != "none":
        pytest.skip("PEFT has no PiSSA over quantized weights")
    model = tiny_models["gpt2" if "bias" in variant else "llama"]
    ours, theirs = (
        built(spec_of(model, method, quantization, **VARIANTS[variant]), model) for method in ("lora", "peft")
    )
    state = trained_state(unsettled(ours).model)
    load_trained_state((theirs if "pissa" not in variant else built(theirs.spec, model, fresh=False)).model, state)
    if "pissa" in variant:
        theirs = built(theirs.spec, model, fresh=False)
        load_trained_state(theirs.model, state)
    theirs.model.eval()
    again = trained_state(theirs.model)
    assert again["adapters"].keys() == state["adapters"].keys()
    assert all(torch.equal(again["adapters"][name], tensor) for name, tensor in state["adapters"].items())
    ids, at, scale = torch.randint(3, 200, (2, 40)), torch.tensor([[10, 39], [20, 30]]), torch.rand(2, 2, 3)
    torch.testing.assert_close(theirs.model(ids, at, scale), ours.model(ids, at, scale), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("variant", ["plain", "dora", "pissa", "bias"])
def test_training_by_peft_takes_the_same_steps(tiny_models, variant) -> None:
    """The same start, data and optimizer: the same weights after some steps, up to rounding."""
    model = tiny_models["gpt2" if variant == "bias" else "llama"]
    settings = TrainLoraSettings(
        model_path=model, epochs=2, batch_size=2, learning_rate=1e-2, head_learning_rate=1e-2, weight_decay=0.0,
        lora_plus_ratio=4.0,
    )  # fmt: skip
    data = prepare({"X": random_prices(150, 3)}, 20, 3)
    states: list[Mapping[str, torch.Tensor]] = []
    start: Any = None
    for method in ("lora", "peft"):
        forecaster = built(spec_of(model, method, **VARIANTS[variant]), model)
        nn.init.normal_(forecaster.model.head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        if start is None:
            start = trained_state(forecaster.model)
        elif variant != "pissa":  # whose start is the same in both
            load_trained_state(forecaster.model, start)
        examples = forecaster.packed_examples(data.prices, {"X": data.origins["X"]["train"]})
        optimization = Optimization(forecaster.model, examples, data.levels, settings, Alone(CPU))
        assert len(list(optimization.epoch(1))) > 3
        states.append(trained_state(forecaster.model)["adapters"])
    moved = 0
    for name, tensor in states[0].items():
        difference = (states[1][name] - tensor).abs().mean()
        moved += bool((tensor - start["adapters"][name]).abs().mean() > 100 * difference)
        torch.testing.assert_close(states[1][name], tensor, rtol=2e-2, atol=2e-3)
    assert moved > 0.7 * len([name for name in states[0] if ".pissa_" not in name])


@pytest.mark.parametrize("method", ["lora", "peft"])
@pytest.mark.parametrize("variant", ["plain", "dora", "bias"])
def test_lora_plus_has_the_rates_of_pefts(tiny_models, method, variant) -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = tiny_models["gpt2"]
    forecaster = built(spec_of(model, method, **VARIANTS[variant]), model)
    settings = TrainLoraSettings(learning_rate=1e-3, head_learning_rate=5e-4, lora_plus_ratio=16.0)
    groups = parameter_groups(
        forecaster.model, settings.learning_rate, settings.head_learning_rate, settings.lora_plus_ratio
    )
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    trained = [parameter for parameter in forecaster.model.parameters() if parameter.requires_grad]
    assert rates.keys() == {id(parameter) for parameter in trained}
    assert sum(len(group["params"]) for group in groups) == len(trained)  # each once
    reference = built(spec_of(model, "peft", **VARIANTS[variant]), model).model.backbone
    optimizer = create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    expected = sorted(group["lr"] for group in optimizer.param_groups for _ in group["params"])
    assert sorted(rates[id(p)] for p in trained if id(p) not in map(id, forecaster.model.head.parameters())) == expected
    assert groups[0]["lr"] == 1e-3  # what the history shows
    assert rates[id(forecaster.model.head.linear.weight)] == 5e-4


# --------------------------------------------------------------------------------------------- what trains


def test_each_method_trains_what_it_says(tiny_model) -> None:
    counts = {}
    for method in ("lora", "peft", "full", "head"):
        model = built(spec_of(tiny_model, method), tiny_model).model
        assert all(parameter.requires_grad for parameter in model.head.parameters())
        counts[method] = sum(parameter.numel() for parameter in model.backbone.parameters() if parameter.requires_grad)
        assert len({id(p) for group in parameter_groups(model, 1e-4, 1e-4) for p in group["params"]}) == sum(
            parameter.requires_grad for parameter in model.parameters()
        )
    base = load_backbone(tiny_model, torch.float32)
    expected = sum(2 * (layer.in_features + layer.out_features) for layer in base.modules() if type(layer) is nn.Linear)
    everything = sum(parameter.numel() for parameter in base.parameters())
    assert counts == {"lora": expected, "peft": expected, "full": everything, "head": 0}


def test_full_tuning_keeps_its_small_steps_in_float32(tiny_model) -> None:
    forecaster = built(spec_of(tiny_model, "full"), tiny_model, torch.bfloat16)
    model = forecaster.model
    nn.init.normal_(model.head.linear.weight, std=0.1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    seen: list[torch.dtype] = []
    layer = model.backbone.get_submodule("layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    model.train()
    model(torch.randint(3, 200, (2, 30)), torch.tensor([[29], [20]]), torch.ones(2, 1, 3)).square().mean().backward()
    optimizer.step()
    assert seen == [torch.bfloat16]  # what it computes in
    change = (layer.weight.detach() - before).abs()
    assert 0 < float(change.max()) < 2**-9 * float(before.abs().max())  # bfloat16 would have lost it
    assert torch.equal(layer.weight.detach().bfloat16(), before.bfloat16()) or float(change.max()) > 0


def test_head_training_reads_each_sequence_once_and_ends_where_reading_always_ends(tiny_model, prices) -> None:
    settings = TrainLoraSettings(model_path=tiny_model, method="head", epochs=4, batch_size=2, head_learning_rate=1e-2)
    data = prepare(prices, 20, 3)
    origins = {name: parts["train"] for name, parts in data.origins.items()}
    results = []
    for once in (True, False):
        forecaster = built(spec_of(tiny_model, "head"), tiny_model)
        examples = forecaster.packed_examples(prices, origins)
        passes = []
        forecaster.model.backbone.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        frozen = KeptStates(forecaster.model) if once else None
        standardize_head(forecaster.model, examples, CPU, frozen)
        optimization = Optimization(forecaster.model, examples, data.levels, settings, Alone(CPU), frozen)
        for epoch in range(1, 5):
            list(optimization.epoch(epoch))
            predict(forecaster.model, examples, CPU, states=frozen)
        assert (len(passes) == len(examples)) == once
        results.append(trained_state(forecaster.model)["head"])
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)


def test_training_a_head_alone_leaves_the_base_at_rest(tiny_model, prices, tmp_path, monkeypatch) -> None:
    from transformers import Qwen3Model

    passes, forward = [], Qwen3Model.forward
    monkeypatch.setattr(Qwen3Model, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    settings = TrainLoraSettings(
        model_path=tiny_model, window_size=20, epochs=6, patience=6, batch_size=1, device="cpu", scale="ewma",
        method="head", targets_per_sequence=10, save_dir=tmp_path,
    )  # fmt: skip
    run = finetune(prices, settings)
    sequences = sum(len(run.data.sequences(split, 10)) for split in ("train", "validation"))
    assert run.outcome.steps > 60
    # Each once; then the checks of a causal model, and validation and test by the plain model.
    assert sequences <= len(passes) <= sequences + 6


def test_kept_states_are_those_of_the_example_alone_and_can_be_trained_on(tiny_model, prices) -> None:
    forecaster = built(spec_of(tiny_model, "head"), tiny_model)
    model = forecaster.model.eval()
    longer, shorter = forecaster.packed_examples(prices, {"AAA": range(40, 47)})
    assert len(longer.scale) > len(shorter.scale)
    alone = []
    for example in (longer, shorter):
        batch = collate([example])
        alone.append(model.hidden_at(batch.input_ids, batch.origin_tokens)[0])
    kept = KeptStates(model)
    with torch.inference_mode():
        collate([longer, shorter], kept)
    batch = collate([shorter, longer], kept)
    assert kept.passes == 2
    assert torch.equal(batch.states[0, : len(shorter.scale)], alone[1])
    assert torch.equal(batch.states[1], alone[0])
    model(batch.input_ids, batch.origin_tokens, batch.scale, batch.states).sum().backward()  # no inference tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["memory", "file", "full disk"])
def test_states_are_the_same_bits_wherever_they_lie(
    tiny_model, prices, tmp_path, monkeypatch, capsys, dtype, place
) -> None:
    spec = replace(spec_of(tiny_model, "lora"), adapt_layers=1)
    forecaster = built(spec, tiny_model, dtype, probe=True)
    examples = forecaster.packed_examples(prices, {"AAA": range(40, 60)})
    expected = [KeptStates(forecaster.model).of(example) for example in examples]
    assert {states.dtype for states in expected} == {dtype}
    assert [len(states) for states in expected] == [len(example.encoded.input_ids) for example in examples]
    # Room in memory for the first, and none beside it but in a file.
    kept = KeptStates(forecaster.model, tmp_path, 10**9 if place == "memory" else expected[0].nbytes)
    if place == "full disk":
        monkeypatch.setattr("tempfile.TemporaryFile", full_disk)
    for _ in range(3):
        for example, states in zip(examples, expected, strict=True):
            assert torch.equal(kept.of(example), states)
    once = len(examples)
    assert kept.passes == (1 + 3 * (once - 1) if place == "full disk" else once)
    assert capsys.readouterr().err.count("computed anew") == (place == "full disk")
    assert not list(tmp_path.iterdir())  # no name, so nothing that a killed run leaves


def full_disk(**_: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


# ----------------------------------------------------------------------------------------------- quantization


def test_int8_layers_are_their_dequantized_weights_in_training_and_in_use(tiny_model) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    backbone = load_backbone(tiny_model, torch.float32, quantization="8bit")
    layers = [module for module in backbone.modules() if type(module).__name__ == "Linear8bitLt"]
    assert len(layers) == 14
    full = load_backbone(tiny_model, torch.float32)
    for name, module in backbone.named_modules():
        if module not in layers:
            continue
        weight = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        assert weight.shape == full.get_submodule(name).weight.shape
        step = full.get_submodule(name).weight.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((weight - full.get_submodule(name).weight).abs() <= 0.6 * step).all())  # it reads them as float16
        x = torch.randn(3, 5, weight.shape[1], requires_grad=True)
        module.train()
        trained = module(x)
        module.eval()
        assert torch.equal(trained, module(x))
        torch.testing.assert_close(trained, x @ weight.t(), rtol=1e-5, atol=1e-6)
        y = torch.randn_like(trained)
        (gradient,) = torch.autograd.grad(trained, x, y)
        torch.testing.assert_close(gradient, y @ weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_sees_no_later_token_and_is_one_function(tiny_model, quantization, method, dtype) -> None:
    """bitsandbytes' own int8 layers would let a large later activation change how earlier ones are rounded."""
    model = unsettled(built(spec_of(tiny_model, method, quantization), tiny_model, dtype)).model
    with torch.no_grad():  # activations of all sizes, so that some are outliers in one column or another
        model.backbone.get_input_embeddings().weight.mul_(torch.logspace(-1, 2, 284)[:, None])
    ids, at, scale = torch.randint(0, 280, (1, 60)), torch.tensor([[10, 29]]), torch.ones(1, 2, 3)
    before = model(ids, at, scale)
    changed = ids.clone()
    changed[0, 30:] = torch.randint(0, 280, (30,))
    assert torch.equal(before, model(changed, at, scale))
    model.train()
    assert torch.equal(before, model(ids, at, scale))


@pytest.mark.parametrize("method", ["lora", "peft"])
def test_a_forecast_before_training_does_not_end_4_bit_gradients(tiny_model, method) -> None:
    """On processors with AVX512-BF16 bitsandbytes repacks the weights at the first use in eval mode."""
    gradients = []
    for forecast_first in (False, True):
        model = built(spec_of(tiny_model, method, "4bit"), tiny_model).model
        nn.init.normal_(model.head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        ids = torch.arange(40)[None] + 3
        if forecast_first:
            model.eval()
            with torch.inference_mode():
                model(ids, torch.tensor([[39]]), torch.ones(1, 1, 3))
        model.train()
        model(ids, torch.tensor([[39]]), torch.ones(1, 1, 3)).square().sum().backward()
        parts = [p.grad for p in model.backbone.parameters() if p.requires_grad]
        assert all(part is not None for part in parts)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_4_bit_is_nf4_with_quantized_scales(tiny_model) -> None:
    backbone = load_backbone(tiny_model, torch.bfloat16, quantization="4bit")
    layers = [module for module in backbone.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.absmax.dtype) == ("nf4", True, torch.uint8)
        assert layer.compute_dtype is torch.bfloat16


def test_quantization_says_what_it_lacks(tiny_model, monkeypatch) -> None:
    spec = spec_of(tiny_model, "lora", "4bit")
    with pytest.raises(UserError, match="--quantization 4bit works on cpu and cuda, not on mps"):
        check_quantization("4bit", torch.device("mps"), "--quantization 4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes; install it: pip install bitsandbytes"):
        build_forecaster(spec, BaseModel(tiny_model), CPU, torch.float32)


# --------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"method": "full", "quantization": "4bit"}, "quantized weights cannot train: leave out --quantization 4bit"),
        ({"method": "head", "use_dora": True}, "--use_dora is for adapters, and --method head has none"),
        ({"method": "full", "lora_plus_ratio": 16.0}, "--lora_plus_ratio is for adapters"),
        ({"method": "full", "expand_rank_from": Path("x")}, "--expand_rank_from is for adapters"),
        ({"method": "peft", "quantization": "8bit", "init_lora": "pissa"}, "PEFT's PiSSA"),
        ({"expand_rank_from": Path("x"), "init_lora": "pissa"}, "brings its own start"),
        ({"teacher_model_path": Path("x")}, "--teacher_model_path is the base model of a --teacher"),
        ({"method": "head", "gradient_checkpointing": True}, "--method head keeps no activations"),
        ({"lora_plus_ratio": 0.0}, "--lora_plus_ratio must be above 0"),
        ({"max_tokens_per_batch": 0}, "--max_tokens_per_batch must be above 0"),
        ({"method": "head", "adapt_layers": 1}, "--adapt_layers is for adapters, and --method head has none"),
        ({"adapt_layers": 0}, "--adapt_layers must be above 0"),
        ({"adapt_layers": 1, "train_bias": "all"}, "--train_bias all trains biases of all layers, and --adapt_layers"),
        ({"distill_weight": -1.0}, "--distill_weight must be above 0"),
    ],
)
def test_settings_that_exclude_each_other_are_named(flags, words) -> None:
    with pytest.raises(UserError, match=words):
        TrainLoraSettings(**flags)


@pytest.mark.parametrize("method", ["lora", "peft"])
def test_biases_that_are_not_there_and_too_high_a_rank_are_one_line(tiny_model, method) -> None:
    with pytest.raises(UserError, match="finds no bias"):
        built(spec_of(tiny_model, method, train_bias="lora_only"), tiny_model)
    with pytest.raises(UserError, match="PiSSA at rank 33 is too much"):
        built(spec_of(tiny_model, method, init="pissa", rank=33), tiny_model)
    with pytest.raises(UserError, match="nonsense"):
        built(spec_of(tiny_model, method, target_modules=["nonsense"]), tiny_model)


def test_a_compiler_that_fails_is_one_line(tiny_model, monkeypatch) -> None:
    model = built(spec_of(tiny_model, "lora"), tiny_model).model

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch._dynamo, "optimize", fails, raising=False)
    monkeypatch.setattr(torch, "compile", lambda call, **_: fails)
    with (
        pytest.raises(UserError, match=r"--compile does not work here \(InvalidCxx.*found\); leave the flag out"),
        compiled(model),
    ):
        pass
    model(torch.ones(1, 8, dtype=torch.long), torch.tensor([[7]]), torch.ones(1, 1, 3))  # plain again


def test_compiling_is_for_training_alone(tiny_model, monkeypatch) -> None:
    model, calls = built(spec_of(tiny_model, "lora", dropout=0.5), tiny_model).model, []

    def counted(call: Any, **options: object) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(options)
            return call(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", counted)
    ids, at, scale = torch.ones(1, 8, dtype=torch.long), torch.tensor([[7]]), torch.ones(1, 1, 3)
    names = list(model.state_dict())
    plain = model.eval()(ids, at, scale)
    drawn = torch.random.get_rng_state()
    with compiled(model.train()):
        assert torch.equal(torch.random.get_rng_state(), drawn)  # or dropout would not be that of a plain run
        assert model.backbone.training
        model.eval()
        assert len(calls) == 2  # the trial: both blocks
        with torch.no_grad():
            model(ids, at, scale)
        assert len(calls) == 2  # not where nothing is learned
        torch.testing.assert_close(model(ids, at, scale), plain)
        assert len(calls) == 4
        assert list(model.state_dict()) == names
    assert not model.backbone.training  # as the run left it
    assert not any("forward" in vars(module) for module in model.modules())
    model(ids, at, scale)
    assert len(calls) == 4


def test_a_compiled_run_is_the_plain_one_compiled_once(tiny_model, prices, tmp_path, monkeypatch) -> None:
    """A stack of blocks shares its code: compiled for all of them together, and not again for validation.

    Captured and differentiated as always, then run as captured: writing and building C++ would take half a minute.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    histories = []
    for compile in (False, True):
        torch._dynamo.reset()
        counters.clear()
        settings = TrainLoraSettings(
            model_path=tiny_model, window_size=20, epochs=2, batch_size=2, targets_per_sequence=20, required_gain=0.0,
            device="cpu", scale="ewma", dtype="float32", learning_rate=1e-2, head_learning_rate=1e-2,
            save_dir=tmp_path / str(compile), compile=compile,
        )  # fmt: skip
        histories.append([row["validation_ratio"] for row in finetune(prices, settings).outcome.history])
    assert counters["stats"]["unique_graphs"] == 1
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    assert histories[0][0] != histories[0][-1]


class Stack(nn.Module):
    """A forecaster's backbone of two blocks of one product each: little to compile."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.linspace(-1, 1, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=2, hidden_size=8)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    backbone = property(lambda self: self)

    def autocast(self, device_type: str) -> Any:
        return contextlib.nullcontext()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = torch.cos(input_ids[..., None] * torch.ones(8))
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.slow
def test_what_the_machines_compiler_builds_gives_the_same_gradients(tmp_path, monkeypatch) -> None:
    """The whole way to C++ and back, on blocks of a single kernel."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # built here, not found
    model: Any = Stack()
    ids = torch.arange(60).reshape(2, 30)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(ids).last_hidden_state.square().sum(), list(model.parameters()))

    plain = gradients()
    # What the processor says it can do is believed, and headers are not compiled ahead: both take longer than the rest.
    with inductor.patch({"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}), compiled(model):
        torch.testing.assert_close(gradients(), plain)
    assert list(tmp_path.rglob("*.main.cpp"))


@pytest.mark.parametrize("limit", [400, 700, 1, None])
def test_batches_are_cut_to_their_tokens_with_the_same_gradients(tiny_model, prices, limit) -> None:
    data = prepare(prices, 20, 3)
    results = []
    for given in (10**6, limit):
        most = CPU_TOKENS if given is None else given
        forecaster = built(spec_of(tiny_model, "lora"), tiny_model)
        nn.init.normal_(forecaster.model.head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        examples = forecaster.packed_examples(prices, {name: parts["train"] for name, parts in data.origins.items()})
        settings = TrainLoraSettings(model_path=tiny_model, batch_size=9, epochs=1, max_tokens_per_batch=given)
        shapes: list[torch.Size] = []
        forecaster.model.backbone.register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        optimization = Optimization(forecaster.model, examples, data.levels, settings, Alone(CPU))
        optimization.step(np.arange(9), sum(len(example.scale) for example in examples[:9]))
        results.append(trained_state(forecaster.model))
        longest = padded_tokens(max(len(example.encoded.input_ids) for example in examples[:9]))
        if given == 10**6:
            assert len(shapes) == 1
        else:
            assert len(shapes) > 1
            assert all(shape.numel() <= max(most, longest) for shape in shapes)
            assert all(shape.numel() <= most or shape[0] == 1 for shape in shapes)
    for part in ("adapters", "head"):
        for name, tensor in results[0][part].items():
            torch.testing.assert_close(tensor, results[1][part][name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the real one


@pytest.mark.slow
def test_smollm2_trains_quantized_and_reloads_in_a_new_process(smollm2, tmp_path, nursery) -> None:
    table = {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}
    cases: Cases = []
    expected = {}
    for method, quantization, kind in (("lora", "4bit", "Linear4bit"), ("peft", "8bit", "Linear8bitLt")):
        settings = TrainLoraSettings(
            model_path=smollm2, backbone_layers=1, window_size=20, epochs=1, batch_size=1, method=method,
            quantization=quantization, required_gain=0.0, device="cpu", scale="ewma", targets_per_sequence=20,
            dtype="float32", save_dir=tmp_path / quantization,
        )  # fmt: skip
        run = finetune(table, settings)
        assert run.outcome.steps > 2
        assert run.outcome.stopped is None
        assert 0.9 < run.outcome.history[1]["validation_ratio"] < 1.1
        run.outcome.best_epoch = 1
        unsettled(run.forecaster)
        save_run(run, settings)
        expected[quantization] = exact(run.forecaster.forecast(table))
        cases.append((quantization, str(run.weights_path), str(smollm2), "float32"))
        modules = [type(module) for module in run.forecaster.model.modules()]
        assert [found.__name__ for found in modules if "bitsandbytes" in found.__module__] == [kind] * 7
    assert reloaded(nursery, cases, tmp_path) == expected
