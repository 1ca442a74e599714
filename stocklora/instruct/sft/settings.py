"""What the instruction-tuning scripts can be told, and where each value in force came from; light to import.

One dataclass for all of them; a script with other defaults is a subclass with other defaults. Precedence: default <
config file < flag. A config file may be flat (``lora_r: 16``) or in sections (``lora: {r: 16}``), JSON or YAML.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, print_table
from stocklora.cli.settings import (
    DEVICES,
    DTYPES,
    SettingsParser,
    check_positive,
    check_range,
    checked_values,
    read_config,
    setting,
)

TRACKERS = ("none", "tensorboard", "wandb")
SCHEDULES = ("cosine", "linear", "constant")
LEARNING_RATES = {"full": 2e-5, "lora": 1e-4, "qlora": 2e-4}
DEEPSEEK = "deepseek-ai/deepseek-llm-7b-chat"
# What else a key is called in configs found in the wild.
ALIASES = {
    "model_name": "model_path",
    "model_name_or_path": "model_path",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "target_modules": "lora_target_modules",
}
SECTIONS = ("model", "data", "lora", "quantization", "training", "output")
# In a section the prefix is understood: lora.r, lora.dropout, quantization.bits, model.name, data.path, output.dir.
SECTION_KEYS = {
    ("quantization", "bits"): "quantization_bit",
    ("model", "path"): "model_path",
    ("model", "name"): "model_path",
    ("data", "path"): "data_path",
    ("output", "dir"): "output_dir",
}


@dataclass(frozen=True)
class SftSettings:
    """Settings of ``fine_tune_qwen.py``."""

    model_path: Path = setting(
        Path("models/Qwen2.5-0.5B-Instruct"), "folder of an instruct or chat model (see download_model.py)",
        section="model", metavar="FOLDER", flags=("--model_path", "--model_name"),
    )  # fmt: skip
    trust_remote_code: bool = setting(False, "run Python code that comes with the model", section="model")

    data_path: list[Path] = setting(
        [Path("data/chinese_instructions.json")],
        "instructions, .json or .jsonl: alpaca, ShareGPT or messages rows",
        section="data", nargs="+", metavar="FILE",
    )  # fmt: skip
    validation_path: list[Path] = setting(
        [], "rows to judge epochs by (default: a part of --data_path, by date where rows have one)", section="data",
        nargs="+", metavar="FILE",
    )  # fmt: skip
    validation_fraction: float = setting(0.1, "share of the rows to judge epochs by", section="data", metavar="SHARE")
    test_fraction: float = setting(
        0.1, "share of the rows kept aside for training/evaluate.py", section="data", metavar="SHARE"
    )
    max_length: int = setting(1024, "tokens of a row, at most; what is longer is cut at its end", section="data")
    packing: bool = setting(
        False, "lay several rows into one sequence of max_length tokens; they do not see each other", section="data"
    )
    mask_history: bool = setting(
        False, "take the loss on the last answer of a conversation alone (default: on every answer)", section="data"
    )
    skip_bad_rows: bool = setting(False, "leave out rows with faults and count them, instead of stopping",
                                  section="data")  # fmt: skip

    use_lora: bool = setting(False, "train LoRA adapters, not every weight", section="method")
    use_qlora: bool = setting(False, "train LoRA adapters over a quantized model (QLoRA)", section="method")
    quantization_bit: int | None = setting(
        None, "bits of a quantized weight: 4 (nf4) or 8 (int8); needs --use_qlora (default with it: 4)",
        choices=(4, 8), section="method",
    )  # fmt: skip
    lora_r: int = setting(64, "rank of the adapters", section="method")
    lora_alpha: float = setting(16.0, "adapters are scaled by alpha / rank", section="method")
    lora_dropout: float = setting(0.1, "dropout on the adapters' input", section="method")
    lora_target_modules: list[str] | None = setting(
        None, "layers to adapt, by name, with commas or blanks between them (default: every linear layer)",
        section="method", nargs="+", metavar="NAME",
    )  # fmt: skip
    use_rslora: bool = setting(False, "scale adapters by alpha / sqrt(rank), for high ranks (rsLoRA)", section="method")
    use_dora: bool = setting(
        False, "train the length of each weight row apart from its direction (DoRA)", section="method"
    )

    num_epochs: int = setting(3, "passes over the training rows", section="training")
    max_steps: int | None = setting(None, "stop after so many steps, whatever the epochs", section="training",
                                    metavar="N")  # fmt: skip
    batch_size: int = setting(4, "rows of one forward pass", section="training")
    gradient_accumulation_steps: int = setting(4, "passes summed before a step", section="training", metavar="N")
    learning_rate: float | None = setting(
        None, "peak learning rate (default: 2e-5 full, 1e-4 LoRA, 2e-4 QLoRA)", section="training", metavar="RATE"
    )
    lr_scheduler: str = setting("cosine", "how the learning rate falls", choices=SCHEDULES, section="training")
    warmup_ratio: float = setting(0.05, "share of the steps spent warming up", section="training", metavar="SHARE")
    weight_decay: float = setting(0.0, "AdamW's weight decay", section="training", metavar="RATE")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", section="training", metavar="NORM")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower", section="training")
    eval_steps: int | None = setting(
        None, "judge and save every N steps (default: after each epoch)", section="training", metavar="N"
    )
    early_stopping_patience: int = setting(
        3, "stop after so many judgements without a lower validation loss; 0 never stops early", section="training",
        metavar="N",
    )  # fmt: skip
    seed: int = setting(42, "seed of everything random", section="training")
    dtype: str = setting(
        "auto", "number format to compute in; auto: bfloat16 where the processor has it", choices=DTYPES,
        section="training",
    )  # fmt: skip
    device: str = setting("auto", "where to compute", choices=DEVICES, section="training")

    output_dir: Path = setting(Path("output_qwen"), "folder for what is trained", section="output", metavar="FOLDER")
    resume_from_checkpoint: str | None = setting(
        None, "go on from a checkpoint folder; last: the newest in --output_dir", section="output",
        metavar="FOLDER|last",
    )  # fmt: skip
    save_total_limit: int = setting(2, "checkpoints to keep, the best always among them", section="output")
    logging_steps: int = setting(5, "log every N steps", section="output", metavar="N")
    report_to: str = setting(
        "none", "also send the log to TensorBoard or Weights & Biases", choices=TRACKERS, section="output"
    )
    preflight_only: bool = setting(False, "print the pre-flight page and stop", section="output")

    def __post_init__(self) -> None:
        check_positive(
            self, "max_length", "lora_r", "lora_alpha", "num_epochs", "max_steps", "batch_size", "eval_steps",
            "gradient_accumulation_steps", "learning_rate", "max_grad_norm", "save_total_limit", "logging_steps",
        )  # fmt: skip
        for name in ("lora_dropout", "validation_fraction", "test_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"--{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise UserError("--validation_fraction and --test_fraction leave nothing to train on; lower one of them")
        check_range(
            self, warmup_ratio=(0, 1), weight_decay=(0, None), early_stopping_patience=(0, None), seed=(0, 2**32 - 1)
        )
        if self.quantization_bit is not None and not self.use_qlora:
            raise UserError(
                f"--quantization_bit {self.quantization_bit}: quantized weights cannot train, adapters over them can; "
                f"add --use_qlora, or leave it out"
            )
        if self.method == "full" and (self.use_dora or self.use_rslora):
            raise UserError("--use_dora and --use_rslora are for adapters; add --use_lora or --use_qlora")

    @property
    def method(self) -> str:
        """``full``, ``lora`` or ``qlora``. QLoRA is LoRA as well, so both switches together mean QLoRA."""
        return "qlora" if self.use_qlora else "lora" if self.use_lora else "full"

    @property
    def quantization(self) -> str:
        """``none``, ``4bit`` or ``8bit``."""
        return "none" if not self.use_qlora else f"{self.quantization_bit or 4}bit"

    @property
    def rate(self) -> float:
        """The peak learning rate in force."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def targets(self) -> list[str] | None:
        """Names of the layers to adapt; None for every linear layer, which is also called ``all-linear``."""
        text = " ".join(self.lora_target_modules or []).replace(",", " ")
        names = list(dict.fromkeys(text.split()))
        return None if names in ([], ["all-linear"], ["all"], ["auto"]) else names


def like(name: str, **changes: Any) -> dict[str, Any]:
    """What ``setting`` is told of the setting ``name`` of ``SftSettings``, but for its default and ``changes``."""
    return {**SftSettings.__dataclass_fields__[name].metadata, **changes}


@dataclass(frozen=True)
class TrainSettings(SftSettings):
    """Settings of ``training/train.py``: LoRA, into ``outputs/``."""

    use_lora: bool = setting(True, **like("use_lora"))
    output_dir: Path = setting(Path("outputs"), **like("output_dir"))


@dataclass(frozen=True)
class DeepseekSettings(SftSettings):
    """Settings of ``scripts/qlora/train_qlora.py``: 4-bit QLoRA of DeepSeek-7B on one 16 GB card."""

    model_path: Path = setting(
        Path("models/deepseek-llm-7b-chat"), **like("model_path", help="folder of the base model")
    )
    data_path: list[Path] = setting(
        [Path("data/qlora/instructions.jsonl")],
        **like("data_path", help="instructions, as build_instruction_dataset.py writes them"),
    )
    max_length: int = setting(512, **like("max_length"))
    use_qlora: bool = setting(True, **like("use_qlora"))
    lora_r: int = setting(8, **like("lora_r"))
    lora_dropout: float = setting(0.05, **like("lora_dropout"))
    learning_rate: float | None = setting(2e-4, **like("learning_rate", help="peak learning rate"))
    gradient_checkpointing: bool = setting(True, **like("gradient_checkpointing"))
    eval_steps: int | None = setting(
        50, **like("eval_steps", help="judge and save every N steps; a machine that is taken away loses no more")
    )
    gradient_accumulation_steps: int = setting(1, **like("gradient_accumulation_steps"))
    save_total_limit: int = setting(3, **like("save_total_limit"))
    output_dir: Path = setting(Path("qlora_output"), **like("output_dir"))


@dataclass(frozen=True)
class Resolved:
    """Settings in force, and for each where it came from: ``default``, ``flag``, or a config file's name."""

    settings: SftSettings
    sources: dict[str, str]

    def print(self) -> None:
        """The effective configuration; what differs from the defaults stands out by its source."""
        rows = [(name, shown(value), self.sources[name]) for name, value in effective(self.settings).items()]
        print_table("Configuration", ("setting", "value", "from"), rows)


class SftParser(SettingsParser):
    """Flags of a script that tunes on instructions, with ``--config_file`` as another name of ``--config``.

    Args:
        default_config: read where no config file is given.
    """

    def __init__(
        self, prog: str, description: str | None, settings_class: type[SftSettings], default_config: Path | None = None
    ) -> None:
        super().__init__(prog, description, settings_class)
        self.set_defaults(config=default_config)
        self.add_argument(
            "--config_file",
            dest="config",
            type=Path,
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="same as --config",
        )

    def settings_of(self, arguments: argparse.Namespace) -> Resolved:
        """The settings in force: defaults, then the config file, then the flags that were given.

        Raises:
            UserError: an unknown key, a value of the wrong type or outside its choices, an unreadable file.
        """
        path: Path | None = arguments.config
        given = {name: value for name, value in vars(arguments).items() if name != "config"}
        values: dict[str, Any] = {}
        if path is not None:
            values = checked_values(flattened(read_config(path), path), self.settings_class, path)
        names = [field.name for field in dataclasses.fields(self.settings_class)]
        sources = dict.fromkeys(names, "default") | dict.fromkeys(values, str(path)) | dict.fromkeys(given, "flag")
        return Resolved(self.settings_class(**values | given), sources)


def flattened(content: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """A config file's settings without its sections, under the names of the flags.

    Raises:
        UserError: one setting given twice under two names.
    """
    flat: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in content.items():
        if key in SECTIONS and isinstance(value, Mapping):
            items = [(f"{key}.{name}", _in_section(key, str(name)), item) for name, item in value.items()]
        elif key in SECTIONS and value is None:
            continue  # a section whose lines are all commented out
        else:
            items = [(str(key), ALIASES.get(str(key), str(key)), value)]
        for written, name, item in items:
            if name in flat:
                raise UserError(f"{source}: '{given[name]}' and '{written}' are one setting; leave one out")
            flat[name], given[name] = item, written
    return flat


def _in_section(section: str, name: str) -> str:
    if (section, name) in SECTION_KEYS:
        return SECTION_KEYS[section, name]
    if section == "lora" and name not in ALIASES and not name.startswith(("lora_", "use_")):
        return f"lora_{name}"
    return ALIASES.get(name, name)


def effective(settings: SftSettings) -> dict[str, Any]:
    """Every setting with what it comes to: the learning rate of the method, the names of the layers."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    values["learning_rate"] = settings.rate
    values["lora_target_modules"] = settings.targets
    values["quantization_bit"] = int(settings.quantization[0]) if settings.use_qlora else None
    return values


def shown(value: Any) -> str:
    """A setting's value as a person writes it."""
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
