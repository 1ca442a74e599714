"""Instruction tuning from settings to a folder that loads: full, LoRA and QLoRA, over TRL's trainer and PEFT."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stocklora.base_models.folders import describe_model
from stocklora.cli.console import EXIT_INTERRUPTED, UserError, say, warn
from stocklora.instruct.sft.checkpoints import (
    RUN_NAME,
    check_room,
    check_same_run,
    check_steps_left,
    find_checkpoint,
    make_room,
)
from stocklora.instruct.sft.settings import Resolved, effective
from stocklora.instruct.sft.setup import (
    Prepared,
    arguments_of,
    check_files,
    check_tracker,
    check_unused,
    check_unused_on,
    find_model,
    prepare,
    run_facts,
    steps_of,
    tracker_advice,
)
from stocklora.runtime.files import sync, why_not_written, write_json

LOCK_NAME = ".training.lock"
INFO_NAME = "training_info.json"
CURVE_NAME = "loss_curve.png"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def run_training(resolved: Resolved, script: str, arguments: Sequence[str] | None = None) -> int:
    """Train as ``resolved`` says; the script's exit code.

    Args:
        script: path of the script as the user wrote it, for the command that goes on with a stopped run.
        arguments: of that command (default: those of this one).

    Raises:
        UserError: anything that the user can mend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this trains in one process; start it with python, not with accelerate launch or torchrun")
    # What can be known to fail is looked at first: the imports take seconds, the model minutes.
    settings = dataclasses.replace(resolved.settings, model_path=find_model(resolved.settings.model_path))
    check_unused(resolved)
    check_files(settings)
    check_tracker(settings.report_to)
    holding = contextlib.nullcontext() if settings.preflight_only else alone_in(settings.output_dir)
    with holding:
        checkpoint = find_checkpoint(settings.resume_from_checkpoint, settings.output_dir)
        if checkpoint is None and not settings.preflight_only:
            check_room(settings.output_dir)
        resolved = Resolved(settings, resolved.sources)
        resolved.print()
        with advice_on_failures(settings.output_dir), quiet_libraries():
            return _train(resolved, checkpoint, script, sys.argv[1:] if arguments is None else arguments)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for one run: two would mix their logs and delete each other's checkpoints.

    A killed run lets go of it by itself. Where nothing comes of the run, a folder made for it goes again.

    Raises:
        UserError: another run holds it.
    """
    from filelock import FileLock, Timeout

    was_there = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_NAME)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is writing into {folder}; give another --output_dir, or wait for it") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
        (folder / LOCK_NAME).unlink(missing_ok=True)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars, no advice on optional kernels and no notices about names of the future among our lines."""
    from stocklora.base_models.loading import quiet_transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        quiet_transformers()
        import datasets

        datasets.disable_progress_bars()
        yield


@contextlib.contextmanager
def advice_on_failures(output_dir: Path) -> Iterator[None]:
    """Turn a full memory or disk, and a tracker that fails, into advice.

    Each library has its own error for the first two, so their words are read.

    Raises:
        UserError: naming the flags that help.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                "the checkpoint is damaged or holds code, which is never run; give --resume_from_checkpoint an earlier "
                "one, or leave it out"
            ) from None
        if any(words in text for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise UserError(
                "the memory is full; try --batch_size 1, --gradient_checkpointing, --use_qlora, a smaller --max_length "
                "or a smaller model"
            ) from None
        if type(error).__module__.startswith("wandb."):  # no network, a key that is no longer good
            raise UserError(tracker_advice(error)) from None
        if (reason := why_not_written(output_dir, error)) is not None:
            raise UserError(
                f"cannot write into {output_dir}: {reason}; then go on with --resume_from_checkpoint last"
            ) from error
        raise


def _train(resolved: Resolved, checkpoint: Path | None, script: str, arguments: Sequence[str]) -> int:
    from stocklora.instruct.sft.data import check_packing, dataset_of
    from stocklora.instruct.sft.preflight import print_preflight
    from stocklora.runtime.machine import keep_freed_memory

    prepared = prepare(resolved.settings)
    settings, data = prepared.settings, prepared.data
    check_unused_on(data, resolved)
    if settings.packing:
        check_packing(prepared.model, prepared.tokenizer)
    train_set = dataset_of(data.train, settings.max_length if settings.packing else None)
    held_out = dataset_of(data.validation) if data.validation else None
    steps = steps_of(settings, len(train_set))
    facts = run_facts(prepared)
    if checkpoint is not None:
        check_same_run(checkpoint, facts)
        check_steps_left(checkpoint, steps)
    page = print_preflight(prepared, steps=steps, sequences=len(train_set))
    if settings.preflight_only:
        return 0
    make_room(settings.output_dir, checkpoint)  # not before: what fails until here leaves the finished run as it was
    record = {**facts, "sources": resolved.sources}
    write_json(settings.output_dir / RUN_NAME, record | {"finished": False})
    keep_freed_memory()
    trainer = _trainer_of(prepared, train_set, held_out, steps, resumed=checkpoint is not None)
    stopped = _trained_until(trainer, settings.output_dir, checkpoint)
    if stopped is not None:
        say(f"stopped after step {stopped} of {trainer.state.max_steps}; go on with:")
        say(f"  {resume_command(script, arguments, settings.output_dir / f'checkpoint-{stopped}')}")
        return EXIT_INTERRUPTED
    info = _finish(prepared, trainer, page, resolved.sources, checkpoint)
    write_json(settings.output_dir / RUN_NAME, record | {"finished": True})
    _report(settings, info)
    return 0


def _trainer_of(prepared: Prepared, train_set: Any, held_out: Any, steps: int, *, resumed: bool) -> Any:
    import transformers

    from stocklora.instruct.sft.trainer import AnswerTrainer, callbacks

    judged = held_out is not None
    trainer = AnswerTrainer(
        model=prepared.model,
        args=arguments_of(prepared, steps, judged=judged, resumed=resumed),
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=prepared.tokenizer,
        callbacks=callbacks(prepared.settings, judged),
    )
    trainer.most_checkpoints = max(2, prepared.settings.save_total_limit)
    for unwanted in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(unwanted)
    for parameter in prepared.model.parameters():
        # TRL makes adapters over a quantized base bfloat16, which has too few digits for small steps.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _trained_until(trainer: Any, folder: Path, checkpoint: Path | None) -> int | None:
    """Train; the step at which it was stopped, None where it came to its end."""
    from stocklora.instruct.sft.trainer import StopGently, TrainingLog

    log, stop = TrainingLog(folder), StopGently()
    for callback in (log, stop):
        trainer.add_callback(callback)
    with log, stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = int(trainer.state.global_step)
    return step if stop.requested and step < trainer.state.max_steps else None


def resume_command(script: str, arguments: Sequence[str], checkpoint: Path) -> str:
    """The command that goes on from ``checkpoint``: the one that was given, with the flag for it."""
    kept = []
    words = iter(arguments)
    for word in words:
        if word == "--resume_from_checkpoint":
            next(words, None)  # its value
        elif not word.startswith("--resume_from_checkpoint="):
            kept.append(word)
    return shlex.join(["python", script, *kept, "--resume_from_checkpoint", checkpoint.as_posix()])


def _finish(
    prepared: Prepared, trainer: Any, page: Mapping[str, Any], sources: Mapping[str, str], checkpoint: Path | None
) -> dict[str, Any]:
    """Write the folder that is used from now on; what its training_info.json says."""
    from stocklora.instruct.sft.trainer import LOG_NAME
    from stocklora.plots.curves import plot_loss_curve, read_training_log
    from stocklora.runtime.machine import machine_facts, peak_memory_mb, versions_of

    settings, data, state = prepared.settings, prepared.data, trainer.state
    folder = settings.output_dir
    log = read_training_log(folder / LOG_NAME)
    losses = _losses(log, state)
    if data.validation and not math.isfinite(losses["validation_best"] or math.nan):
        raise UserError("the loss is not a number any more: lower --learning_rate, or use --dtype float32")
    save_model(prepared, trainer.accelerator.unwrap_model(trainer.model), folder)
    info = {
        "base_model": {"path": str(settings.model_path), **describe_model(settings.model_path)},
        "method": settings.method,
        "quantization": settings.quantization,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "settings": effective(settings),
        "sources": sources,
        "data": {"files": data.files, "split": data.split, "skipped": data.skipped},
        "model": page,
        "losses": losses,
        "steps": state.global_step,
        "epochs": state.epoch,
        "stopped_early": state.global_step < state.max_steps,
        "seconds": max((entry["seconds"] for entry in log), default=0.0),
        "peak_memory_mb": round(peak_memory_mb(prepared.device.type)),
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions_of(*LIBRARIES),
        "machine": machine_facts(),
    }
    plot_loss_curve(log, folder / CURVE_NAME, f"{settings.model_path.name}, {settings.method}")
    write_json(folder / INFO_NAME, info)
    return info


def _losses(log: Sequence[Mapping[str, Any]], state: Any) -> dict[str, Any]:
    judged = [entry for entry in log if entry.get("eval_loss") is not None]
    return {
        "validation_start": next((entry["eval_loss"] for entry in judged if entry["step"] == 0), None),
        "validation_best": state.best_metric if judged else None,
        "validation_best_step": state.best_global_step,
        "train_last": next((entry["loss"] for entry in reversed(log) if entry.get("loss") is not None), None),
    }


def _report(settings: Any, info: Mapping[str, Any]) -> None:
    losses = info["losses"]
    start, best = losses["validation_start"], losses["validation_best"]
    if info["stopped_early"]:
        say(f"stopped early: no lower validation loss in {settings.early_stopping_patience} judgements")
    if start is not None and best is not None:
        say(f"validation loss {start:.4f} -> {best:.4f}, lowest at step {losses['validation_best_step']}")
        if best >= start:
            warn("the validation loss did not fall: try another --learning_rate, or more rows")
    say(f"{info['seconds']:,.0f} s, {info['peak_memory_mb']:,} MB at most")
    folder = settings.output_dir
    say(f"{'model' if settings.method == 'full' else 'adapter'}: {folder}")
    if settings.method == "full":
        say(f"next: python inference_lora.py --base_model {folder} --chat")
        return
    bits = f" --load_in_{settings.quantization}" if settings.use_qlora else ""
    say(f"next: python inference_lora.py --base_model {settings.model_path} --lora_model {folder}{bits} --chat")


def save_model(prepared: Prepared, model: Any, folder: Path) -> None:
    """Write adapter or model, and the tokenizer, into ``folder``; what other methods left there goes.

    Everything is written aside and then moved in. What says that a model lies there goes first and comes last, so that
    a stop leaves the old one, the new one, or none, which the run that goes on writes; and never a mixture of two.
    """
    from stocklora.instruct.rows.chat_template import end_token_ids

    full = prepared.settings.method == "full"
    if full:
        # As the base's own weights were kept, so that whatever reads the base reads this.
        if prepared.base_dtype is not None:
            model.to(prepared.base_dtype)
        model.generation_config.eos_token_id = sorted(end_token_ids(prepared.tokenizer))
        model.config.use_cache = True
    for left in folder.glob(".saving-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.save_pretrained(str(aside))
        prepared.tokenizer.save_pretrained(str(aside))
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in; ours is training_info.json
        sync(aside, files=True)
        for name in (INFO_NAME, ADAPTER_FILES[0], MODEL_FILES[0], *(ADAPTER_FILES if full else MODEL_FILES)):
            (folder / name).unlink(missing_ok=True)
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
        sync(folder)
        for path in sorted(aside.iterdir(), key=lambda path: path.name in (ADAPTER_FILES[0], MODEL_FILES[0])):
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
