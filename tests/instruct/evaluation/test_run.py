"""Scores, intervals, held-out rows, and training/evaluate.py as a user runs it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import make_adapter, read_jsonl, write_jsonl
from source_tree import RunScript

from stocklora.cli.console import UserError
from stocklora.cli.settings import check_installed
from stocklora.instruct.chat.model import Answer
from stocklora.instruct.chat.settings import EvaluateSettings
from stocklora.instruct.evaluation.bootstrap import Resampler, spread
from stocklora.instruct.evaluation.held_out import held_out_rows
from stocklora.instruct.evaluation.majority import majority_verdicts
from stocklora.instruct.evaluation.measures import MEASURES, Prediction
from stocklora.instruct.evaluation.run import evaluate, label_sets, summarize
from stocklora.instruct.evaluation.scoring import (
    chrf,
    json_scores,
    numbers_in,
    predicted_label,
    rouge_l,
    same_value,
    score,
)
from stocklora.instruct.evaluation.tables import print_results, verdicts
from stocklora.instruct.news.dataset import InstructionSettings, build_dataset
from stocklora.instruct.rows.formats import SENTIMENTS, Message, Record
from stocklora.instruct.rows.records import read_records, split_records
from stocklora.runtime.files import sha256_of


def record(question: str, answer: str, **meta: Any) -> Record:
    return Record((Message("user", question), Message("assistant", answer)), meta)


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("情绪：利好\n理由：虽有利空传闻", "利好"),
        ("情绪: 利空。", "利空"),
        ("**情绪**：【中性】", "中性"),
        ("市场情绪判断为“利空”，并非利好", "利空"),
        ("这是利好", "利好"),
        ("Sentiment: Negative", "利空"),
        ("The sentiment is bullish.", "利好"),
        ("可能利好，也可能利空", None),
        ("情绪：利好、利空或中性", None),
        ("情绪：利好/利空", None),
        ("看不出来", None),
        ("", None),
        ("情绪：利好还是利空？", None),
        ("情绪：利好和利空", None),
        ("情绪：利好 利空 中性", None),
        ("情绪：中性偏多", None),
        ("情绪：利好（positive）", "利好"),
        ("情绪：积极正面", "利好"),
        ("这不是利好", None),
        ("对黄金不构成利空", None),
        ("情绪：不是利好", None),
        ("并非利好，而是利空", "利空"),
        ("It is not positive", None),
        ("**利好**\n理由：利空出尽", "利好"),
        ("快讯：积极的财政政策\n理由：利空出尽\n情绪：中性", "中性"),
        ("情绪分析：利空\n说明：利好出尽", "利空"),
    ],
)
def test_a_sentiment_is_read_where_it_is_clear(text: str, label: str | None) -> None:
    assert predicted_label(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [("风险等级：高\n说明：中期看", "高"), ("风险等级：中等", "中"), ("低", "低"), ("高。", "高"),
     ("提高警惕，中国", None), ("风险等级：高于预期", None), ("风险等级：中等风险。", "中"),
     ("短线风险等级为高，宜观望", "高"), ("风险等级：中高", None), ("风险等级：低、中、高", None)],
)  # fmt: skip
def test_a_label_of_one_character_is_not_found_inside_words(text: str, label: str | None) -> None:
    assert predicted_label(text, ["高", "中", "低"]) == label


def test_labels_of_other_kinds_are_read_too() -> None:
    assert predicted_label("没有反应", ["观望", "有反应"]) is None
    assert predicted_label("结果不高于预期", ["高于预期", "低于预期"]) is None
    assert predicted_label("Answer: BUY", ["BUY", "SELL"]) == "BUY"
    assert predicted_label("answer: apple", ["A", "B"]) is None


def test_a_question_said_again_is_no_answer() -> None:
    question = "不超过±0.05%为中性，否则为利好或利空。首行写“情绪：”。\n快讯：积极的财政政策令人鼓舞"
    assert predicted_label(question, question=question) is None
    assert predicted_label("好的。" + question[:12], question=question, cut=True) is None
    assert predicted_label(question + "\n情绪：利空", question=question) == "利空"
    assert predicted_label("不超过±0.05%为中性，因此为中性", question=question) == "中性"
    row = record(question, "情绪：中性", label="中性")
    assert score(row, question[:12], "length").label is None


def test_expected_answers_score_all_points_and_their_questions_none(in_folder: Path) -> None:
    rows = build_dataset(InstructionSettings(output=in_folder / "rows.jsonl", num_samples=120)).records
    labels = label_sets(rows)
    assert len(labels) == 10
    for row in rows:
        kind = labels[str(row.meta["kind"])]
        good = score(row, row.answer, "stop", kind)
        assert min(good.chrf, good.rouge_l) == pytest.approx(1.0)
        assert {good.label_correct, good.json_valid, good.field_accuracy, good.fields_exact} <= {1.0, None}
        question = row.prompt[-1].content
        for cut in (len(question), 70, 50, 30):
            assert score(row, question[:cut], "length", kind).label is None, question[:cut]


def grams(text: str, size: int) -> Counter[str]:
    return Counter(text[start : start + size] for start in range(len(text) - size + 1))


def reference_chrf(text: str, expected: str) -> float:
    """Popović (2015), over the orders for which both texts have n-grams."""
    shares = []
    for size in range(1, 7):
        mine, wanted = grams("".join(text.split()), size), grams("".join(expected.split()), size)
        if mine and wanted:
            hits = (mine & wanted).total()
            shares.append((hits / mine.total(), hits / wanted.total()))
    precision, recall = (sum(side) / len(shares) for side in zip(*shares, strict=True))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def reference_rouge_l(text: str, expected: str) -> float:
    """Lin (2004), by the textbook's table."""
    one, other = "".join(text.split()), "".join(expected.split())
    table = np.zeros((len(one) + 1, len(other) + 1))
    for i, mine in enumerate(one, start=1):
        for j, wanted in enumerate(other, start=1):
            table[i, j] = table[i - 1, j - 1] + 1 if mine == wanted else max(table[i - 1, j], table[i, j - 1])
    return 2 * float(table[-1, -1]) / (len(one) + len(other))


def test_likeness_is_that_of_the_papers() -> None:
    # By hand: single characters P 1/2, R 1/2; pairs 0; longer ones in neither text.
    assert chrf("甲乙", "甲丙") == pytest.approx(0.25)
    random = np.random.default_rng(0)
    for size in (1, 3, 40, 300):
        text, expected = ("".join(random.choice(list("涨跌持平。0.1% \n金"), size + extra)) for extra in (0, 5))
        if text.strip() and expected.strip():
            assert chrf(text, expected) == pytest.approx(reference_chrf(text, expected), abs=1e-9)
            assert rouge_l(text, expected) == pytest.approx(reference_rouge_l(text, expected), abs=1e-5)
    long = "甲乙丙丁" * 260  # longer than Python recurses
    assert rouge_l(long, long) == pytest.approx(1.0)


def test_likeness_is_one_for_the_same_text_and_none_for_none() -> None:
    text = "情绪：利好。理由：降准释放长期资金约1万亿元。"
    assert chrf(text, text) == pytest.approx(1.0)
    assert rouge_l(text, text) == pytest.approx(1.0)
    for measure in (chrf, rouge_l):
        assert measure("", text) == 0.0
        assert measure("abc", text) == 0.0
        assert 0.0 < measure("情绪：利空。理由：加息。", text) < 1.0
    # By hand: the longest common subsequence of 甲乙丙丁 and 甲丙丁戊己 is 3 characters; P 3/4, R 3/5.
    assert rouge_l("甲乙丙丁", "甲丙丁戊己") == pytest.approx(2 * 0.75 * 0.6 / 1.35, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"指标": "CPI", "公布值": 3.2}', (1.0, 1.0, 1.0)),
        ('{"公布值": "3.20", "指标": "ｃｐｉ "}', (1.0, 1.0, 1.0)),
        ('{"指标": "CPI", "公布值": 3.3}', (1.0, 0.5, 0.0)),
        ('好的：{"指标": "CPI", "公布值": 3.2}。', (0.0, 1.0, 1.0)),
        ('```json\n{"指标": "CPI"}\n```', (0.0, 0.5, 0.0)),
        ('{"指标": "CPI", "公布值": 3.2', (0.0, 0.0, 0.0)),
        ('{"指标": "CPI", "公布值": NaN}', (0.0, 0.5, 0.0)),
        ('{"指标": "CPI", "指标": "PPI", "公布值": 3.2}', (0.0, 0.5, 0.0)),
        ('["CPI", 3.2]', (0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0)),
        ("{" * 5000, (0.0, 0.0, 0.0)),
    ],
)
def test_json_is_valid_alone_and_its_fields_count_anywhere(text: str, scores: tuple[float, float, float]) -> None:
    assert json_scores(text, {"指标": "CPI", "公布值": 3.2}) == scores


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        (3.2, "3.20", True), ("+0.14%", "0.14%", True), ("3.2%", 3.2, False), (None, "", True), (None, 0, False),
        (True, 1, False), ([1, "2"], ["1", 2], True), ({"a": 1}, {"a": "1"}, True), ({"a": 1, "b": 2}, {"a": 1}, False),
        ("1,000", 1000, True), ("1,0", 10, False), ("−3", -3, True), (-3, 3, False), ([], "", False),
    ],
)  # fmt: skip
def test_values_are_the_same_if_they_say_the_same(given: Any, wanted: Any, same: bool) -> None:
    assert same_value(given, wanted) is same


def test_numbers_are_found_without_signs_dates_or_list_marks() -> None:
    text = "1. CPI为３.20%，前值-3.7%\n2、GDP 1,234.5亿元，2026-01-03公布，区间5-7。\n**3.** ④降准"
    plain = {(Decimal(number), False) for number in ("1234.5", "2026", "1", "3", "5", "7")}
    assert numbers_in(text) == plain | {(Decimal("3.2"), True), (Decimal("3.7"), True)}
    assert numbers_in("第一，没有数字") == set()
    assert numbers_in("10,5,3与3，5月") == {(Decimal(number), False) for number in ("10", "5", "3")}


def test_percent_basis_points_and_percentage_points_are_one_unit() -> None:
    quarter = {(Decimal("0.25"), True)}
    assert all(numbers_in(t) == quarter for t in ("0.25%", "０.25 ％", "25个基点", "25bp", "25 BPs", "0.25个百分点"))
    row = record("加息25个基点，15分钟下跌0.15%", "")
    found = score(row, "加息0.25%，下跌0.15，15分钟", "stop")
    assert (found.numbers, found.numbers_supported) == (3, 3)
    wrong = score(row, "下跌15%，加息25个百分点", "stop")
    assert (wrong.numbers, wrong.numbers_supported) == (2, 0)


def test_a_row_is_scored_by_what_it_has() -> None:
    row = record("CPI 前值3.7%，公布3.2%", "情绪：利好。公布值3.2%", label="利好")
    good = score(row, "<think>想</think>情绪：利好，3.2%低于3.70%", "stop")
    assert (good.success, good.label, good.label_correct) == (1.0, "利好", 1.0)
    assert (good.numbers, good.numbers_supported) == (2, 2)
    assert good.json_valid is None
    bad = score(row, "可能是4.5%", "length")
    assert (bad.success, bad.label, bad.label_correct, bad.numbers_supported) == (0.0, None, 0.0, 0)
    assert score(row, "", "stop").success == 0.0


def test_labels_belong_to_a_kind_of_row() -> None:
    rows = [
        record("a", "b", kind="sentiment", label="利好"),
        record("a", "b", kind="risk", label="高"),
        record("a", "b"),
    ]
    assert label_sets(rows) == {"sentiment": sorted(SENTIMENTS), "risk": ["高"], "other": []}


# ------------------------------------------------------------------------------------------------------- intervals


def test_a_mean_and_its_interval_are_those_of_the_textbook() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=400)
    draws = Resampler(range(400), 2000, 0)
    estimate = draws.estimate(draws.ratio(list(values)), [True] * 400)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=half / 8)
    assert estimate.high == pytest.approx(values.mean() + half, abs=half / 8)


def test_rows_of_one_event_are_drawn_together() -> None:
    values = [float(index % 2) for index in range(40) for _ in range(5)]  # 40 events of five equal rows
    apart = Resampler(range(200), 2000, 0)
    together = Resampler([index // 5 for index in range(200)], 2000, 0)
    widths = [
        (found := draws.estimate(draws.ratio(values), [True] * 200)).high - found.low for draws in (apart, together)
    ]
    assert widths[1] / widths[0] == pytest.approx(5**0.5, rel=0.15)


def test_a_difference_is_paired() -> None:
    random = np.random.default_rng(1)
    easy = random.random(100)  # rows differ much, the models by a constant
    draws = Resampler(range(100), 500, 0)
    found = draws.estimate(draws.ratio(list(easy + 0.1)) - draws.ratio(list(easy)), [True] * 100)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_macro_f1_is_that_of_the_definition() -> None:
    wanted = ["利好", "利好", "利空", "中性", None]
    given = ["利好", "利空", "利空", None, "利好"]
    draws = Resampler(range(5), 200, 0)
    # 利好: tp 1, fn 1 -> 2/3; 利空: tp 1, fp 1 -> 2/3; 中性: 0. The row without a label counts for nothing.
    assert draws.macro_f1(given, wanted)[0] == pytest.approx(4 / 9)
    perfect = draws.macro_f1(wanted, wanted)
    assert np.nanmin(perfect) == 1.0  # draws that lack a label are not blamed for it


def test_what_is_not_there_has_no_number() -> None:
    draws = Resampler(range(3), 100, 0)
    assert draws.estimate(draws.ratio([None] * 3), [False] * 3) is None
    assert draws.estimate(draws.ratio([0, 0, 0], [0, 0, 0]), [False] * 3) is None
    one = Resampler(["same"] * 3, 100, 0)
    assert one.estimate(one.ratio([1, 2, 3]), [True] * 3).low is None


def test_only_groups_with_rows_that_count_make_an_interval() -> None:
    draws = Resampler(["a", "a", "a", "b", "c", "c"], 500, 0)
    label = [1.0, 1.0, 1.0, None, None, None]  # three rows of one event, among others' rows without a label
    found = draws.estimate(draws.ratio(label), [value is not None for value in label], (0.0, 1.0))
    assert (found.value, found.low, found.rows) == (1.0, None, 3)
    label[5] = 1.0
    found = draws.estimate(draws.ratio(label), [value is not None for value in label], (0.0, 1.0))
    assert (found.low, found.rows) == (pytest.approx(0.025 ** (1 / 2)), 4)


def test_rows_that_were_answered_at_once_have_one_time() -> None:
    rows = [record(f"快讯{i}", "答") for i in range(8)]
    one = [replace(prediction(row, "答"), batch=0) for row in rows]
    two = [
        replace(item, answer=replace(item.answer, seconds=0.5 + index // 4), batch=index // 4)
        for index, item in enumerate(one)
    ]
    time = summarize(rows, {"base": one, "tuned": one}, 200)
    assert time["systems"]["tuned"]["generation_time_s"]["low"] is None
    assert time["difference"]["generation_time_s"]["low"] is None
    found = summarize(rows, {"tuned": two}, 200)["systems"]["tuned"]["generation_time_s"]
    assert (found["value"], found["low"], found["high"]) == (1.0, 0.5, 1.5)


def test_a_sample_keeps_the_shares_of_kinds() -> None:
    kinds = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    order = {index: str(index) for index in range(100)}
    chosen = spread(kinds, order, 20)
    assert [sum(kinds[index] == kind for index in chosen) for kind in "abc"] == [12, 6, 2]
    assert chosen == sorted(chosen) == spread(kinds, order, 20)


def prediction(row: Record, text: str, finish: str = "stop") -> Prediction:
    return Prediction(Answer(text, finish, 1, len(text), 0.5), score(row, text, finish))


def test_the_summary_puts_base_and_tuned_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        record(f"快讯{i}", f"情绪：{SENTIMENTS[i % 3]}", label=SENTIMENTS[i % 3], kind="sentiment", event_id=i)
        for i in range(12)
    ]
    rows += [record(f"值{i}", f'{{"值": {i}}}', fields={"值": i}, kind="extraction", event_id=i) for i in range(12)]
    base = [prediction(row, "情绪：利好", "length") for row in rows]
    tuned = [prediction(row, row.answer) for row in rows]
    content = summarize(rows, {"base": base, "tuned": tuned}, resamples=300)
    systems = content["systems"]
    # All of twelve: no resample differs, and yet the share is not known to be 100%.
    found = systems["tuned"]["sentiment_accuracy"]
    assert (found["value"], found["high"], found["rows"]) == (1.0, 1.0, 12)
    assert found["low"] == pytest.approx(0.025 ** (1 / 12))
    assert systems["base"]["sentiment_accuracy"]["value"] == pytest.approx(1 / 3)
    assert systems["base"]["sentiment_macro_f1"]["value"] == pytest.approx(0.5 / 3)
    assert systems["base"]["json_valid"]["rows"] == 12
    assert content["difference"]["json_valid"]["low"] == pytest.approx(0.025 ** (1 / 12))
    assert content["summary"]["success_rate"] == 1.0
    assert content["by_kind"]["extraction"]["rows"] == 12
    assert content["by_kind"]["extraction"]["tuned"]["label_accuracy"] is None
    full = {**content, "base_model": "m", "intervals": "95%; clusters"}
    print_results(full)
    out = capsys.readouterr().out
    assert "the tuned model is better: sentiment label right, +66.7 pt" in out
    assert "100.0% [73.5, 100.0]" in out
    same = summarize(rows, {"base": base, "tuned": base}, resamples=300)
    assert verdicts(same) == ["no difference in quality between base and tuned is larger than chance"]
    json.dumps(content, allow_nan=False)


def test_accuracy_stands_beside_that_of_the_commonest_label(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["中性"] * 6 + ["利好"] * 3 + ["利空"]
    rows = [record(f"快讯{i}", f"情绪：{label}", kind="sentiment", label=label) for i, label in enumerate(wanted)]
    rows += [record("风险？", "风险等级：高", kind="risk", label="高"), record("问", "答")]
    right = [prediction(row, row.answer) for row in rows]
    always = [prediction(row, "情绪：中性") for row in rows]
    found = summarize(rows, {"base": always, "tuned": right}, 400)
    assert found["majority"]["labels"] == {"risk": "高", "sentiment": "中性"}
    assert found["majority"]["sentiment_accuracy"]["value"] == pytest.approx(0.6)
    assert found["majority"]["label_accuracy"]["value"] == pytest.approx(7 / 11)
    # F1 of the label that is always said is 2 * 6 / (10 + 6), of the two others 0.
    assert found["majority"]["sentiment_macro_f1"]["value"] == pytest.approx(0.75 / 3)
    gap = found["majority"]["sentiment_macro_f1"]["difference"]
    assert gap["value"] == pytest.approx(0.75)
    assert gap["low"] > 0
    assert found["by_kind"]["sentiment"]["majority"] == {"label": "中性", "share": 0.6}
    assert found["by_kind"]["other"]["majority"] is None
    print_results({"base_model": "x", "intervals": "95%; x", **found})
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("majority class", "中性 60.0%", "above the majority class: sentiment label, macro F1, +75.0 pt"):
        assert words in shown
    # A model that says nothing else is not called better, and rows without labels have no majority.
    same = summarize(rows, {"tuned": always}, 400)
    assert "not surely above" in majority_verdicts(same)[1]
    assert summarize(rows[-1:], {"tuned": right[-1:]}, 100)["majority"] is None


# ------------------------------------------------------------------------------------------------------ held-out rows


def write_rows(path: Path, days: int = 20) -> Path:
    rows = []
    for day in range(days):
        label, news = SENTIMENTS[day % 3], f"快讯{day}：CPI {day}.5%"
        meta = {"event_id": f"e{day}", "date": f"2026-01-{day + 1:02d}"}
        sentiment = {
            "instruction": "判断情绪",
            "input": news,
            "output": f"情绪：{label}\n理由：{day}.5%",
            "label": label,
        }
        extraction = {"instruction": "抽取JSON", "input": news, "output": f'{{"值": "{day}.5%"}}'}
        rows.append({**sentiment, "kind": "sentiment", **meta})
        rows.append({**extraction, "kind": "extraction", "fields": {"值": f"{day}.5%"}, **meta})
    return write_jsonl(path, rows)


def info_of(data: Path, base: Path, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> dict[str, Any]:
    """What training writes about itself, as far as evaluation reads it."""
    parts = split_records(read_records(data), fractions, 7)
    return {
        "base_model": {"path": str(base), "name": base.name},
        "data": {
            "files": [{"path": str(data), "sha256": sha256_of(data), "validation_only": False}],
            "split": {"fractions": list(fractions), "seed": 7, **{name: len(rows) for name, rows in parts.items()}},
            "skipped": {},
        },
    }


@pytest.fixture
def trained(tiny_model: Path, in_folder: Path) -> Path:
    data = write_rows(in_folder / "rows.jsonl")
    return make_adapter(tiny_model, in_folder / "outputs", info=info_of(data, tiny_model))


def test_the_rows_are_those_that_training_kept_aside(trained: Path, in_folder: Path) -> None:
    found = held_out_rows(EvaluateSettings(model_path=trained))
    expected = split_records(read_records(in_folder / "rows.jsonl"), (0.7, 0.1, 0.2), 7)["test"]
    assert [row.row for row in found.records] == [row.row for row in expected]
    assert found.split == "test"
    assert "test rows of" in found.note
    assert min(row.meta["date"] for row in found.records) == "2026-01-17"  # the last days
    fewer = held_out_rows(EvaluateSettings(model_path=trained, num_samples=4))
    assert sorted(str(row.meta["kind"]) for row in fewer.records) == ["extraction"] * 2 + ["sentiment"] * 2
    assert fewer.available == len(expected)


def test_changed_or_missing_training_data_is_refused(trained: Path, in_folder: Path) -> None:
    data = in_folder / "rows.jsonl"
    write_rows(data, days=21)
    with pytest.raises(UserError, match="has changed since"):
        held_out_rows(EvaluateSettings(model_path=trained))
    data.unlink()
    with pytest.raises(UserError, match=r"is not here; give the rows to score: --data"):
        held_out_rows(EvaluateSettings(model_path=trained))
    (trained / "training_info.json").unlink()
    with pytest.raises(UserError, match="--data FILE"):
        held_out_rows(EvaluateSettings(model_path=trained))


def test_training_rows_are_told(trained: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = held_out_rows(EvaluateSettings(model_path=trained, data=[in_folder / "rows.jsonl"]))
    assert len(found.records) == 40
    assert "32 of these 40 rows; add --split test" in capsys.readouterr().err
    held_out_rows(EvaluateSettings(model_path=trained, data=[in_folder / "rows.jsonl"], split="test"))
    assert capsys.readouterr().err == ""
    held_out_rows(EvaluateSettings(model_path=trained, split="train"))
    assert "say nothing about new ones" in capsys.readouterr().err


def test_training_rows_are_told_in_another_file_too(
    trained: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_jsonl(in_folder / "rows.jsonl")
    other = write_jsonl(in_folder / "other.jsonl", [*rows[:3], rows[-1], {"instruction": "新", "output": "答"}])
    settings = EvaluateSettings(model_path=trained, data=[other])
    assert len(held_out_rows(settings).records) == 5
    assert "3 of these 5 rows; leave out --data" in capsys.readouterr().err
    write_rows(in_folder / "rows.jsonl", days=21)
    held_out_rows(settings)
    assert "whether training saw any of these rows is unknown" in capsys.readouterr().err


def test_files_that_were_split_together_are_not_split_apart(
    tiny_model: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_jsonl(write_rows(in_folder / "rows.jsonl"))
    early, late = (write_jsonl(in_folder / f"{n}.jsonl", rows[20 * n : 20 * n + 20]) for n in (0, 1))
    info = info_of(in_folder / "rows.jsonl", tiny_model)
    info["data"]["files"] = [{"path": str(path), "sha256": sha256_of(path)} for path in (early, late)]
    folder = make_adapter(tiny_model, in_folder / "o", info=info)
    # All of the early file trained, so its own last days are no test.
    found = held_out_rows(EvaluateSettings(model_path=folder, data=[early], split="test"))
    assert f"by, {len(found.records)} of these {len(found.records)} rows; leave out --data" in capsys.readouterr().err
    held_out_rows(EvaluateSettings(model_path=folder))
    assert capsys.readouterr().err == ""


def test_without_test_rows_validation_rows_are_taken_and_it_is_said(
    tiny_model: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(in_folder / "rows.jsonl")
    folder = make_adapter(tiny_model, in_folder / "o", info=info_of(data, tiny_model, (0.8, 0.2, 0.0)))
    assert held_out_rows(EvaluateSettings(model_path=folder)).split == "validation"
    assert "kept no test rows" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the script

FAST = {"max_new_tokens": 8, "resamples": 100, "dtype": "float32", "device": "cpu"}


def test_the_script_scores_base_and_tuned(trained: Path, in_folder: Path, run_script: RunScript) -> None:
    flags = [item for name, value in FAST.items() for item in (f"--{name}", str(value))]
    result = run_script("training/evaluate.py", "--model_path", "outputs", *flags, cwd=in_folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "the test rows of" in result.stdout
    assert "By kind of row" in result.stdout
    content = json.loads((trained / "evaluation_results.json").read_text(encoding="utf-8"))
    assert set(content["systems"]) == {"base", "tuned"}
    assert content["data"]["rows"] == 8
    assert {measure.name for measure in MEASURES} == set(content["systems"]["tuned"])
    rows = read_jsonl(trained / "evaluation_predictions.jsonl")
    assert len(rows) == 8
    assert all(row["base"]["answer"] != row["tuned"]["answer"] for row in rows)
    # Scores are of the answers on file.
    chosen = rows[0]
    assert chosen["tuned"]["scores"]["chrf"] == pytest.approx(
        chrf(chosen["tuned"]["answer"].strip(), chosen["expected"])
    )


def test_greedy_scores_are_the_same_each_time_and_whatever_the_batch(trained: Path, in_folder: Path) -> None:
    def run(name: str, batch_size: int) -> list[Any]:
        out = in_folder / name
        evaluate(EvaluateSettings(model_path=trained, output_dir=out, batch_size=batch_size, **FAST))
        rows = read_jsonl(out / "evaluation_predictions.jsonl")
        return [[row[system]["answer"] for system in ("base", "tuned")] for row in rows]

    assert run("a", 3) == run("b", 3) == run("c", 1)


def test_a_fully_tuned_model_stands_beside_the_base_it_began_as(
    tiny_models: dict[str, Path], in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    data = write_rows(in_folder / "rows.jsonl")
    whole = in_folder / "full"
    shutil.copytree(tiny_models["llama"], whole)  # any other model of the family will do
    (whole / "training_info.json").write_text(json.dumps(info_of(data, tiny_models["qwen3"])), encoding="utf-8")
    evaluate(EvaluateSettings(model_path=whole, **FAST))
    content = json.loads((whole / "evaluation_results.json").read_text(encoding="utf-8"))
    assert set(content["systems"]) == {"base", "tuned"}
    assert content["base_model"] == "qwen3"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model_path", "nowhere"], "no adapter folder nowhere"),
        (["--num_samples", "0"], "--num_samples must be at least 1"),
        (["--data", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--tuned_only", "--base_model", ".", "--model_path", "."], "--tuned_only does not"),
        (["--output_dir", "/dev/null/x"], "cannot write into --output_dir /dev/null/x"),
    ],
)
def test_mistakes_are_one_line(trained: Path, in_folder: Path, call_script: RunScript, arguments, words) -> None:
    result = call_script("training/evaluate.py", *arguments, cwd=in_folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert not (trained / "evaluation_results.json").exists()


def test_a_missing_library_is_asked_for_before_the_work() -> None:
    with pytest.raises(UserError, match="scoring needs no-such-thing; install: pip install no-such-thing"):
        check_installed({"json": "json", "no_such_module": "no-such-thing"}, "scoring")


def test_a_row_too_long_costs_itself_alone(trained: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "利好"}]}
        for text in ("央行降准", "长" * 3000, "美联储加息")
    ]
    data = write_jsonl(in_folder / "some.jsonl", rows)
    path = evaluate(EvaluateSettings(model_path=trained, data=[data], max_new_tokens=4, resamples=100, device="cpu"))
    assert json.loads(path.read_text(encoding="utf-8"))["data"]["rows"] == 2
    assert [row["row"] for row in read_jsonl(path.with_name("evaluation_predictions.jsonl"))] == [1, 3]
    said = capsys.readouterr().err
    assert "1 row(s) do not fit the model (base) and are left out" in said
    assert "some.jsonl, row 2: the prompt has" in said


def test_a_stopped_evaluation_goes_on_where_it_was(
    trained: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stocklora.instruct.chat.model import ChatModel

    settings = EvaluateSettings(
        model_path=trained, max_new_tokens=4, batch_size=2, resamples=100, device="cpu", dtype="float32"
    )
    asked: list[int] = []
    answers = ChatModel.answers

    def stopping(self: ChatModel, conversations: Any, **options: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(conversations))
        return answers(self, conversations, **options)

    monkeypatch.setattr(ChatModel, "answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings)
    finished = sum(asked)
    asked[:] = [0] * 4  # no stop any more
    path = evaluate(settings)
    rows = read_jsonl(path.with_name("evaluation_predictions.jsonl"))
    assert sum(asked) == 2 * len(rows) - finished
    assert f"{finished} of {len(rows)} answers of base were made by a run that was stopped" in capsys.readouterr().out
    assert not list(trained.glob("*.partial*"))
    asked[:] = [0] * 4
    evaluate(settings)
    again = read_jsonl(path.with_name("evaluation_predictions.jsonl"))
    assert [[row[name]["answer"] for name in ("base", "tuned")] for row in rows] == [
        [row[name]["answer"] for name in ("base", "tuned")] for row in again
    ]


def test_free_and_constrained_answers_stand_side_by_side(
    tiny_model: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build_dataset(InstructionSettings(num_samples=100)).records
    rows = [record for record in built if record.meta["kind"] in ("extraction", "risk")][:6]
    assert {row.meta["kind"] for row in rows} == {"extraction", "risk"}
    content = [{"messages": [vars(m) | {"calls": None, "call_id": None} for m in r.messages], **r.meta} for r in rows]
    data = write_jsonl(in_folder / "rows.jsonl", content)
    settings = EvaluateSettings(
        model_path=tiny_model, data=[data], max_new_tokens=260, resamples=100, device="cpu", tuned_only=True,
        constrained=True,
    )  # fmt: skip
    found = json.loads(evaluate(replace(settings, output_dir=in_folder / "out")).read_text(encoding="utf-8"))
    held = found["constrained"]
    assert held["rows"] == sum(row.meta["kind"] == "extraction" for row in rows)
    assert held["free"]["json_valid"] == 0.0  # a random model
    assert held["constrained"]["json_valid"] == 1.0
    assert "rows whose answers have a schema" in capsys.readouterr().out
