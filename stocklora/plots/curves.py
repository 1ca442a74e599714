"""The course of a training run: its log read, and the pictures of its losses and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError
from stocklora.plots.style import (
    INK,
    MODEL,
    MUTED,
    UP,
    WALK,
    dot_of,
    latin_font,
    new_figure,
    save_figure,
    set_step_axis,
    set_title,
)
from stocklora.runtime.files import json_of

LOGGED_NUMBERS = ("loss", "eval_loss", "learning_rate")


def read_training_log(path: Path) -> list[dict[str, Any]]:
    """The entries of ``training_log.jsonl``; a last line that a killed run left half written is passed over.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = dict(json_of(line))
            entry["step"] + sum(entry.get(name) or 0 for name in LOGGED_NUMBERS)
        except (ValueError, AttributeError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is no entry of a training log; train again, or remove the file"
            ) from None
        entries.append(entry)
    return entries


def logged(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have a number called ``name``."""
    return [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]


def draw_losses(
    axis: Any,
    log: Sequence[Mapping[str, Any]],
    training: str = "training rows",
    validation: str = "validation rows",
    lowest: str | None = None,
) -> tuple[float, float] | None:
    """Draw both losses over the steps, with a dot where the validation loss is lowest; that point, if there is one.

    Args:
        training: label of the loss on training rows.
        validation: label of the loss on validation rows.
        lowest: label of the dot, with ``{loss}`` and ``{step}``; None leaves it out of the legend.
    """
    train, held_out = logged(log, "loss"), logged(log, "eval_loss")
    best = None
    if train:
        axis.plot(*zip(*train, strict=True), color=MODEL, linewidth=1.6, label=training, marker=dot_of(train))
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color=INK, marker="o", markersize=4, label=validation)
        best = min(held_out, key=lambda point: point[1])
        label = None if lowest is None else lowest.format(loss=best[1], step=best[0])
        axis.plot(*best, "o", color=UP, markersize=9, zorder=3, label=label)
    if train or held_out:
        axis.legend(frameon=False, labelcolor=MUTED, fontsize=9)
    return best


def draw_learning_rate(axis: Any, log: Sequence[Mapping[str, Any]], color: str) -> None:
    rates = logged(log, "learning_rate")
    if rates:
        axis.plot(*zip(*rates, strict=True), color=color, linewidth=1.6, marker=dot_of(rates))


def plot_loss_curve(log: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> None:
    """Draw the losses of a training log, and below them the learning rate.

    Args:
        log: entries of ``read_training_log``.
        path: of the PNG to write.
        subtitle: what was trained.
    """
    figure, (top, bottom) = new_figure(2, 6.5, (3, 1))
    set_title(top, "Loss per supervised token", latin_font().drawable(subtitle) or "answers and their end tokens only")
    best = draw_losses(top, log)
    if best is not None:
        late = best[0] > 0.5 * max(entry["step"] for entry in log)
        top.annotate(
            f"lowest: {best[1]:.4f} at step {best[0]}", best, (-9 if late else 9, 9), color=UP, fontsize=9.5,
            ha="right" if late else "left", textcoords="offset points",
        )  # fmt: skip
    top.set_ylabel("nats", color=MUTED)
    draw_learning_rate(bottom, log, WALK)
    bottom.set_ylabel("learning rate", color=MUTED)
    set_step_axis(bottom, "step", [entry["step"] for entry in log])
    save_figure(figure, path)


def plot_training_curve(history: Sequence[Mapping[str, float]], best_epoch: int, path: Path) -> None:
    """Draw validation loss against the untrained model's, epoch by epoch, and the training loss below it.

    Args:
        history: rows of ``training_history.csv``, from epoch 0 on. best_epoch: whose weights were kept.
    """
    epochs = [row["epoch"] for row in history]
    ratios = [row["validation_ratio"] for row in history]
    figure, (top, bottom) = new_figure(2, 6.0, (3, 2))
    set_title(
        top,
        "Validation loss relative to the random walk",
        "below 1: the model has learned something that holds on days it was not trained on",
    )
    top.axhline(1.0, color=WALK, linewidth=1.2, linestyle="--")
    top.plot(epochs, ratios, color=MODEL, marker="o", markersize=4)
    top.plot([best_epoch], [ratios[best_epoch]], "o", color=UP, markersize=9, zorder=3)
    top.annotate(
        f"kept: epoch {best_epoch}, {ratios[best_epoch]:.4f}", (best_epoch, ratios[best_epoch]), (9, -14),
        color=UP, fontsize=9.5, textcoords="offset points",
    )  # fmt: skip
    # A curve that stays within a thousandth of 1 should look flat.
    low, high = min([*ratios, 0.998]), max([*ratios, 1.002])
    top.set_ylim(low - 0.25 * (high - low), high + 0.2 * (high - low))
    top.set_ylabel("ratio", color=MUTED)
    bottom.plot(epochs[1:], [row["train_loss"] for row in history[1:]], color=INK, marker="o", markersize=4)
    bottom.set_ylabel("training loss\n(units of the scale)", color=MUTED)
    bottom.set_xlabel("epoch", color=MUTED)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)
