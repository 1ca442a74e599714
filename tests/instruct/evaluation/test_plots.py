"""visualization/plot_results.py: the pictures that there is something for, in words that the font has."""

from __future__ import annotations

import json
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from chat_models import write_jsonl
from matplotlib import font_manager, text
from PIL import Image
from source_tree import RunScript

from stocklora.cli.console import UserError
from stocklora.instruct.chat.model import Answer
from stocklora.instruct.chat.settings import PlotSettings
from stocklora.instruct.evaluation import plots
from stocklora.instruct.evaluation.measures import MEASURES, Prediction
from stocklora.instruct.evaluation.plots import CHINESE, ENGLISH, PICTURES, WORDS, Words, choose_words, plot_results
from stocklora.instruct.evaluation.run import FORMAT, summarize
from stocklora.instruct.evaluation.scoring import score
from stocklora.instruct.rows.formats import Message, Record
from stocklora.plots import curves as loss_curve
from stocklora.plots.style import Font, find_font, latin_font

LOG = [{"step": 0, "epoch": 0, "eval_loss": 3.0}] + [
    {"step": step, "epoch": step / 10, "loss": 3.0 - step / 10, "learning_rate": 1e-4, "eval_loss": 3.1 - step / 10}
    for step in (5, 10, 15)
]


def results(systems: tuple[str, ...] = ("base", "tuned")) -> dict[str, Any]:
    """A results file's content, from a few scored answers."""
    rows = [
        Record((Message("user", f"快讯{i} 3.2%"), Message("assistant", "情绪：利好")), {"kind": "s", "label": "利好"})
        for i in range(6)
    ]
    said = {"base": ["利空", "利好", "", "?", "x", "y"], "tuned": ["情绪：利好"] * 5 + ["4.4%"]}
    predictions = {
        name: [
            Prediction(Answer(text, "stop", 1, 5, 0.2), score(row, text, "stop"))
            for row, text in zip(rows, said[name], strict=True)
        ]
        for name in systems
    }
    content = summarize(rows, predictions, resamples=100)
    return {"format": FORMAT, "base_model": "小模型-135M", "data": {"rows": 6}, "intervals": "95%; x", **content}


@pytest.fixture
def outputs(in_folder: Path) -> Path:
    folder = in_folder / "outputs"
    folder.mkdir()
    write_jsonl(folder / "training_log.jsonl", LOG)
    (folder / "evaluation_results.json").write_text(json.dumps(results()), encoding="utf-8")
    (folder / "training_info.json").write_text('{"base_model": {"name": "小模型"}, "method": "lora"}', encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn."""
    texts: list[str] = []
    draw = text.Text.draw

    def noted(self: text.Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        texts.append(self.get_text())
        draw(self, renderer, *args, **kwargs)

    monkeypatch.setattr(text.Text, "draw", noted)
    return texts


def test_the_script_writes_four_pictures(outputs: Path, in_folder: Path, run_script: RunScript) -> None:
    result = run_script("visualization/plot_results.py", cwd=in_folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "abels in " in result.stdout  # it says which language it took
    pictures = sorted(outputs.glob("*.png"))
    assert [path.name for path in pictures] == sorted(PICTURES.values())
    for path in pictures:
        with Image.open(path) as image:
            assert image.width >= 1200
            assert len(image.convert("L").getcolors(256) or []) > 2  # something is drawn


@pytest.mark.filterwarnings("error:.*[Gg]lyph.*")
def test_english_words_are_drawn_where_no_font_has_chinese_ones(
    outputs: Path, drawn: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_font", lambda *_: None)
    plot_results(PlotSettings(model_path=outputs))
    assert "no font on this machine has Chinese characters" in capsys.readouterr().out
    assert WORDS["scores"][ENGLISH] in drawn
    assert not latin_font().lacks("".join(drawn))  # not even in the model's own name
    assert any("???" in words for words in drawn)
    with pytest.raises(UserError, match="install one"):
        plot_results(PlotSettings(model_path=outputs, language="zh"))


@pytest.mark.filterwarnings("error:.*[Gg]lyph.*")
def test_chinese_words_are_drawn_where_a_font_has_them(outputs: Path, drawn: list[str]) -> None:
    if find_font("".join(words[CHINESE] for words in WORDS.values())) is None:
        pytest.skip("this machine has no font with Chinese characters")
    plot_results(PlotSettings(model_path=outputs, language="zh"))
    assert WORDS["scores"][CHINESE] in drawn
    assert any("小模型" in words for words in drawn)


def test_a_font_counts_only_with_every_character() -> None:
    latin = latin_font()
    assert latin.lacks("loss 损失") == {"损", "失"}
    assert latin.drawable("Qwen 千问") == "Qwen ??"
    assert find_font("loss") is not None
    assert find_font("\U000f1234") is None  # a character that no font has, but for fonts of boxes
    assert Words(ENGLISH, latin)("loss") == WORDS["loss"][ENGLISH]


def test_a_font_file_can_be_given(outputs: Path, in_folder: Path) -> None:
    dejavu = Path(font_manager.findfont("DejaVu Serif"))
    assert choose_words("en", dejavu).font == Font("DejaVu Serif", dejavu)
    with pytest.raises(UserError, match=r"lacks \d+ characters"):
        choose_words("zh", dejavu)
    (in_folder / "no.ttf").write_text("x")
    with pytest.raises(UserError, match="is not a font"):
        choose_words("en", in_folder / "no.ttf")


def test_every_measure_and_picture_has_its_words_in_both_languages() -> None:
    assert {measure.name for measure in MEASURES} <= set(WORDS)
    assert all(len(words) == 2 and all(words) for words in WORDS.values())
    for words in WORDS.values():
        fields = [{part[1:3] for part in Formatter().parse(text) if part[1]} for text in words]
        assert fields[0] == fields[1]
    assert not latin_font().lacks("".join(words[ENGLISH] for words in WORDS.values()))


def test_what_is_not_there_is_not_drawn_and_it_is_said(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs / "evaluation_results.json").unlink()
    assert [path.name for path in plot_results(PlotSettings(model_path=outputs, language="en"))] == [
        PICTURES["loss"], PICTURES["learning_rate"],
    ]  # fmt: skip
    assert "training/evaluate.py" in capsys.readouterr().err
    (outputs / "training_log.jsonl").unlink()
    with pytest.raises(UserError, match=r"neither training_log.jsonl nor evaluation_results.json"):
        plot_results(PlotSettings(model_path=outputs))


def test_scores_of_one_model_alone_are_drawn(outputs: Path) -> None:
    (outputs / "evaluation_results.json").write_text(json.dumps(results(("tuned",))), encoding="utf-8")
    assert len(plot_results(PlotSettings(model_path=outputs, language="en"))) == 4


def test_a_damaged_results_file_is_told(outputs: Path) -> None:
    path = outputs / "evaluation_results.json"
    whole = results()
    without = {**whole, "systems": {"tuned": {"chrf": None}}}
    for content in ({}, [], {"format": FORMAT, "systems": {}}, {**whole, "systems": {}}, {**whole, "data": 6}, without):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match="run it again"):
            plots.read_results(path)


@pytest.mark.filterwarnings("error:.*[Gg]lyph.*")
def test_a_single_step_is_a_dot_over_whole_steps(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    for module in (plots, loss_curve):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    log = [{"step": 1, "epoch": 0.1, "loss": 3.0, "learning_rate": 1e-4}]
    write_jsonl(outputs / "training_log.jsonl", log)
    (outputs / "evaluation_results.json").unlink()
    plot_results(PlotSettings(model_path=outputs, language="en"))
    loss_curve.plot_loss_curve(log, outputs / "loss_curve.png", "小模型, lora")
    assert len(drawn) == 3
    for figure in drawn:
        figure.canvas.draw()
        for axis in figure.axes:
            assert [line.get_marker() for line in axis.lines] == ["o"]
            assert all(float(tick).is_integer() for tick in axis.get_xticks())
    assert any("???, lora" in words.get_text() for words in drawn[-1].axes[0].texts)


def test_no_words_are_covered(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plot_results(PlotSettings(model_path=outputs, language="en"))
    scores, generation = drawn[-2:]
    scores.canvas.draw()
    axis = scores.axes[0]
    radius = max(points.get_sizes()[0] for points in axis.collections) ** 0.5 / 2 * scores.dpi / 72
    at_zero = axis.transData.transform((0, 0))[0]  # a dot at 0% stands half outside the axes
    assert all(label.get_window_extent().x1 < at_zero - 2 * radius for label in axis.get_yticklabels())
    values = [words for axis in generation.axes for words in axis.texts]
    assert len(values) == 6
    assert all(words.get_bbox_patch() is not None for words in values)  # the dashed line may pass there
