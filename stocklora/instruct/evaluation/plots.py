"""Pictures of a training run and of its evaluation, with Chinese or English words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from stocklora.base_models.folders import read_json
from stocklora.cli.console import UserError, say, warn
from stocklora.instruct.chat.settings import PlotSettings
from stocklora.instruct.chat.sources import TRAINING_INFO, last_part, training_info
from stocklora.instruct.evaluation.measures import BASE_SYSTEM, MEASURES, TUNED_SYSTEM, number, shown
from stocklora.instruct.evaluation.run import FORMAT, RESULTS
from stocklora.plots.curves import draw_learning_rate, draw_losses, logged, read_training_log
from stocklora.plots.style import (
    GRID,
    INK,
    MODEL,
    MUTED,
    UP,
    WALK,
    Font,
    families,
    find_font,
    latin_font,
    new_figure,
    quiet_fonts,
    save_figure,
    set_step_axis,
    set_title,
)

LOG = "training_log.jsonl"
PICTURES = {name: f"plot_{name}.png" for name in ("loss", "learning_rate", "scores", "generation")}
ENGLISH, CHINESE = 0, 1
WORDS = {
    "loss": ("Loss per supervised token", "每个监督词元的损失"),
    "loss_note": ("answers and their end tokens only", "只计算回答及其结束符"),
    "train": ("training rows", "训练集"),
    "validation": ("validation rows", "验证集"),
    "lowest": ("lowest: {loss:.4f} (step {step:.0f})", "最低：{loss:.4f}（第 {step:.0f} 步）"),
    "step": ("step", "步数"),
    "nats": ("loss (nats)", "损失（nats）"),
    "learning_rate": ("Learning rate", "学习率"),
    "scores": ("Held-out rows: base against tuned", "留出样本：基座模型与微调模型对比"),
    "interval": ("bars: 95% bootstrap interval", "横线：95% 自助法置信区间"),
    "vertical_interval": ("bars: 95% bootstrap interval", "竖线：95% 自助法置信区间"),
    "rows": ("rows", "条样本"),
    "base": ("base", "基座"),
    "base_name": ("base ({name})", "基座（{name}）"),
    "tuned": ("tuned", "微调"),
    "majority": ("majority class", "多数类"),
    "difference": ("difference, points", "差值（百分点）"),
    "generation": ("Time and length of answers", "生成时间与长度"),
    "expected": ("dashed: expected answers ({count:.0f})", "虚线：参考答案（{count:.0f}）"),
    "success_rate": ("ends by itself", "成功率"),
    "chrf": ("likeness, chrF", "相似度 chrF"),
    "rouge_l": ("likeness, ROUGE-L", "相似度 ROUGE-L"),
    "label_accuracy": ("label right, all kinds", "标签准确率（全部类型）"),
    "sentiment_accuracy": ("sentiment accuracy", "情绪标签准确率"),
    "sentiment_macro_f1": ("sentiment macro F1", "情绪标签宏平均 F1"),
    "json_valid": ("valid JSON", "JSON 有效率"),
    "field_accuracy": ("JSON fields right", "JSON 字段准确率"),
    "fields_exact": ("all fields right", "JSON 全部字段正确"),
    "numbers_supported": ("numbers from the question", "数字有出处的比例"),
    "generation_time_s": ("seconds an answer", "每条用时（秒）"),
    "generated_tokens": ("tokens an answer", "每条词元数"),
    "answer_characters": ("characters an answer", "每条字符数"),
}
GENERATION = ("generation_time_s", "generated_tokens", "answer_characters")


@dataclass(frozen=True)
class Words:
    """The language and the font of a picture."""

    language: int
    font: Font

    def __call__(self, name: str) -> str:
        return WORDS[name][self.language]


def choose_words(language: str, font: Path | None = None) -> Words:
    """Chinese where a font has it, else English and a line that says so.

    Args:
        language: ``auto``, ``zh`` or ``en``. font: a font file to draw with.

    Raises:
        UserError: ``zh``, and no font for it.
    """
    chinese = "".join(words[CHINESE] for words in WORDS.values())
    if language == "en":
        english = "".join(words[ENGLISH] for words in WORDS.values())
        return Words(ENGLISH, (find_font(english, font) if font else None) or latin_font())
    found = find_font(chinese, font)
    if found is not None:
        return Words(CHINESE, found)
    advice = "install one (fonts-noto-cjk or fonts-wqy-zenhei on Debian and Ubuntu), or give --font FILE"
    if language == "zh":
        raise UserError(f"no font on this machine has Chinese characters; {advice}")
    say(f"labels in English: no font on this machine has Chinese characters; for Chinese ones {advice}")
    return Words(ENGLISH, latin_font())


def plot_results(settings: PlotSettings) -> list[Path]:
    """Draw what there is to draw; the pictures' paths.

    Raises:
        UserError: nothing to draw, or a damaged file.
    """
    folder = settings.model_path
    log, results = read_training_log(folder / LOG), read_results(folder / RESULTS)
    if not log and results is None:
        raise UserError(
            f"{folder} has neither {LOG} nor {RESULTS}; train with: python training/train.py, and score with: python "
            f"training/evaluate.py --model_path {folder}"
        )
    words = choose_words(settings.language, settings.font)
    if words.language == CHINESE:
        say(f"labels in Chinese, drawn with {words.font.name}")
    target = settings.output_dir or folder
    about = _about(folder)
    options: Any = {
        "font.family": families(words.font),
        "axes.unicode_minus": not words.font.lacks("\u2212"),
        "text.parse_math": False,  # a $ in a model's name is a $
    }
    paths = []
    with matplotlib.rc_context(options), quiet_fonts():
        if logged(log, "loss") or logged(log, "eval_loss"):
            paths.append(_plot_loss(log, words, about, target / PICTURES["loss"]))
        if logged(log, "learning_rate"):
            paths.append(_plot_learning_rate(log, words, about, target / PICTURES["learning_rate"]))
        if results is not None:
            paths.append(_plot_scores(results, words, target / PICTURES["scores"]))
            paths.append(_plot_generation(results, words, target / PICTURES["generation"]))
    if not log:
        warn(f"no {LOG} in {folder}, so no loss curve")
    if results is None:
        warn(f"no {RESULTS} in {folder}, so no scores; run: python training/evaluate.py --model_path {folder}")
    return paths


def read_results(path: Path) -> Mapping[str, Any] | None:
    """What ``training/evaluate.py`` wrote, or None where it wrote nothing.

    Raises:
        UserError: it is something else, or of another version.
    """
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; run training/evaluate.py again") from None
    if not isinstance(content, Mapping) or content.get("format") != FORMAT or not _is_whole(content):
        raise UserError(f"{path} is not what training/evaluate.py of this version writes; run it again")
    return content


def _is_whole(content: Mapping[str, Any]) -> bool:
    """Whether the tables are there, with every measure of every model."""
    if not all(isinstance(content.get(name), Mapping) for name in ("data", "systems", "difference", "expected")):
        return False
    names = {measure.name for measure in MEASURES}
    tables = list(content["systems"].values())
    return TUNED_SYSTEM in content["systems"] and all(isinstance(it, Mapping) and set(it) >= names for it in tables)


def _about(folder: Path) -> str:
    """Model and method, for a subtitle."""
    info = training_info(folder) if (folder / TRAINING_INFO).is_file() else {}
    base = info.get("base_model")
    name = base.get("name") if isinstance(base, dict) else base
    quantization = str(info.get("quantization") or "none")
    parts = [
        last_part(str(name)) if name else None,
        info.get("method"),
        None if quantization == "none" else quantization,
    ]
    return ", ".join(str(part) for part in parts if part)


# ---------------------------------------------------------------------------------------------------------- pictures


def _plot_loss(log: Sequence[Mapping[str, Any]], words: Words, about: str, path: Path) -> Path:
    figure, axis = new_figure(1, 5.0)
    set_title(
        axis, words("loss"), words.font.drawable(" · ".join(part for part in (about, words("loss_note")) if part))
    )
    draw_losses(axis, log, words("train"), words("validation"), words("lowest"))
    set_step_axis(axis, words("step"), [entry["step"] for entry in log])
    axis.set_ylabel(words("nats"), color=MUTED)
    save_figure(figure, path)
    return path


def _plot_learning_rate(log: Sequence[Mapping[str, Any]], words: Words, about: str, path: Path) -> Path:
    figure, axis = new_figure(1, 3.6)
    set_title(axis, words("learning_rate"), words.font.drawable(about))
    draw_learning_rate(axis, log, MODEL)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    set_step_axis(axis, words("step"), [entry["step"] for entry in log])
    save_figure(figure, path)
    return path


def _plot_scores(results: Mapping[str, Any], words: Words, path: Path) -> Path:
    """A row for each share: base and tuned with their intervals, and the difference at the right."""
    systems = results["systems"]
    measures = [m for m in MEASURES if m.unit == "%" and any(systems[name].get(m.name) for name in systems)]
    figure, axis = new_figure(1, 1.9 + 0.46 * len(measures))
    rows = f"{results['data']['rows']} {words('rows')}"
    set_title(axis, words("scores"), f"{rows} · {words('interval')}")
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0, pad=9)  # room for a dot at 0%
    shifts = {BASE_SYSTEM: -0.14, TUNED_SYSTEM: 0.14} if len(systems) > 1 else dict.fromkeys(systems, 0.0)
    for name in systems:
        color = MODEL if name == TUNED_SYSTEM else WALK
        entries = [(place, systems[name].get(m.name)) for place, m in enumerate(measures)]
        for place, entry in entries:
            if entry and entry["low"] is not None:
                axis.plot([100 * entry["low"], 100 * entry["high"]], [place + shifts[name]] * 2, color=color,
                          linewidth=2.6, alpha=0.55, solid_capstyle="round", clip_on=False)  # fmt: skip
        points = [(100 * entry["value"], place + shifts[name]) for place, entry in entries if entry]
        label = words(name)
        if name == BASE_SYSTEM:
            label = words("base_name").format(name=words.font.drawable(last_part(str(results["base_model"]))))
        axis.scatter(*zip(*points, strict=True), s=42, color=color, zorder=3, label=label, clip_on=False)
    majority = results.get("majority") or {}
    for place, m in enumerate(measures):
        if m.name in majority:  # what always giving the commonest label scores
            named = axis.get_legend_handles_labels()[1][len(systems) :]
            value = 100 * majority[m.name]["value"]
            axis.plot([value] * 2, [place - 0.3, place + 0.3], color=INK, linewidth=1.6, clip_on=False,
                      label=None if named else words("majority"))  # fmt: skip
    axis.set_yticks(range(len(measures)), [words(m.name) for m in measures], color=INK, fontsize=10)
    axis.set_ylim(len(measures) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    if results["difference"]:
        transform = axis.get_yaxis_transform()
        axis.text(1.02, -0.5, words("difference"), transform=transform, color=MUTED, fontsize=9, va="bottom")
        for place, m in enumerate(measures):
            entry = results["difference"].get(m.name)
            text = shown(entry, m, signed=True).replace(" pt", "")
            settled = bool(entry) and entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0)
            axis.text(1.02, place, text, transform=transform, va="center", fontsize=9.5,
                      color=INK if settled else MUTED, fontweight="bold" if settled else "normal")  # fmt: skip
    axis.legend(frameon=False, labelcolor=MUTED, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    save_figure(figure, path)
    return path


def _plot_generation(results: Mapping[str, Any], words: Words, path: Path) -> Path:
    """A panel each for time, tokens and characters of an answer."""
    from matplotlib import pyplot as plt

    systems = results["systems"]
    figure, axes = plt.subplots(1, len(GENERATION), figsize=(10, 4.2), layout="constrained")
    figure.suptitle(words("generation"), x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    figure.supxlabel(words("vertical_interval"), x=0.01, ha="left", color=MUTED, fontsize=9)
    by_name = {m.name: m for m in MEASURES}
    for axis, name in zip(axes, GENERATION, strict=True):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(WALK)
        axis.set_title(words(name), loc="left", color=INK, fontsize=10.5)
        axis.tick_params(colors=MUTED, labelsize=9, length=0)
        axis.set_yticks([])
        for place, system in enumerate(systems):
            entry = systems[system][name]
            color = MODEL if system == TUNED_SYSTEM else WALK
            axis.bar(place, entry["value"], width=0.55, color=color)
            top = entry["value"]
            if entry["low"] is not None:
                axis.plot([place, place], [entry["low"], entry["high"]], color=INK, linewidth=1.4)
                top = entry["high"]
            # On a ground of its own: the dashed line of the expected answers may run behind it.
            axis.annotate(number(entry["value"], by_name[name]), (place, top), (0, 4), textcoords="offset points",
                          ha="center", color=INK, fontsize=10,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        if name == "answer_characters":
            expected = results["expected"]["answer_characters"]
            axis.axhline(expected, color=UP, linewidth=1.2, linestyle="--")
            title = f"{words(name)}\n{words('expected').format(count=expected)}"
            axis.set_title(title, loc="left", color=INK, fontsize=10.5)
        axis.set_xticks(range(len(systems)), [words(system) for system in systems])
        axis.set_xlim(-0.6, len(systems) - 0.4)
        axis.margins(y=0.18)
    save_figure(figure, path)
    return path
