"""The picture of a training run: loss on training and validation rows, and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def plot_loss_curve(log: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> None:
    """Draw ``training_log.jsonl``'s entries.

    Args:
        log: entries with ``step`` and any of ``loss``, ``eval_loss``, ``learning_rate``.
    """
    figure, (top, bottom) = new_figure(2, 6.5, (3, 1))
    set_title(top, "Loss per supervised token", latin_font().drawable(subtitle) or "answers and their end tokens only")
    train = [(entry["step"], entry["loss"]) for entry in log if entry.get("loss") is not None]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if entry.get("eval_loss") is not None]
    if train:
        top.plot(*zip(*train, strict=True), color=MODEL, linewidth=1.6, label="training rows", marker=dot_of(train))
    if held_out:
        top.plot(*zip(*held_out, strict=True), color=INK, marker="o", markersize=4, label="validation rows")
        best = min(held_out, key=lambda point: point[1])
        top.plot(*best, "o", color=UP, markersize=9, zorder=3)
        late = best[0] > 0.5 * max(entry["step"] for entry in log)
        top.annotate(
            f"lowest: {best[1]:.4f} at step {best[0]}", best, (-9 if late else 9, 9), color=UP, fontsize=9.5,
            ha="right" if late else "left", textcoords="offset points",
        )  # fmt: skip
    if train or held_out:
        top.legend(frameon=False, labelcolor=MUTED, fontsize=9)
    top.set_ylabel("nats", color=MUTED)
    rate = [(entry["step"], entry["learning_rate"]) for entry in log if entry.get("learning_rate") is not None]
    if rate:
        bottom.plot(*zip(*rate, strict=True), color=WALK, linewidth=1.6, marker=dot_of(rate))
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
