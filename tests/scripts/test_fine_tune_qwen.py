"""fine_tune_qwen.py and training/train.py as a user runs them: the documents' commands, configuration, mistakes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from sft_folders import info_of, lay_out
from source_tree import RunScript

from stocklora.cli.console import UserError
from stocklora.instruct.sft.settings import DeepseekSettings, Resolved, SftParser, SftSettings, TrainSettings

DOCUMENTED = {
    "python fine_tune_qwen.py --config_file configs/train_config_full.json": "output_qwen_full",
    "python fine_tune_qwen.py --config_file configs/train_config_lora.json": "output_qwen_lora",
    "python fine_tune_qwen.py --config_file configs/train_config_qlora.json": "output_qwen_qlora",
    "python fine_tune_qwen.py --config_file configs/train_config_qlora_8bit.json": "output_qwen_qlora_8bit",
    "python fine_tune_qwen.py --use_lora --lora_r 64 --lora_alpha 16 --data_path data/store_xhs_sft_samples.jsonl "
    "--output_dir ./output_lora --learning_rate 1e-4": "output_lora",
    "python training/train.py": "outputs",
}


def resolved(*arguments: str, settings: type[SftSettings] = SftSettings, config: Path | None = None) -> Resolved:
    parser = SftParser("script.py", None, settings, config)
    return parser.settings_of(parser.parse_args(arguments))


@pytest.mark.parametrize("command", DOCUMENTED)
def test_the_documents_commands_work_as_written(
    command: str, call_script: RunScript, tiny_model: Path, tmp_path: Path
) -> None:
    folder = lay_out(tmp_path / "project", tiny_model)
    words = shlex.split(command)
    result = call_script(words[1], *words[2:], cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    output = folder / DOCUMENTED[command]
    info = info_of(output)
    assert info["losses"]["validation_best"] < info["losses"]["validation_start"]
    weights = "model.safetensors" if info["method"] == "full" else "adapter_model.safetensors"
    assert {weights, "tokenizer.json"} <= {path.name for path in output.iterdir()}
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    # What was said is what was used, and where it came from.
    settings = info["settings"]
    if "--config_file" in words:
        assert info["sources"]["learning_rate"] == words[-1]
        assert info["sources"]["dtype"] == "default"
        wanted = {"full": "none", "lora": "none", "qlora": "4bit", "qlora_8bit": "8bit"}
        assert info["quantization"] == wanted[words[-1].removeprefix("configs/train_config_").removesuffix(".json")]
    elif words[1] == "training/train.py":
        assert (settings["lora_r"], settings["lora_alpha"], settings["learning_rate"]) == (16, 32, 2e-4)
        assert info["model"]["adapted_layers"] == {"q_proj": 2, "v_proj": 2}
    else:
        assert (settings["lora_r"], settings["lora_alpha"]) == (64, 16)
        assert sum(info["model"]["adapted_layers"].values()) == 14


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("use_lora: true\nlora_r: 4\nlearning_rate: 3e-4\n", encoding="utf-8")
    found = resolved("--config_file", str(config), "--lora_r", "32")
    assert (found.settings.lora_r, found.settings.rate, found.settings.lora_alpha) == (32, 3e-4, 16.0)
    assert [found.sources[name] for name in ("lora_r", "learning_rate", "lora_alpha")] == [
        "flag", str(config), "default",
    ]  # fmt: skip


def test_sections_and_names_of_other_projects(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {name: models/x}\nlora:\n  r: 16\n  lora_alpha: 32\n  dropout: 0.0\n"
        '  target_modules: ["q_proj", "v_proj"]\ntraining:\n  num_train_epochs: 2\n  learning_rate: 2e-4\n'
        "quantization: {bits: 4}\nuse_qlora: true\n",
        encoding="utf-8",
    )
    settings = resolved(config=config, settings=TrainSettings).settings
    assert settings.model_path == Path("models/x")
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout, settings.num_epochs) == (16, 32.0, 0.0, 2)
    assert (settings.targets, settings.method, settings.quantization) == (["q_proj", "v_proj"], "qlora", "4bit")
    assert settings.output_dir == Path("outputs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rr: 8}", "unknown setting 'lora_rr'; did you mean 'lora_r'"),
        ("training: {learning_rat: 8}", "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ("lora_r: 8\nlora: {r: 8}", "'lora_r' and 'lora.r' are one setting"),
        ("lora_r: many", "'lora_r' must be int"),
        ("quantization_bit: 3", "must be one of 4, 8"),
        ("quantization_bit: 4", "add --use_qlora"),
        ("lora_dropout: 1.0", "--lora_dropout must be at least 0 and below 1"),
        ("validation_fraction: 0.6\ntest_fraction: 0.4", "leave nothing to train on"),
        ("report_to: all", "must be one of none, tensorboard, wandb"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        resolved("--config", str(config))


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj, v_proj,", "o_proj"], ["q_proj", "v_proj", "o_proj"]),
        (["all-linear"], None),
    ],
)
def test_targets_with_commas_or_blanks(words: list[str], targets: list[str] | None) -> None:
    assert resolved("--use_lora", "--lora_target_modules", *words).settings.targets == targets
    assert resolved("--use_lora").settings.targets is None


def test_the_presets_are_the_documents() -> None:
    settings = resolved(settings=DeepseekSettings).settings
    assert (settings.num_epochs, settings.batch_size, settings.learning_rate, settings.max_length) == (3, 4, 2e-4, 512)
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout) == (8, 16, 0.05)
    assert (settings.method, settings.quantization) == ("qlora", "4bit")
    assert [resolved(*flags).settings.rate for flags in ([], ["--use_lora"], ["--use_qlora"])] == [2e-5, 1e-4, 2e-4]


def test_a_missing_model_says_how_to_fetch_it(call_script: RunScript, tmp_path: Path, tiny_model: Path) -> None:
    folder = lay_out(tmp_path / "project", tiny_model)
    for path in (folder / "models").rglob("*"):
        if path.is_file():
            path.unlink()
    for name in ("Qwen2.5-0.5B-Instruct", "deepseek-llm-7b-chat"):
        (folder / "models" / name).rmdir()
    fetch = {
        "fine_tune_qwen.py": "--model Qwen/Qwen2.5-0.5B-Instruct --save_dir models/Qwen2.5-0.5B-Instruct",
        "training/train.py": "--model Qwen/Qwen2.5-0.5B-Instruct --save_dir models/Qwen2.5-0.5B-Instruct",
        "scripts/qlora/train_qlora.py": "--model deepseek-ai/deepseek-llm-7b-chat "
        "--save_dir models/deepseek-llm-7b-chat",
    }
    for script, command in fetch.items():
        result = call_script(script, cwd=folder)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert f"python download_model.py {command}" in result.stderr
        assert "--model_path FOLDER" in result.stderr
        assert result.stdout == ""


def test_a_missing_data_file_says_how_to_make_it(call_script: RunScript, tmp_path: Path, tiny_model: Path) -> None:
    folder = lay_out(tmp_path / "project", tiny_model)
    (folder / "data/chinese_instructions.json").unlink()
    (folder / "data/qlora/instructions.jsonl").unlink()
    for script, command in (
        ("training/train.py", "python data/prepare_data.py"),
        ("scripts/qlora/train_qlora.py", "python scripts/qlora/build_instruction_dataset.py --db"),
    ):
        result = call_script(script, cwd=folder)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert command in result.stderr


def test_every_config_is_read_and_names_only_known_settings(repo_root: Path) -> None:
    for path in sorted((repo_root / "configs").glob("train_config_*.json")):
        settings = resolved("--config_file", str(path)).settings
        assert settings.model_path == Path("models/Qwen2.5-0.5B-Instruct")
        assert settings.data_path == [Path("data/chinese_instructions.json")]
        assert "lora_target_modules" not in json.loads(path.read_text(encoding="utf-8")) or settings.targets is None
    assert resolved(settings=TrainSettings, config=repo_root / "configs/lora_config.yaml").settings.method == "lora"
