"""Instruction rows from news: every number and label in an answer is checked against the database by other means."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import sqlite3
import time
from collections import Counter, defaultdict
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_tree import REPO_ROOT

from stocklora.cli.console import UserError
from stocklora.instruct.evaluation.scoring import predicted_label
from stocklora.instruct.news import database as news_database
from stocklora.instruct.news import releases
from stocklora.instruct.news.database import Event, read_events, sample_database
from stocklora.instruct.news.dataset import MAKERS, SHARES, InstructionSettings, build_dataset
from stocklora.instruct.news.questions import subjects_of
from stocklora.instruct.news.reactions import Thresholds
from stocklora.instruct.news.texts import cleaned, first_of_each, fitted, shingles, similarity
from stocklora.instruct.rows.formats import SENTIMENTS, Record
from stocklora.instruct.rows.records import prompt_key
from stocklora.runtime.files import sha256_of

PERCENT = re.compile(r"[+-]?\d+\.\d{2}%")
LIMITS = Thresholds()
MOVES = st.dictionaries(st.sampled_from([5, 15, 30, 60, 120]), st.integers(-400, 400), min_size=1, max_size=5)


def event(moves: dict[int, int], content: str = "某国央行官员发表讲话。", **fields: str) -> Event:
    values = {"name": "", "previous": None, "consensus": None, "actual": None, **fields}
    return Event(
        event_id="e1",
        source="flash",
        day=date(2024, 1, 2),
        country="",
        content=content,
        moves={"XAUUSD": tuple(sorted(moves.items()))},
        **values,  # type: ignore[arg-type]
    )


def answers(item: Event, seed: int = 0, limits: Thresholds = LIMITS) -> dict[str, dict[str, object]]:
    """By kind, the rows that an event gives."""
    subject = subjects_of(item, limits, 15, 160)[0]
    rows = {kind: maker(subject, random.Random(seed)) for share in SHARES for kind, maker in MAKERS[share].items()}
    return {kind: row for kind, row in rows.items() if row is not None}


def bp_of(text: str) -> int:
    return round(float(text.rstrip("%")) * 100)


# -- reactions ---------------------------------------------------------------------------------------------------------


@given(moves=MOVES, seed=st.integers(0, 30))
def test_answers_on_reactions_say_what_the_numbers_say(moves: dict[int, int], seed: int) -> None:
    words = {minutes: "上涨" if bp > 0 else "下跌" if bp < 0 else "持平" for minutes, bp in moves.items()}
    sizes = {minutes: f"{abs(bp) / 100:.2f}%" for minutes, bp in moves.items()}
    shown = {minutes: words[minutes] + (sizes[minutes] if bp else "（0.00%）") for minutes, bp in moves.items()}
    rows = answers(event(moves), seed)
    largest = max(abs(bp) for bp in moves.values())
    for row in rows.values():
        text, output = str(row["input"]), str(row["output"])
        assert all(f"{minutes}分钟{shown[minutes]}" in text for minutes in row["windows"])  # type: ignore[attr-defined]
        # "上涨0.27%" and "下跌0.15%" are returns that happened, each with its sign
        for word, sign in (("上涨", 1), ("下跌", -1)):
            for number in re.findall(rf"{word}(\d+\.\d\d%)", output):
                assert sign * bp_of(number) in moves.values(), output
        # any other percentage is a return, a size of one, or a named threshold
        known = {abs(bp) for bp in moves.values()} | {LIMITS.neutral_bp, LIMITS.medium_risk_bp, LIMITS.high_risk_bp}
        assert {abs(bp_of(number)) for number in PERCENT.findall(output)} <= known, output
    assert ("sentiment" in rows) == (15 in moves) == ("extraction" in rows)
    if 15 in moves:
        bp = moves[15]
        expected = "中性" if abs(bp) <= 5 else "利好" if bp > 0 else "利空"
        assert rows["sentiment"]["label"] == expected
        assert str(rows["sentiment"]["output"]).splitlines()[0] == f"情绪：{expected}"
        fields = json.loads(str(rows["extraction"]["output"]))
        assert fields == rows["extraction"]["fields"]
        assert (fields["方向"], fields["幅度"]) == (words[15], sizes[15])
        assert fields["情绪"] == expected
    assert ("window_sentiment" in rows) == (len(moves) > 1)
    if len(moves) > 1:
        labels = {f"{m}分钟": "中性" if abs(bp) <= 5 else "利好" if bp > 0 else "利空" for m, bp in moves.items()}
        assert json.loads(str(rows["window_sentiment"]["output"])) == rows["window_sentiment"]["fields"] == labels
    assert rows["risk"]["label"] == ("低" if largest < 10 else "中" if largest < 30 else "高")
    assert rows["watch"]["label"] == ("观望" if largest <= 5 else "有反应")


@given(moves=MOVES.filter(lambda moves: len(moves) > 1), seed=st.integers(0, 30))
def test_windows_are_compared_rightly(moves: dict[int, int], seed: int) -> None:
    rows = answers(event(moves), seed)
    ordered = [moves[minutes] for minutes in sorted(moves)]
    if not any(ordered):
        assert "windows" not in rows
        return
    output = str(rows["windows"]["output"])
    largest = max(map(abs, ordered))
    named = [int(minutes) for minutes in re.findall(r"(\d+)分钟(?=、|窗口)", output)]
    assert named
    assert all(abs(moves[minutes]) == largest for minutes in named)
    assert len(named) == sum(abs(bp) == largest for bp in ordered)
    both_ways = min(ordered) < 0 < max(ordered)
    assert ("方向不一致" in output) == both_ways
    change = ordered[-1] - ordered[0]
    if change:
        word = "上行" if change > 0 else "下行"
        assert f"{word}{abs(change) / 100:.2f}个百分点" in output
    else:
        assert "没有变化" in output


@given(first=st.integers(-60, 60), last=st.integers(-60, 60))
def test_priced_in_follows_its_rule(first: int, last: int) -> None:
    row = answers(event({5: first, 30: last}))["priced_in"]
    moved, ended = abs(first) > 5, abs(last) > 5
    if not moved:
        expected = "反应滞后" if ended else "反应平淡"
    elif ended and first * last < 0:
        expected = "预期兑现"
    elif first * last > 0 and abs(last) * 2 > abs(first):
        expected = "走势延续"
    else:
        expected = "部分回吐"
    assert row["label"] == expected
    assert str(row["output"]).startswith(f"判断：{expected}\n")


@given(moves=st.lists(st.integers(-40, 40), min_size=3, max_size=5), seed=st.integers(0, 20))
def test_what_is_said_of_a_pattern_holds_for_the_windows_in_between(moves: list[int], seed: int) -> None:
    """A reader sees them too: nothing was kept that was lost halfway, nothing stayed calm that had moved."""
    row = answers(event(dict(zip((5, 15, 30, 60, 120), moves, strict=False))), seed)["priced_in"]
    text = str(row["output"])
    if row["label"] == "走势延续":
        lost = any(bp * moves[0] <= 0 for bp in moves[1:-1])
        assert ("中途" in text) == lost
        assert ("得以保持" in text or "没有抹去" in text) != lost
    if row["label"] == "反应平淡":
        moved = any(abs(bp) > 5 for bp in moves[1:-1])
        assert ("中途" in text) == moved
        assert ("没有走出" in text or "没有明显反应" in text) != moved


def test_thresholds_are_settable_and_shown_to_the_reader() -> None:
    limits = Thresholds(neutral_bp=20, medium_risk_bp=40, high_risk_bp=80)
    rows = answers(event({15: 20}), limits=limits)
    assert rows["sentiment"]["label"] == "中性"
    assert rows["risk"]["label"] == "低"
    assert all("0.20%" in str(rows[kind]["instruction"]) for kind in ("sentiment", "extraction", "watch"))


# -- releases ----------------------------------------------------------------------------------------------------------

VALUES = st.decimals(-500, 500, places=2)


@given(actual=VALUES, consensus=st.none() | VALUES, previous=st.none() | VALUES, seed=st.integers(0, 20))
def test_answers_on_releases_are_exact(
    actual: Decimal, consensus: Decimal | None, previous: Decimal | None, seed: int
) -> None:
    item = event(
        {15: 12},
        "",
        name="美国5月未季调CPI年率",
        actual=str(actual),
        **{key: str(value) for key, value in (("consensus", consensus), ("previous", previous)) if value is not None},
    )
    rows = answers(item, seed)
    if consensus is None and previous is None:
        assert not {"indicator", "change", "release_extraction"} & set(rows)
        return
    fields = rows["release_extraction"]["fields"]
    assert isinstance(fields, dict)
    for key, value in (("公布值", actual), ("预期值", consensus), ("前值", previous)):
        assert (fields[key] is None) == (value is None)
        if value is not None:
            assert Decimal(fields[key].rstrip("%")) == value
    word = (
        None
        if consensus is None
        else "符合预期"
        if actual == consensus
        else "高于预期"
        if actual > consensus
        else "低于预期"
    )
    assert fields["与预期相比"] == word
    if previous is not None:
        answer = "持平" if actual == previous else "上升" if actual > previous else "下降"
        assert str(rows["change"]["output"]).splitlines()[0] == f"变化：{answer}"
        for gap in re.findall(r"(?:上升|下降)(\d[\d.]*)个百分点", str(rows["change"]["output"])):
            assert Decimal(gap) == abs(actual - previous)
    if previous is not None and consensus is not None:
        output = str(rows["indicator"]["output"])
        assert output.startswith(f"结果：{word}\n")
        gaps = re.findall(r"相差(\d[\d.]*)个百分点", output)
        assert [Decimal(gap) for gap in gaps] == ([] if actual == consensus else [abs(actual - consensus)])
        assert ("利空黄金" in output) == (actual > consensus)  # hotter US inflation: fewer rate cuts
        assert ("利多黄金" in output) == (actual < consensus)
        assert ("一致" in output.rpartition("XAUUSD")[2]) == (actual < consensus)  # gold rose


@pytest.mark.parametrize(
    ("name", "values", "unit", "result"),
    [
        ("美国10月ADP就业人数(万人)", ("4.2", "2.8", "-2.9"), "万人", "高于预期"),
        ("中国11月M2货币供应年率", ("7.1", "7.5%", "7.50%"), "%", "低于预期"),
        ("美国至1月28日美联储利率决定(上限)", ("3.75", "3.75%", "3.75"), "%", "符合预期"),
        ("德国12月制造业PMI终值", ("47", "47.7", "47.7"), "", "低于预期"),
        ("日本11月贸易帐", ("6,253", "5083", "983"), "亿日元", "高于预期"),
    ],
)
def test_units_come_from_the_name_or_the_values(
    name: str, values: tuple[str, str, str], unit: str, result: str
) -> None:
    release = releases.release_of(event({}, "", name=name, actual=values[0], consensus=values[1], previous=values[2]))
    assert release is not None
    assert (release.unit, release.result) == (unit, result)


@pytest.mark.parametrize(
    "values", [("", "1", "1"), ("多云", "1", "1"), ("1", None, None), ("1.2亿", "9000万", "1亿"), ("1%", "2万人", "1%")]
)
def test_what_is_no_release_is_left_alone(values: tuple[str | None, ...]) -> None:
    actual, consensus, previous = values
    item = event({}, "", name="美国5月零售", actual=actual, consensus=consensus, previous=previous)  # type: ignore[arg-type]
    assert releases.release_of(item) is None


def test_a_flash_that_is_a_release_is_read_as_one() -> None:
    release = releases.release_of(event({}, "美国3月ADP就业人数 15.5万人，预期11.5万人，前值7.7万人。"))
    assert release is not None
    assert (release.name, release.unit, release.actual) == ("美国3月ADP就业人数", "万人", Decimal("15.5"))
    assert releases.usual_effect_on_gold(release) == -1
    assert releases.release_of(event({}, "美国总统：失业率只有 4.1%，非常好。")) is None


def test_a_flash_that_corrects_the_value_before_is_read_as_a_release() -> None:
    """Else it stands beside the calendar's item of the same release, in another part."""
    release = releases.release_of(
        event({}, "美国1月季调后非农就业人口 14.3万人，预期17万人，前值由25.6万人修正为30.7万人。")
    )
    assert release is not None
    assert (release.name, release.actual, release.previous) == (
        "美国1月季调后非农就业人口",
        Decimal("14.3"),
        Decimal("30.7"),
    )


@pytest.mark.parametrize("actual", ["0,3%", "0,25%", "1,5", "12,34"])
def test_a_decimal_comma_is_no_thousand(actual: str) -> None:
    """0,3% is 0.3% to some and nothing to others; 3% it is to nobody."""
    item = event({}, "", name="德国5月CPI月率", actual=actual, consensus="0.2%", previous="0.1%")
    assert releases.release_of(item) is None
    assert news_database._number(actual) is None
    assert news_database._number("1,234.5") == 1234.5


def test_a_release_names_its_country_and_only_an_index_has_points() -> None:
    values = {"actual": "1200", "consensus": "900", "previous": "-0.0"}
    item = dataclasses.replace(event({}, "", name="12月 新增贷款\n余额", **values), country="中国")
    rows = answers(item)
    assert "中国12月 新增贷款 余额公布值1200，预期900，前值0。" in str(rows["release_extraction"]["input"])
    assert json.loads(str(rows["release_extraction"]["output"]))["国家"] == "中国"
    assert "相差300；" in str(rows["indicator"]["output"])
    rows = answers(dataclasses.replace(item, name="12月制造业PMI"))
    assert "相差300点；" in str(rows["indicator"]["output"])


def test_a_rate_that_surprises_names_the_direction_it_is_compared_with() -> None:
    values = {"actual": "4.50%", "consensus": "4.25%", "previous": "4.25%"}
    row = answers(event({15: -20}, "", name="美国至1月28日美联储利率决定(上限)", **values))["indicator"]
    assert "利多美元、利空黄金。" in str(row["output"])
    assert str(row["output"]).endswith("与上述常见方向一致。")


def test_us_data_is_said_to_reach_gold_wherever_it_is_asked_about() -> None:
    for name in ("美国6月NAHB房产市场指数", "美国11月成屋签约销售指数月率", "美国1月密歇根大学消费者信心指数终值"):
        rows = answers(event({15: -20}, "", name=name, actual="36", consensus="32", previous="34"))
        assert "利空黄金" in str(rows["indicator"]["output"])
        assert "较为间接" not in str(rows["sentiment"]["output"])
    row = answers(event({15: 0}, "中国人民银行行长出席二十国集团财长和央行行长会议"))["sentiment"]
    assert "没有直接的传导关系" not in str(row["output"])  # that is for companies


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_are_cleaned_and_digests_left_out() -> None:
    assert (
        cleaned("【金价走高】金十数据4月4日讯，现货黄金走高。<br/>点击查看更多>>\u200b") == "【金价走高】现货黄金走高。"
    )
    assert fitted("【早间要闻汇总】1. 甲。2. 乙。3. 丙。", 160) is None
    assert fitted("【某国央行宣布降息二十五个基点】" + "细节。" * 100, 160) == "某国央行宣布降息二十五个基点"
    assert fitted("没有标题。" * 100, 160) is None


def test_near_duplicates_are_found_and_numbers_tell_apart() -> None:
    long = "某国央行周二宣布将基准利率下调二十五个基点，并表示未来将视数据决定政策路径。"
    texts = [long, long.replace("周二", "周三"), "现货黄金站上3350美元。", "现货黄金跌破2870美元。", long + " ", "，。"]
    assert first_of_each(texts, 0.8) == [0, 0, 2, 3, 0, 5]


@pytest.mark.parametrize(("threshold", "cut"), [(0.8, 18), (0.6, 38), (0.4, 58), (0.2, 78)])
def test_near_duplicates_are_found_at_any_threshold(threshold: float, cut: int) -> None:
    """Pairs that share their first part; long bands would pass over most of those that are only a little alike."""
    draw = random.Random(5)
    for _ in range(40):
        whole = "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(102))
        ours, other = shingles(whole), shingles(whole[:-cut])
        assert similarity(ours, other) >= threshold
        assert first_of_each([whole, whole[:-cut]], threshold) == [0, 0]


def test_a_book_among_the_news_does_not_stop_the_clock() -> None:
    started = time.perf_counter()
    assert fitted("【要闻】" + "1. 甲乙丙。" * 200_000, 160) is None
    assert fitted("【某国央行宣布降息】" + "一" * 1_000_000, 160) == "某国央行宣布降息"
    assert time.perf_counter() - started < 10


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> list[Record]:
    return build_dataset(InstructionSettings()).records


def test_the_bundled_database_gives_the_shares_and_the_split(built: list[Record]) -> None:
    assert len(built) == 300
    assert Counter(r.meta["share"] for r in built) == {"news": 180, "market": 60, "earnings": 60}
    assert Counter(r.meta["split"] for r in built) == {"train": 210, "validation": 30, "test": 60}
    assert {r.meta["kind"] for r in built} == {kind for share in SHARES for kind in MAKERS[share]}
    for kind in ("sentiment", "extraction"):
        assert sum(r.meta["kind"] == kind and r.meta["split"] == "test" for r in built) >= 8
    labels = Counter(r.meta["label"] for r in built if r.meta["kind"] == "sentiment")
    assert min(labels[label] for label in SENTIMENTS) >= 10


def test_parts_are_apart_in_time_and_in_text(built: list[Record]) -> None:
    days = {
        part: [r.meta["date"] for r in built if r.meta["split"] == part] for part in ("train", "validation", "test")
    }
    assert max(days["train"]) < min(days["validation"]) <= max(days["validation"]) < min(days["test"])
    assert len({prompt_key(r) for r in built}) == len(built)
    part_of_text: dict[str, str] = {}
    for row in built:
        text = row.prompt[-1].content.split("\n")[1]
        assert part_of_text.setdefault(text, row.meta["split"]) == row.meta["split"]


def test_each_row_leads_back_to_its_event(built: list[Record]) -> None:
    events = {event.event_id: event for event in read_events(None)[0]}
    for row in built:
        origin = events[row.meta["event_id"]]
        assert row.meta["date"] == origin.day.isoformat()
        if row.meta["windows"]:
            moves = dict(origin.moves[row.meta["ticker"]])
            assert row.meta["returns_bp"] == [moves[minutes] for minutes in row.meta["windows"]]


def test_a_release_is_asked_about_once_whatever_moved_after_it() -> None:
    """Gold and silver were measured after it; a question that shows neither is one question."""
    made = build_dataset(InstructionSettings(num_samples=5000)).records
    rows: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for row in made:
        if not row.meta["windows"]:
            rows[row.meta["kind"], row.meta["event_id"]].append(row)
            assert row.meta["ticker"] is None
    assert {kind for kind, _ in rows} >= {"change", "release_extraction"}
    assert max(map(len, rows.values())) == 1


def test_wording_varies(built: list[Record]) -> None:
    for kind in ("sentiment", "extraction", "risk"):
        assert len({r.prompt[-1].content.split("\n")[0] for r in built if r.meta["kind"] == kind}) >= 3


def test_short_answers_are_the_labels_of_the_long_ones(built: list[Record]) -> None:
    short = build_dataset(InstructionSettings(short_answers=True)).records
    assert [r.meta["event_id"] for r in short] == [r.meta["event_id"] for r in built]
    labelled = 0
    for one, other in zip(short, built, strict=True):
        if one.meta.get("label") is None or other.meta["share"] == "earnings":
            assert (one.prompt, one.answer) == (other.prompt, other.answer)
            continue
        labelled += 1
        assert one.answer.split("，")[-1] == other.answer.split("\n")[0]
        assert ("，" in one.answer) == (one.meta["kind"] == "sentiment")
        assert predicted_label(one.answer, [one.meta["label"]]) == one.meta["label"]
        assert one.meta["label"] == other.meta["label"]
        assert "再说" not in one.prompt[0].content
        if one.meta["kind"] == "sentiment":
            assert len(one.prompt[0].content) < len(other.prompt[0].content) - 10
            assert "±0.05%以内" in one.prompt[0].content
        else:
            assert "不写" in one.prompt[0].content
        assert one.meta["input"] == other.meta["input"]
    assert labelled > 80


def test_the_same_seed_gives_the_same_rows_and_another_others(built: list[Record]) -> None:
    assert build_dataset(InstructionSettings()).records == built
    other = build_dataset(InstructionSettings(seed=7)).records
    assert [r.messages for r in other] != [r.messages for r in built]


def test_the_real_shape_of_a_database_is_survived(tmp_path: Path) -> None:
    """Duplicates, NULLs, numbers as text, returns that are none, events without returns, returns without events."""
    path = tmp_path / "n#ews?.db"
    connection = sqlite3.connect(path)
    with sqlite3.connect(sample_database()) as sample:
        for line in sample.iterdump():
            connection.execute(line)
    rows = [
        ("d1", "flash", "2025-02-03 10:00:00", None, None, None, "两国就停火协议的框架达成一致，细节仍待敲定。"),
        ("d2", "flash", "2025-06-20 10:00:00", None, None, None, "两国就停火协议的框架达成一致，细节仍待敲定 。"),
        ("d3", "flash", None, None, None, None, "没有日期的消息。"),
        ("d4", "flash", "2025-02-03", None, None, None, None),
        ("d5", "flash", "not a day", "2025/02/03 11:00:00", None, None, "另一条只有世界时的消息。"),
    ]
    for row in rows:
        connection.execute(
            "INSERT INTO events (event_id,source,ts_local,ts_utc,country,name,content) VALUES (?,?,?,?,?,?,?)", row
        )
    impacts = [
        ("d1", 15, 0.01),
        ("d2", 15, -0.01),
        ("d5", 15, "0.25%"),
        ("gone", 15, 0.01),
        ("d1", 30, None),
        ("d1", 5, 9),
    ]
    for event_id, window, ret in impacts:
        connection.execute("INSERT INTO event_impacts VALUES (?, 'XAUUSD', ?, ?)", (event_id, window, ret))
    connection.commit()
    connection.close()
    made = build_dataset(InstructionSettings(db=path, num_samples=2000))
    assert sum(made.left_out.values()) >= 6
    used = {r.meta["event_id"]: r for r in made.records}
    assert not {"d2", "d3", "d4", "gone"} & set(used)  # d2 repeats d1 on another date
    assert used["d5"].meta["returns_bp"] == [25]
    assert any("no more questions" in note for note in made.notes)


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_the_database_is_never_written_to(journal: str, tmp_path: Path) -> None:
    path = tmp_path / "news.db"
    path.write_bytes(sample_database().read_bytes())
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
    connection.close()
    before, there = sha256_of(path), sorted(tmp_path.iterdir())
    path.chmod(0o444)
    assert build_dataset(InstructionSettings(db=path, num_samples=30)).records
    assert (sha256_of(path), sorted(tmp_path.iterdir())) == (before, there)


def changed(path: Path, *statements: str) -> Path:
    """A copy of the bundled database, changed."""
    path.write_bytes(sample_database().read_bytes())
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.executescript(statement)
    connection.close()
    return path


EVENT_COLUMNS = "event_id, source, ts_local, ts_utc, country, name, content, star, previous, consensus, actual"


@pytest.mark.parametrize(
    "statement",
    [
        f"ALTER TABLE events RENAME TO e; CREATE TABLE events ({EVENT_COLUMNS}, PRIMARY KEY (event_id)) WITHOUT ROWID;"
        "INSERT INTO events SELECT * FROM e",
        "ALTER TABLE events RENAME TO e; CREATE VIEW events AS SELECT * FROM e",
        f"ALTER TABLE events RENAME TO e; CREATE TABLE EVENTS ({EVENT_COLUMNS.upper()});"
        "INSERT INTO events SELECT * FROM e",
    ],
    ids=["without rowid", "a view", "capitals"],
)
def test_the_same_events_in_another_table(statement: str, tmp_path: Path) -> None:
    assert read_events(changed(tmp_path / "news.db", statement)) == read_events(None)


def test_numbers_as_pandas_writes_them(tmp_path: Path) -> None:
    """Ids that are whole numbers in one table and 7.0 in the other, as a column with gaps is written."""
    path = changed(
        tmp_path / "news.db",
        "ALTER TABLE events RENAME TO e; ALTER TABLE event_impacts RENAME TO i;"
        "CREATE TABLE events AS SELECT CAST(substr(event_id, 2) AS INTEGER) AS event_id, source, ts_local, ts_utc,"
        " country, name, content, previous, consensus, actual FROM e;"
        "CREATE TABLE event_impacts AS SELECT CAST(substr(event_id, 2) AS REAL) AS event_id, ticker,"
        " CAST(window_min AS REAL) AS window_min, ret FROM i",
    )
    events, left_out = read_events(path)
    assert not left_out
    assert [item.moves for item in events] == [item.moves for item in read_events(None)[0]]


def test_a_return_given_twice_counts_once(tmp_path: Path) -> None:
    path = changed(
        tmp_path / "news.db",
        "ALTER TABLE event_impacts RENAME TO i; CREATE TABLE event_impacts AS SELECT * FROM i;"
        "INSERT INTO event_impacts SELECT event_id, ticker, window_min, -ret FROM i",
    )
    events, left_out = read_events(path)
    assert [item.moves for item in events] == [item.moves for item in read_events(None)[0]]
    assert left_out == {"return given twice for one window": 502}


@pytest.mark.parametrize(("unit", "factor"), [("percent", 100), ("bp", 10_000)])
def test_returns_that_are_no_fractions_are_told_by_their_unit(unit: str, factor: int, tmp_path: Path) -> None:
    path = changed(tmp_path / "news.db", f"UPDATE event_impacts SET ret = ret * {factor}")
    with pytest.raises(UserError, match=f"moves of .* beyond .*--return_unit {unit}"):
        build_dataset(InstructionSettings(db=path))
    assert read_events(path, unit) == read_events(None)


def test_one_ticker_in_percent_is_found_among_fractions(tmp_path: Path) -> None:
    path = changed(tmp_path / "news.db", "UPDATE event_impacts SET ret = ret * 100 WHERE ticker = 'XAGUSD'")
    with pytest.raises(UserError, match="moves of XAGUSD"):
        read_events(path)
    # A wild market is believed where its user says so.
    events, _ = read_events(path, "fraction")
    assert max(abs(bp) for event in events for moves in event.moves.values() for _, bp in moves) > 1000


def test_a_cell_in_gb18030_is_read_and_one_in_no_encoding_costs_its_row(tmp_path: Path) -> None:
    events, _ = read_events(None)
    first, second = events[0].event_id, events[1].event_id
    path = changed(tmp_path / "news.db")
    with sqlite3.connect(path) as connection:
        for event_id, data in ((first, "黄金上涨".encode("gb18030")), (second, b"\xff\xff\x80")):
            connection.execute("UPDATE events SET content = CAST(? AS TEXT) WHERE event_id = ?", (data, event_id))
    connection.close()
    found, left_out = read_events(path)
    assert {event.event_id: event.content for event in found}[first] == "黄金上涨"
    assert second not in {event.event_id for event in found}
    assert left_out["event with a cell that is neither UTF-8 nor GB18030 text"] == 1


def test_a_database_that_is_cut_short_is_called_so(tmp_path: Path) -> None:
    data = sample_database().read_bytes()
    path = tmp_path / "news.db"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"cut short: {len(data) // 2:,} of its {len(data):,} bytes"):
        read_events(path)


@pytest.mark.parametrize(
    ("written", "day"),
    [
        ("2025-01-03 09:30:00", date(2025, 1, 3)),
        ("2025-01-03T01:30:00.123Z", date(2025, 1, 3)),
        ("2025/1/3 9:30", date(2025, 1, 3)),
        ("2025年1月3日 09:30", date(2025, 1, 3)),
        ("20250103", date(2025, 1, 3)),
        (20250103, date(2025, 1, 3)),
        (1735867800, date(2025, 1, 3)),  # Unix seconds
        ("1735867800.0", date(2025, 1, 3)),
        (1712012300123, date(2024, 4, 1)),  # milliseconds: read as digits it would be a day of 1712
        ("2025-02-30", None),
        ("3/1/2025", None),
        ("", None),
    ],
)
def test_days_as_people_write_them(written: object, day: date | None) -> None:
    assert news_database._day(written) == day


def test_what_another_program_is_writing_is_not_read_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked while it writes; and what it leaves when it dies, half a change and the journal to undo it, is refused."""
    monkeypatch.setattr(news_database, "LOCK_TIMEOUT_S", 0.05)
    path, dead = changed(tmp_path / "news.db"), tmp_path / "dead.db"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA cache_size = 1")  # changes go to the file before the transaction ends
    writer.execute("BEGIN EXCLUSIVE")
    writer.execute("UPDATE events SET content = 'half'")
    with pytest.raises(UserError, match=r"news.db is locked by another program"):
        read_events(path)
    for suffix in ("", "-journal"):
        (tmp_path / f"dead.db{suffix}").write_bytes((tmp_path / f"news.db{suffix}").read_bytes())
    writer.execute("ROLLBACK")
    writer.close()
    with pytest.raises(UserError, match=r"cannot open .*dead.db.*dead.db-journal holds changes"):
        read_events(dead)
    assert read_events(path) == read_events(None)


def test_what_is_left_out_is_called_what_it_is(tmp_path: Path) -> None:
    path = changed(
        tmp_path / "news.db",
        "UPDATE events SET actual = NULL WHERE event_id = (SELECT min(event_id) FROM events WHERE source = 'calendar');"
        "DELETE FROM event_impacts WHERE event_id = (SELECT min(event_id) FROM events WHERE source = 'flash')",
    )
    before, after = build_dataset(InstructionSettings()).left_out, build_dataset(InstructionSettings(db=path)).left_out
    more = after - before
    assert more["calendar item without an actual value, or nothing to compare it with"] == 1
    assert more["news without a return in event_impacts"] == 1
    assert sum(more.values()) == 2


def test_too_little_data_fills_up_or_stops() -> None:
    made = build_dataset(InstructionSettings(num_samples=1500))
    assert any(note.startswith("earnings:") for note in made.notes)
    assert any("filled up" in note for note in made.notes)
    with pytest.raises(UserError, match="too little data"):
        build_dataset(InstructionSettings(num_samples=1500, strict=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_samples": 0}, "--num_samples"),
        ({"shares": [0.5, 0.5]}, "--shares"),
        ({"split": [0.5, 0.6, 0.1]}, "three shares"),
        ({"neutral_band_bp": 40}, "must grow"),
        ({"near_duplicate": 0.0}, "--near_duplicate"),
        ({"output": Path("rows.csv")}, ".jsonl"),
        ({"reference_minutes": 7}, "no return over that window; there are 5, 15, 30, 60"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], says: str) -> None:
    settings = InstructionSettings(**changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=re.escape(says)):
        build_dataset(settings)


def test_a_database_without_the_usual_window_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "hours.db"
    shutil.copy(sample_database(), path)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM event_impacts WHERE window_min = 15")
    made = build_dataset(InstructionSettings(db=path))  # other kinds take over
    assert {"sentiment", "extraction"}.isdisjoint(r.meta["kind"] for r in made.records)
    assert any("it has 5, 30, 60 (--reference_minutes)" in note for note in made.notes)


def test_the_readme_counts_the_bundled_news() -> None:
    events, left_out = read_events(None)
    text = (REPO_ROOT / "data" / "sample" / "README.md").read_text(encoding="utf-8")
    sources = Counter(item.source for item in events)
    assert not left_out
    assert (
        f"{len(events)} news items in Chinese ({sources['flash']} flashes, {sources['calendar']} calendar items" in text
    )
