"""Instruction tuning: what is learned, kept, stopped, resumed and written, on tiny models."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import make_family
from script_calls import ForkedScript
from source_tree import REPO_ROOT

from stocklora.cli.console import UserError
from stocklora.instruct.rows.chat_template import (
    IGNORED,
    Encoded,
    encode,
    end_token_ids,
    fit_embeddings,
    prepare_tokenizer,
    prompt_ids,
)
from stocklora.instruct.rows.formats import Message
from stocklora.instruct.rows.records import read_records
from stocklora.instruct.sft.run import run_training
from stocklora.instruct.sft.settings import Resolved, SftSettings

pytestmark = pytest.mark.usefixtures("undrawn")
Tune = Callable[..., int]
UP, DOWN = "情绪：利好", "情绪：利空"
QUICK: dict[str, Any] = {
    "use_lora": True, "lora_r": 8, "lora_dropout": 0.0, "learning_rate": 1e-2, "batch_size": 8,
    "gradient_accumulation_steps": 1, "num_epochs": 2, "dtype": "float32", "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short rows of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"instruction": "判断情绪", "input": f"公司{n}{'增长' if n % 2 else '下降' * (n % 5)}",
         "output": (UP if n % 2 else DOWN) + "。" * (n % 4)}
        for n in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def tune(tiny_model: Path, rows: Path, tmp_path: Path) -> Tune:
    """``tune(num_epochs=1)``: a run in this process; its exit code. Writes into ``tmp_path/out``."""

    def run(**changes: Any) -> int:
        values = {"model_path": tiny_model, "data_path": [rows], "output_dir": tmp_path / "out", **QUICK, **changes}
        settings = SftSettings(**values)
        names = [field.name for field in dataclasses.fields(SftSettings)]
        return run_training(Resolved(settings, dict.fromkeys(names, "default")), "fine_tune_qwen.py")

    return run


def info_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "training_info.json").read_text(encoding="utf-8")))


def log_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tuned(folder: Path, base: Path) -> Any:
    """Adapter or model in ``folder``, loaded as anyone loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fit_embeddings(model, prepare_tokenizer(folder))
    return PeftModel.from_pretrained(model, str(folder)).eval()


def test_the_reported_loss_is_that_of_the_saved_adapter_per_supervised_token(
    tune: Tune, rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    validation.write_text("".join(lines[:7]), encoding="utf-8")
    assert tune(validation_path=[validation], batch_size=4) == 0
    folder = tmp_path / "out"
    tokenizer, model = prepare_tokenizer(folder), tuned(folder, tiny_model)
    total = tokens = 0.0
    for record in read_records(validation):
        encoded = encode(tokenizer, record, None)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1]
        labels = torch.tensor(encoded.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED))
        tokens += int((labels != IGNORED).sum())
    losses = info_of(folder)["losses"]
    assert losses["validation_best"] == pytest.approx(total / tokens, rel=1e-4)
    assert losses["validation_best"] < losses["validation_start"]
    assert losses["validation_best"] == pytest.approx(min(e["eval_loss"] for e in log_of(folder) if "eval_loss" in e))


@pytest.mark.parametrize(
    "method",
    [{}, {"use_qlora": True}, {"use_qlora": True, "quantization_bit": 8}, {"use_lora": False, "learning_rate": 5e-3}],
    ids=["lora", "4bit", "8bit", "full"],
)
def test_every_method_lowers_the_held_out_loss_and_leaves_a_folder_that_loads(
    tune: Tune, tiny_model: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    assert tune(**method) == 0
    folder = tmp_path / "out"
    info = info_of(folder)
    assert info["losses"]["validation_best"] < info["losses"]["validation_start"] - 0.1
    full = method.get("use_lora") is False
    expected = {"config.json", "model.safetensors"} if full else {"adapter_config.json", "adapter_model.safetensors"}
    others = {"tokenizer.json", "chat_template.jinja", "training_info.json", "training_log.jsonl", "loss_curve.png"}
    assert expected | others <= {path.name for path in folder.iterdir()}
    assert info["base_model"]["path"] == str(tiny_model)
    assert len(info["data"]["files"][0]["sha256"]) == 64
    if not full:
        assert all(tensor.dtype == torch.float32 for tensor in weights(folder).values())
        assert info["quantization"] == {None: "none", 8: "8bit", 4: "4bit"}[info["settings"]["quantization_bit"]]
    assert tuned(folder, tiny_model) is not None


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_tuned_model_stops(tune: Tune, tiny_model: Path, tmp_path: Path, full: bool) -> None:
    """Two rows learned by heart: both answers come out whole, and then the end."""
    rows = [
        {"instruction": "央行降准怎么看？", "input": "", "output": "利好银行。"},
        {"instruction": "贸易战升级呢？", "input": "", "output": "利空出口，谨慎。"},
    ]
    path = tmp_path / "two.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    method = {"use_lora": False, "learning_rate": 1e-2} if full else {"lora_r": 32, "learning_rate": 3e-2}
    code = tune(
        data_path=[path], validation_fraction=0.0, test_fraction=0.0, num_epochs=150, lr_scheduler="linear",
        logging_steps=50, eval_steps=150, **method,
    )  # fmt: skip
    assert code == 0
    folder = tmp_path / "out"
    tokenizer, model = prepare_tokenizer(folder), tuned(folder, tiny_model)
    for record in read_records(path):
        asked = prompt_ids(tokenizer, record.prompt)
        output = model.generate(
            input_ids=torch.tensor([asked]), max_new_tokens=80, do_sample=False,
            eos_token_id=sorted(end_token_ids(tokenizer)), pad_token_id=tokenizer.pad_token_id,
        )[0, len(asked) :]  # fmt: skip
        assert tokenizer.decode(output) == record.answer + "<|im_end|>"


def test_packed_rows_do_not_see_each_other(tune: Tune, tmp_path: Path) -> None:
    """One step over all rows: packed or not, it is the same step."""
    same: dict[str, Any] = {"batch_size": 64, "num_epochs": 1, "warmup_ratio": 0.0}
    assert tune(**same) == 0
    assert tune(**same, packing=True, max_length=400, output_dir=tmp_path / "packed") == 0
    assert info_of(tmp_path / "packed")["steps"] == info_of(tmp_path / "out")["steps"] == 1
    alone, packed = weights(tmp_path / "out"), weights(tmp_path / "packed")
    for name in alone:
        assert torch.allclose(alone[name], packed[name], atol=2e-4), name
    first, second = (log_of(tmp_path / name)[1]["loss"] for name in ("out", "packed"))
    assert first == pytest.approx(second, rel=1e-5)


def test_scoring_supervised_positions_alone_changes_nothing(
    tune: Tune, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the library's own loss over all positions: the same steps, packed, accumulated and in full as well."""
    from stocklora.instruct.sft import trainer as sft_trainer

    scored: list[bool] = []
    own, most = sft_trainer.AnswerTrainer._scores_few, sft_trainer.MOST_SCORES

    def watched(self: Any, inputs: Any) -> bool:
        scored.append(own(self, inputs))
        return scored[-1]

    monkeypatch.setattr(sft_trainer.AnswerTrainer, "_scores_few", watched)
    ways: list[dict[str, Any]] = [
        {"gradient_accumulation_steps": 3, "batch_size": 4},
        {"packing": True, "max_length": 300, "batch_size": 1},
        {"use_lora": False, "learning_rate": 1e-3, "model_path": tiny_models["gpt2"]},
    ]
    for number, way in enumerate(ways):
        logs = []
        for name, least in (("few", most), ("all", 0)):
            monkeypatch.setattr(sft_trainer, "MOST_SCORES", least)
            scored.clear()
            folder = tmp_path / f"{name}{number}"
            assert tune(**way, output_dir=folder, num_epochs=1) == 0
            assert set(scored) == {name == "few"}
            logs.append(log_of(folder))
        for few, every in zip(*logs, strict=True):
            for key in ("loss", "eval_loss", "grad_norm", "token_accuracy"):
                if key in every:
                    assert few[key] == pytest.approx(every[key], rel=2e-3), (way, key)


def test_packing_is_refused_where_rows_would_see_each_other(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    forward = Qwen3Model.forward

    def unaware(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", unaware)
    with pytest.raises(UserError, match="leave out --packing"):
        tune(packing=True)


def test_a_stopped_run_ends_where_it_would_have_ended(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of the second epoch, with dropout: adapter and losses are those of the run left alone."""
    settings: dict[str, Any] = {"lora_dropout": 0.2, "num_epochs": 3, "gradient_accumulation_steps": 2}
    alone = tmp_path / "alone"
    assert tune(**settings, output_dir=alone) == 0
    from stocklora.instruct.sft import trainer as sft_trainer

    on_step_end = sft_trainer.TrainingLog.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(sft_trainer.TrainingLog, "on_step_end", interrupt)
        assert tune(**settings) == 130
    said = capsys.readouterr().out
    folder = tmp_path / "out"
    assert f"--resume_from_checkpoint {(folder / 'checkpoint-4').as_posix()}" in said
    assert not (folder / "training_info.json").exists()
    with pytest.raises(UserError, match="has not finished.*--resume_from_checkpoint last"):
        tune(**settings)
    assert tune(**settings, resume_from_checkpoint="last") == 0
    assert same_weights(folder, alone)
    judged = [
        [(entry["step"], entry["eval_loss"]) for entry in log_of(path) if "eval_loss" in entry]
        for path in (folder, alone)
    ]
    assert judged[0] == judged[1]
    assert info_of(folder)["losses"] == info_of(alone)["losses"]


def test_full_tuning_resumes_exactly_from_the_end_of_an_epoch(tune: Tune, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_lora": False, "learning_rate": 1e-3, "num_epochs": 3, "save_total_limit": 5}
    assert tune(**settings) == 0
    folder = tmp_path / "out"
    kept = folder / "model.safetensors"
    expected = kept.read_bytes()
    kept.unlink()
    assert tune(**settings, resume_from_checkpoint=str(folder / "checkpoint-6")) == 0
    assert kept.read_bytes() == expected


def test_a_checkpoint_of_another_run_or_half_of_one_is_told(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(num_epochs=2) == 0
    folder = tmp_path / "out"
    first, last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    with pytest.raises(UserError, match="no folder .*checkpoint-5; there is .*checkpoint-12"):
        tune(resume_from_checkpoint=str(folder / "checkpoint-5"))
    with pytest.raises(UserError, match="was made with lora_r 8, not 4; give the same"):
        tune(resume_from_checkpoint=str(last), lora_r=4)
    for settings in ({"num_epochs": 2}, {"num_epochs": 2, "max_steps": 3}):
        with pytest.raises(UserError, match="is at step 12, .* nothing would be trained; raise --num_epochs"):
            tune(resume_from_checkpoint=str(last), **settings)
    (last / "stocklora_checkpoint.json").unlink()
    with pytest.raises(UserError, match=f"stopped while it wrote the checkpoint; there is .*{first.name}"):
        tune(resume_from_checkpoint=str(last))
    capsys.readouterr()
    # Other changes are allowed, and said.
    assert tune(resume_from_checkpoint=str(first), batch_size=4, max_length=64) == 0
    warned = capsys.readouterr().err
    assert "batch_size 8 -> 4" in warned
    assert "max_length 1024 -> 64" in warned
    assert "not the exact continuation" in warned


def test_early_stopping_keeps_the_best(tune: Tune, tmp_path: Path) -> None:
    assert tune(num_epochs=30, learning_rate=2.0, max_grad_norm=100.0, early_stopping_patience=2) == 0
    folder = tmp_path / "out"
    info = info_of(folder)
    judged = [(entry["step"], entry["eval_loss"]) for entry in log_of(folder) if "eval_loss" in entry and entry["step"]]
    assert info["stopped_early"]
    assert info["steps"] < 180
    best = min(judged, key=lambda point: point[1])
    assert (info["losses"]["validation_best_step"], info["losses"]["validation_best"]) == best
    assert [step for step, _ in judged][-1] == best[0] + 2 * 6
    assert same_weights(folder, folder / f"checkpoint-{best[0]}")


def test_the_page_before_the_first_step(
    tune: Tune, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(preflight_only=True, lora_target_modules=["q_proj,v_proj", "o_proj"], max_length=60) == 0
    page, warned = capsys.readouterr()
    assert "6: q_proj x2, v_proj x2, o_proj x2" in page
    assert "⟦情绪：利空<|im_end|>⟧" in page or "⟦情绪：利好" in page
    assert "padding <|endoftext|>" in page
    assert "Expected memory" in page
    assert "--max_length 60 cuts" in warned
    assert not (tmp_path / "out").exists()


def test_a_target_that_matches_nothing_is_an_error_even_beside_one_that_does(tune: Tune) -> None:
    with pytest.raises(UserError, match=r"--lora_target_modules: target 'v_prj' .*did you mean 'v_proj'"):
        tune(lora_target_modules=["q_proj", "v_prj"])
    with pytest.raises(UserError, match="lm_head"):
        tune(lora_target_modules=["lm_head", "q_proj"])


def test_a_base_of_another_kind_is_tuned_where_it_can_be(tune: Tune, tmp_path: Path, capsys) -> None:
    base = make_family("Mamba", tmp_path / "base")
    assert tune(model_path=base, num_epochs=1, max_steps=2) == 0
    page = capsys.readouterr().out
    assert re.search(r"mixer\.in_proj +float32 +2 +[\d.]+% +adapted", page)
    assert re.search(r"mixer\.dt_proj +float32 +2 +[\d.]+% +the model never calls it", page)
    info = info_of(tmp_path / "out")["model"]
    assert info["adapted_layers"] == {"in_proj": 2, "x_proj": 2}
    assert info["left_out"].keys() == {f"backbone.layers.*.mixer.{name}" for name in ("dt_proj", "out_proj")}
    assert {name.split(".mixer.")[1].split(".")[0] for name in weights(tmp_path / "out")} == {"in_proj", "x_proj"}


@pytest.mark.parametrize("family", ["BERT", "T5"])
def test_a_base_that_is_no_causal_language_model_is_one_line(tune: Tune, tmp_path: Path, family: str) -> None:
    base = make_family(family, tmp_path / "base")
    with pytest.raises(UserError, match="no causal language model.*; choose one that generates text") as caught:
        tune(model_path=base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_rows_stop_the_run_or_are_counted(
    tune: Tune, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some_bad.jsonl"
    bad = [{"instruction": "问", "input": "", "output": ""}, {"instruction": "问"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bad]
    path.write_text(rows.read_text(encoding="utf-8") + "".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"2 bad row\(s\): .*some_bad.jsonl, row 61.*--skip_bad_rows"):
        tune(data_path=[path])
    assert tune(data_path=[path], skip_bad_rows=True, num_epochs=1) == 0
    assert "2 bad row(s) left out" in capsys.readouterr().err
    assert info_of(tmp_path / "out")["data"]["skipped"] == {"with faults": 2}


@pytest.mark.parametrize("mask_history", [False, True])
def test_rows_are_rendered_and_tokenized_once(
    tune: Tune, rows: Path, monkeypatch: pytest.MonkeyPatch, mask_history: bool
) -> None:
    from stocklora.instruct.rows import chat_template

    rendered: Counter[str] = Counter()
    tokenized: Counter[str] = Counter()
    render, ids = chat_template._render, chat_template._ids

    def counting_render(tokenizer: Any, messages: Sequence[Message], invite: bool, **options: Any) -> str:
        rendered[messages[0].content] += 1
        return render(tokenizer, messages, invite, **options)

    def counting_ids(tokenizer: Any, text: str) -> list[int]:
        tokenized[text] += 1
        return ids(tokenizer, text)

    monkeypatch.setattr(chat_template, "_render", counting_render)
    monkeypatch.setattr(chat_template, "_ids", counting_ids)
    assert tune(preflight_only=True, mask_history=mask_history) == 0
    questions = [record.prompt[0].content for record in read_records(rows)]
    assert {question: rendered[question] for question in questions} == {
        question: 2 * count for question, count in Counter(questions).items()
    }  # with its answer, and without
    texts = {text: count for text, count in tokenized.items() if "判断情绪" in text and "：利" in text}
    assert len(texts) == len(questions)
    assert set(texts.values()) == {1}


def test_a_run_that_cannot_begin_leaves_the_finished_one_as_it_was(tune: Tune, rows: Path, tmp_path: Path) -> None:
    assert tune(num_epochs=2) == 0
    folder = tmp_path / "out"
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.parts[0].startswith("checkpoint-") for path in before)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "问", "output": ""}\n', encoding="utf-8")
    for wrong in ({"data_path": [bad]}, {"lora_target_modules": ["nothing"]}):
        with pytest.raises(UserError):
            tune(**wrong)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # A run that does begin takes none of it for its own.
    assert tune(num_epochs=1) == 0
    assert len(list(folder.glob("checkpoint-*"))) == 1


def test_earlier_answers_of_a_conversation_are_learned_unless_masked(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talks.json"
    talks = [{"instruction": "再说", "output": DOWN, "history": [[f"公司{n}", UP]]} for n in range(8)]
    path.write_text(json.dumps(talks, ensure_ascii=False), encoding="utf-8")
    same: dict[str, Any] = {"data_path": [path], "validation_fraction": 0.25, "test_fraction": 0.0, "num_epochs": 1}
    assert tune(**same) == 0
    page = capsys.readouterr().out
    assert f"⟦{UP}<|im_end|>⟧" in page
    assert f"⟦{DOWN}<|im_end|>⟧" in page
    supervised = [info_of(tmp_path / "out")["model"]["tokens"]["train"]["supervised"]]
    assert tune(**same, mask_history=True) == 0
    page = capsys.readouterr().out
    assert f"⟦{UP}" not in page
    assert f"⟦{DOWN}<|im_end|>⟧" in page
    supervised.append(info_of(tmp_path / "out")["model"]["tokens"]["train"]["supervised"])
    assert supervised[0] == 2 * supervised[1]


def test_a_padding_token_that_had_to_be_added_is_saved_and_loads(tune: Tune, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no_spare"
    shutil.copytree(tiny_model, folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|endoftext|>", "<|role|>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    assert tune(model_path=folder, num_epochs=1) == 0
    loaded = prepare_tokenizer(tmp_path / "out")
    assert loaded.pad_token == "<|pad|>"
    model = tuned(tmp_path / "out", folder)
    assert model.get_input_embeddings().weight.shape[0] == len(loaded)


def test_other_families_train_too(tune: Tune, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for name, longest in (("llama", 300), ("gpt2", 2000)):
        folder = tmp_path / name
        assert (
            tune(model_path=tiny_models[name], output_dir=folder, packing=True, max_length=longest, batch_size=1) == 0
        )
        losses = info_of(folder)["losses"]
        assert losses["validation_best"] < losses["validation_start"]
    assert info_of(folder)["settings"]["max_length"] == 1024  # GPT-2's context


def test_a_folder_belongs_to_one_run_and_is_not_left_behind_by_none(tune: Tune, tmp_path: Path) -> None:
    from filelock import FileLock

    folder = tmp_path / "out"
    with pytest.raises(UserError, match="matches no layer"):
        tune(lora_target_modules=["nothing"])
    assert not folder.exists()
    folder.mkdir()
    with FileLock(folder / ".training.lock"), pytest.raises(UserError, match="another run is writing into"):
        tune()
    assert tune(max_steps=1) == 0
    assert not (folder / ".training.lock").exists()


def test_several_processes_are_refused(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it with python"):
        tune()


def test_a_loss_that_does_not_fall_is_said(tune: Tune, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(use_lora=False, learning_rate=3.0, num_epochs=1, warmup_ratio=0.0) == 0
    assert "the validation loss did not fall" in capsys.readouterr().err


def test_tensorboard_gets_the_log(tune: Tune, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert tune(num_epochs=1, report_to="tensorboard") == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_weights_and_biases_gets_the_log(rows: Path, tiny_model: Path, tmp_path: Path, nursery: Any) -> None:
    """In a process of its own: it leaves a service running and settings of its own in the process."""
    pytest.importorskip("wandb")
    command = ["fine_tune_qwen.py", "--use_lora", "--model_path", str(tiny_model), "--data_path", str(rows)]
    command += ["--max_steps", "2", "--report_to", "wandb", "--output_dir"]
    keyless = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}

    def run(folder: str, mode: str) -> tuple[int, str]:
        script = ForkedScript(
            nursery, REPO_ROOT / command[0], *command[1:], folder,
            cwd=tmp_path, printed=tmp_path / f"printed_{folder}", env={**keyless, "WANDB_MODE": mode},
        )  # fmt: skip
        script.stdout.read()
        assert script.stderr is not None
        return script.wait(120), script.stderr.read_text(encoding="utf-8")

    code, said = run("alone", "offline")
    assert code == 0, said
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert log.stat().st_size > 1000
    # Without a key there is nobody to ask here: one line, before any work.
    code, said = run("online", "online")
    assert code == 2
    assert "Traceback" not in said
    assert "set WANDB_MODE=offline to keep its log here" in said.splitlines()[-1]
    assert not (tmp_path / "online").exists()


def test_a_tracker_that_is_not_installed_is_one_line(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="--report_to wandb: it is not installed; pip install wandb"):
        tune(report_to="wandb")


def test_packing_is_best_fit_decreasing() -> None:
    """Against the plain search for the fullest sequence that still has room, which takes the square of the time."""
    import random

    from stocklora.instruct.sft.data import EncodedRow, _packed

    draw = random.Random(0)
    for most in (64, 1024):
        lengths = [draw.randint(1, most) for _ in range(400)]
        rows: Any = [EncodedRow(cast(Any, place), Encoded([1] * n, [1] * n, 0, 0)) for place, n in enumerate(lengths)]
        expected: list[list[int]] = []
        room: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            fits = [group for group, left in enumerate(room) if left >= lengths[place]]
            group = min(fits, key=lambda group: room[group], default=len(room))
            if group == len(room):
                expected.append([])
                room.append(most)
            expected[group].append(place)
            room[group] -= lengths[place]
        assert [[row.record for row in group] for group in _packed(rows, most)] == expected


def test_a_length_that_cuts_every_answer_is_told_as_the_cause(tune: Tune) -> None:
    with pytest.raises(UserError, match=r"--max_length 4 cuts all .* give a larger one \(the longest row has"):
        tune(max_length=4, preflight_only=True)


@pytest.mark.parametrize(
    ("flag", "changes", "words"),
    [
        ("test_fraction", {"with_split": True}, "--test_fraction: each row of the data says itself"),
        ("validation_fraction", {"with_split": True}, "--validation_fraction: each row"),
        ("early_stopping_patience", {"validation_fraction": 0.0}, "validation rows, and there are none"),
    ],
)
def test_a_flag_that_changes_nothing_on_these_rows_is_refused(
    tiny_model: Path, rows: Path, tmp_path: Path, flag: str, changes: dict[str, Any], words: str
) -> None:
    path = rows
    if changes.pop("with_split", False):
        path = tmp_path / "split.jsonl"
        lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        parts = [{**line, "split": "test" if number > 50 else "train"} for number, line in enumerate(lines)]
        path.write_text("".join(json.dumps(line) + "\n" for line in parts), encoding="utf-8")
    values = {"model_path": tiny_model, "data_path": [path], "output_dir": tmp_path / "out", **QUICK, **changes}
    sources = dict.fromkeys((field.name for field in dataclasses.fields(SftSettings)), "default")
    with pytest.raises(UserError, match=words):
        run_training(Resolved(SftSettings(**values), {**sources, flag: "flag"}), "fine_tune_qwen.py")
    assert not (tmp_path / "out").exists()


def test_a_constant_learning_rate_warms_up_too(tune: Tune, tmp_path: Path) -> None:
    assert tune(lr_scheduler="constant", warmup_ratio=0.5, num_epochs=1) == 0
    rates = [entry["learning_rate"] for entry in log_of(tmp_path / "out") if "learning_rate" in entry]
    assert rates[0] < rates[-1] == QUICK["learning_rate"]
