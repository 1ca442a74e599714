"""TRL's ``SFTTrainer`` with a loss per supervised token on held-out rows, a readable log, and stops to resume from."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from stocklora.cli.console import progress, say, warn
from stocklora.instruct.rows.chat_template import IGNORED
from stocklora.instruct.sft.checkpoints import damage_of, let_go, seal, unseal
from stocklora.instruct.sft.preflight import MOST_SCORES
from stocklora.instruct.sft.settings import SftSettings
from stocklora.runtime.files import as_json_types, write_text
from stocklora.runtime.interrupt import Interruption

LOG_NAME = "training_log.jsonl"
LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "eval_mean_token_accuracy")


class AnswerTrainer(SFTTrainer):
    """``SFTTrainer`` with three differences.

    Its evaluation loss is the mean over supervised tokens. The library averages batches, so that its number depends on
    how rows fall into batches, and a batch of short answers weighs as much as one of long ones.

    On a CPU the output head scores supervised positions alone. The library does so where it has a Triton kernel, and
    elsewhere scores every position, questions and padding too; with a vocabulary of 49,152 that took a quarter of a
    step.

    A checkpoint is whole or not believed: see ``checkpoints.seal``.

    Attributes:
        most_checkpoints: that are kept. The library would remove an older one before the new one is sealed.
    """

    most_checkpoints = 2

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean cross entropy of supervised tokens; their sum over ``num_items_in_batch`` where that is given."""
        if return_outputs or not self._scores_few(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]  # (rows, tokens - 1): what each position is followed by
        positions = (labels != IGNORED).any(dim=0).nonzero()[:, 0]  # (kept,), supervised in some row
        labels = labels[:, positions]
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits  # (rows, kept, vocabulary)
        counted = labels != IGNORED
        logits, labels = logits[counted].float(), labels[counted]  # (supervised, vocabulary), (supervised,)
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        mode = "train" if model.training else "eval"
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == labels).sum() / max(1, len(labels))
        self._metrics[mode]["mean_token_accuracy"].append(float(right))
        items = len(labels) if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(items).clamp(min=1)

    def _scores_few(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the scores of the supervised positions can be had alone, and fit the memory."""
        labels = inputs["labels"]
        if labels.device.type != "cpu" or self.aux_loss_enabled:
            return False
        network: Any = self.model
        base = network.get_base_model() if hasattr(network, "get_base_model") else network
        if "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
            return False
        positions = int((labels[:, 1:] != IGNORED).any(dim=0).sum())
        return positions * len(labels) * int(base.get_output_embeddings().weight.shape[0]) <= MOST_SCORES

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        network: Any = self.model
        model = self._wrap_model(network, training=False, dataloader=dataloader)
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        tokens = samples = 0
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            # What stands first in a row is never predicted.
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            samples += len(batch["labels"])
            if not count:
                continue
            with torch.no_grad(), self.compute_loss_context_manager():
                total += self.compute_loss(model, batch).double().cpu() * count
            tokens += count
        sums = self.accelerator.reduce(torch.tensor([float(total), tokens, samples], device=self.args.device))
        loss = float(sums[0] / sums[1].clamp(min=1))
        metrics = {f"{metric_key_prefix}_loss": loss}
        return EvalLoopOutput(None, None, metrics, int(sums[2]))  # type: ignore[arg-type]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Sealed last; older ones go after that, by their steps and not by a clock that may have jumped."""
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        unseal(folder)
        super()._save_checkpoint(model, trial)
        seal(folder)
        let_go(output_dir, self.most_checkpoints, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run describes itself in training_info.json."""


class TrainingLog(TrainerCallback, contextlib.ExitStack):
    """``training_log.jsonl``, a line on the terminal for each entry, and a progress bar on terminals.

    Used as a context manager around the training, after which the bar is down, whatever happened.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / LOG_NAME
        self.earlier_s = 0.0
        self.start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run takes its log up where its checkpoint was made: later entries belong to what was lost.
        kept = []
        if state.global_step:
            from stocklora.plots.curves import read_training_log

            kept = [entry for entry in read_training_log(self.path) if entry["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
        self.earlier_s = max((entry.get("seconds", 0.0) for entry in kept), default=0.0)
        self.start = time.monotonic()
        self._bar = self.enter_context(progress("loss {task.fields[loss]}"))
        self._task = self._bar.add_task("steps", total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: Mapping[str, Any] = kwargs["logs"]
        kept = {name.replace("mean_", ""): value for name, value in logs.items() if name in LOGGED}
        numbers = {name: as_json_types(float(value)) for name, value in kept.items()}
        if not {"loss", "eval_loss"} & numbers.keys():  # the library's sums at the end
            return
        seconds = round(self.earlier_s + time.monotonic() - self.start, 2)
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **numbers, "seconds": seconds}
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        words = [f"step {entry['step']}/{state.max_steps}", f"epoch {entry['epoch']:.2f}"]
        if "loss" in numbers:
            words.append(f"loss {numbers['loss']:.4f}")
            words.append(f"rate {numbers['learning_rate']:.2e}")
            self._bar.update(self._task, loss=f"{numbers['loss']:.4f}")
        if "eval_loss" in numbers:
            words.append(f"validation loss {numbers['eval_loss']:.4f}")
        say("  ".join([*words, f"{seconds:,.1f} s"]))


class StopGently(Interruption, TrainerCallback):
    """Ends the run after the step at hand, with a checkpoint, once that was requested."""

    def __init__(self) -> None:
        notice = "stopping after this step; once more stops at once, without a checkpoint"
        super().__init__(notice, descriptor=1, together_s=0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In the middle of an epoch there is nothing to judge yet: the run that goes on will do it at the end.
        if self.requested and abs(state.epoch - round(state.epoch)) > 1e-9:
            control.should_evaluate = control.should_save = False


class Patience(EarlyStoppingCallback):
    """Early stopping that does not count the judgement before the first step."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if state.global_step:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class KeepBest(TrainerCallback):
    """Finds the best checkpoint again after a folder was moved; where it is gone, the next judgement is the best."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_metric is None:
            return
        here = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        places = [here if state.best_model_checkpoint is None else Path(state.best_model_checkpoint), here]
        state.best_model_checkpoint = next((str(place) for place in places if damage_of(place) is None), None)
        if state.best_model_checkpoint is None:
            warn(f"the best checkpoint of the run, {here}, is not whole any more; the best from here on is kept")
            state.best_metric = state.best_global_step = None


def callbacks(settings: SftSettings, judged: bool) -> list[TrainerCallback]:
    """What a run does beside training; ``judged`` where there are validation rows."""
    result: list[TrainerCallback] = []
    if judged:
        result.append(KeepBest())
        if settings.early_stopping_patience:
            result.append(Patience(settings.early_stopping_patience))
    return result
