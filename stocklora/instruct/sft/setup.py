"""What a training run needs before its first step: model folder, tokenizer, rows, model with adapters, arguments."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocklora.base_models.folders import INCOMPLETE, check_model_folder, command_for, describe_model
from stocklora.cli.console import UserError, one_line, say
from stocklora.instruct.sft.settings import DEEPSEEK, Resolved, SftSettings, effective
from stocklora.runtime.files import as_json_types

HUB_NAMES = {Path(DEEPSEEK).name: DEEPSEEK}


@dataclass
class Prepared:
    """A model ready to train, and what it trains on.

    Attributes:
        settings: those given, with ``max_length`` within the model's context.
        dtype: that a pass computes in. base_dtype: of the weights in the model's folder, None where it does not say.
        survey: which kinds of layers are adapted, and which are not and why; none where every weight trains.
    """

    settings: SftSettings
    model: Any
    tokenizer: Any
    data: Any
    dtype: Any
    base_dtype: Any
    device: Any
    survey: Sequence[Any] = ()


def find_model(path: Path) -> Path:
    """The model folder that ``path`` means: itself, or for a hub's name the folder it was fetched into.

    Raises:
        UserError: it is not there, or not a whole model.
    """
    if not path.exists():
        fetched = Path("models") / path.name
        if not path.is_absolute() and len(path.parts) == 2 and fetched.is_dir():
            path = fetched
        elif not path.with_name(path.name + INCOMPLETE).exists():
            command = command_for(path)
            if path.name in HUB_NAMES:
                command = f"python download_model.py --model {HUB_NAMES[path.name]} --save_dir {path}"
            raise UserError(
                f"no model at {path}; fetch it with: {command} (any local instruct model does as well: "
                f"--model_path FOLDER)"
            )
    check_model_folder(path)
    return path


def check_unused(resolved: Resolved) -> None:
    """Refuse flags that change nothing in this run; in a config file that serves several methods they may stand.

    Raises:
        UserError: naming the flag, and the one that it needs.
    """
    settings = resolved.settings
    given = {name for name, source in resolved.sources.items() if source == "flag"}
    adapters = [name for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if name in given]
    if settings.method == "full" and adapters:
        raise UserError(
            f"--{adapters[0]} is for adapters, and without --use_lora or --use_qlora every weight is trained; add one "
            f"of them, or leave it out"
        )
    if "validation_fraction" in given and settings.validation_path:
        raise UserError("--validation_fraction takes rows from --data_path, and --validation_path gives rows to judge "
                        "by; leave one out")  # fmt: skip
    if "save_total_limit" in given and settings.save_total_limit < 2:
        say("--save_total_limit 1: two are kept, the best and the last, so that the run can go on and end at its best")


def check_unused_on(data: Any, resolved: Resolved) -> None:
    """Refuse flags that change nothing on these rows.

    Raises:
        UserError: naming the flag, and why.
    """
    given = {name for name, source in resolved.sources.items() if source == "flag"}
    shares = sorted(given & {"validation_fraction", "test_fraction"})
    if shares and data.split_by_rows:
        raise UserError(f"--{shares[0]}: each row of the data says itself (split) which part it is of; leave it out")
    if "early_stopping_patience" in given and resolved.settings.early_stopping_patience and not data.validation:
        raise UserError(
            "--early_stopping_patience stops by the loss on validation rows, and there are none; leave it out, or give "
            "--validation_path FILE or a --validation_fraction above 0"
        )


def check_files(settings: SftSettings) -> None:
    """Raise a UserError for the first data file that is not there, with the command that makes it."""
    for path in [*settings.data_path, *settings.validation_path]:
        if path.is_file():
            continue
        if path.suffix == ".jsonl" and path.parent.name == "qlora":
            command = (
                f"python scripts/qlora/build_instruction_dataset.py --db finance_analysis.db --output {path} "
                f"--num_samples 300"
            )
        else:
            command = "python data/prepare_data.py"
        raise UserError(f"no file {path}; make one with: {command}, or give --data_path FILE")


def check_tracker(name: str) -> None:
    """Raise a UserError where ``--report_to`` names what is not installed, or asks for an account that is not there."""
    if name == "none":
        return
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--report_to {name}: it is not installed; pip install {name}, or leave the flag out")
    if name == "wandb":
        import wandb

        os.environ.setdefault("WANDB_PROJECT", "stocklora")
        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
            return
        try:
            wandb.login()  # on a terminal it asks for a key
        except Exception as error:
            raise UserError(tracker_advice(error)) from None


def tracker_advice(error: Exception) -> str:
    """What to do where Weights & Biases refuses."""
    return (
        f"--report_to wandb: {one_line(str(error)).rstrip('.')}; run: wandb login, set WANDB_MODE=offline to keep its "
        f"log here, or leave the flag out"
    )


def prepare(settings: SftSettings) -> Prepared:
    """Tokenizer, rows, and the model on its device with what trains set to train.

    Raises:
        UserError: anything wrong with model, data or targets.
    """
    import torch
    from transformers import AutoConfig, set_seed

    from stocklora.base_models.loading import is_causal, load_causal_model
    from stocklora.instruct.rows.chat_template import fit_embeddings, prepare_tokenizer
    from stocklora.instruct.sft.adapted import with_adapters
    from stocklora.instruct.sft.data import read_data
    from stocklora.runtime.machine import choose_device

    device = choose_device(settings.device)
    if settings.use_qlora and device.type == "mps":
        raise UserError("--use_qlora: bitsandbytes computes on CPUs and CUDA cards, not on mps; add --device cpu")
    dtype = computing_dtype(settings, device)
    tokenizer = prepare_tokenizer(settings.model_path, settings.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the model's configuration in {settings.model_path}: {str(error)[:300]}") from None
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and settings.max_length > context:
        say(f"max_length {settings.max_length} is lowered to the model's context of {context} tokens")
        settings = dataclasses.replace(settings, max_length=int(context))
    data = read_data(settings, tokenizer)
    set_seed(settings.seed)  # the adapters start at random
    model = load_causal_model(
        settings.model_path,
        quantization=settings.quantization,
        # All weights that train are kept in float32: bfloat16 has too few digits for small steps.
        dtype=torch.float32 if settings.method == "full" else dtype,
        device=device,
        trust_remote_code=settings.trust_remote_code,
    )
    if not is_causal(model.base_model):
        raise UserError(
            f"{settings.model_path} is no causal language model: it reads what follows a word too; choose one that "
            f"generates text, such as Qwen3, Llama or GPT-2"
        )
    if added := fit_embeddings(model, tokenizer):
        say(f"the model's embeddings got {added} more row(s), for the padding token {tokenizer.pad_token}")
    model.config.use_cache = False
    survey: Sequence[Any] = ()
    if settings.method == "full":
        model.requires_grad_(True)
    else:
        model, survey = with_adapters(model, settings)
    return Prepared(settings, model, tokenizer, data, dtype, getattr(config, "dtype", None), device, survey)


def computing_dtype(settings: SftSettings, device: Any) -> Any:
    """The type that a pass computes in.

    Cards before Ampere (a T4) have no bfloat16; there adapters train in float16 with a scaled loss, since a 7B model in
    float32 would not fit. A full run stays in float32.
    """
    import torch

    from stocklora.runtime.machine import choose_dtype

    dtype = choose_dtype(settings.dtype, device)
    if settings.dtype == "auto" and device.type == "cuda" and dtype == torch.float32 and settings.method != "full":
        return torch.float16
    return dtype


def steps_of(settings: SftSettings, sequences: int) -> int:
    """Steps of the whole run, at most."""
    batches = math.ceil(sequences / settings.batch_size)
    steps = settings.num_epochs * math.ceil(batches / settings.gradient_accumulation_steps)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def arguments_of(prepared: Prepared, steps: int, *, judged: bool, resumed: bool) -> Any:
    """``SFTConfig`` with nothing left to defaults that differ between machines or versions.

    Args:
        steps: of the whole run. judged: whether there are validation rows.
    """
    import torch
    from trl import SFTConfig

    settings = prepared.settings
    rhythm: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "epoch" if judged else "no"}
    if settings.eval_steps is not None:
        rhythm = {"save_strategy": "steps", "save_steps": settings.eval_steps}
        rhythm |= {"eval_strategy": "steps" if judged else "no", "eval_steps": settings.eval_steps}
    if judged:
        rhythm |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    config = SFTConfig(
        output_dir=str(settings.output_dir),
        num_train_epochs=settings.num_epochs,
        max_steps=-1 if settings.max_steps is None else steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.rate,
        # The library's plain "constant" begins at the peak, whatever the warm-up.
        lr_scheduler_type="constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler,
        warmup_steps=round(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=prepared.dtype == torch.bfloat16,
        fp16=prepared.dtype == torch.float16,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=settings.max_length,
        packing=settings.packing,
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # our tokens and labels, as they are
        eval_on_start=judged and not resumed,
        save_total_limit=None,  # AnswerTrainer lets go of older ones
        restore_callback_states_from_checkpoint=True,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        report_to=settings.report_to,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=prepared.device.type == "cpu",
        dataloader_pin_memory=prepared.device.type == "cuda",
        disable_tqdm=True,
        **rhythm,
    )
    if prepared.device.type == "cuda":
        config._n_gpu = 1  # one process uses one card; several cards want one process each
    return config


def run_facts(prepared: Prepared) -> dict[str, Any]:
    """What the course of a run depends on, to compare a resumed run with."""
    settings = prepared.settings
    facts = effective(settings) | {
        "method": settings.method,
        "model": describe_model(settings.model_path)["config_sha256"],
        "data": [entry["sha256"] for entry in prepared.data.files],
        "computing_dtype": str(prepared.dtype),
    }
    return dict(as_json_types(facts))  # as it reads back from a file
