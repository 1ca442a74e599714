"""Questions on economic releases: read together, extracted, compared with the value before.

The makers are of the same shape as those in ``reaction_questions.py``.
"""

from __future__ import annotations

import random

from stocklora.instruct.news import reactions as price
from stocklora.instruct.news import releases
from stocklora.instruct.news.questions import Row, Subject, as_json, band_of, row_of_fields, sentence

GOLD_TICKER = "XAUUSD"  # whose usual reaction to US data is spoken of


def make_indicator(subject: Subject, rng: random.Random) -> Row | None:
    """Previous, consensus and actual read together, what it usually means, and the measured reaction, if any."""
    release = subject.release
    if release is None or release.result is None or release.previous is None:
        return None
    result, consensus, previous = release.result, release.consensus, release.previous
    if consensus is None:
        return None
    shown = release.shown
    if result == releases.EQUAL:
        against = f"公布值{shown(release.actual)}，与预期一致"
    else:
        against = f"公布值{shown(release.actual)}，{result[:2]}预期的{shown(consensus)}，相差{release.gap(consensus)}"
    if release.actual == previous:
        than = f"与前值{shown(previous)}持平"
    else:
        than = f"较前值{shown(previous)}{'上升' if release.actual > previous else '下降'}{release.gap(previous)}"
    output = f"结果：{result}\n解读：{against}；{than}。"
    if "PMI" in release.name and not release.unit:
        place = "等于" if release.actual == 50 else "高于" if release.actual > 50 else "低于"
        output += f"读数{place}50的荣枯线。" if release.actual == 50 else (
            f"读数{place}50的荣枯线，处于{'扩张' if release.actual > 50 else '收缩'}区间。"
        )  # fmt: skip
    output += releases.meaning(release)
    extra = sentence(release)
    windows: tuple[price.Move, ...] = ()
    reference = subject.reference
    if reference is not None and subject.ticker:
        minutes, bp = reference
        windows = (reference,)
        extra += f"\n公布后表现：{price.named(subject.ticker)}，{price.listed(windows)}"
        output += f"公布后{minutes}分钟{subject.ticker}{price.moved(bp)}，"
        output += _compared(price.sentiment(bp, subject.limits), releases.usual_effect_on_gold(release), subject)
    instruction = rng.choice((
        "解读这项数据：与预期、前值相比如何，通常有什么影响？",
        "请根据前值、预期值和公布值点评这项数据。",
        "这项数据高于还是低于预期？请结合前值说明。",
    )) + "首行写“结果：”加高于预期、低于预期或符合预期。"  # fmt: skip
    return row_of_fields(instruction, extra, output, windows, label=result, indicator=release.name)


def _compared(label: str, usual: int, subject: Subject) -> str:
    """How the measured move stands to the usual reading; careful where there is none."""
    if label == price.NEUTRAL:
        return f"幅度不超过{band_of(subject.limits)}，数据对价格的短时影响不明显。"
    if usual == 0 or subject.ticker != GOLD_TICKER:
        return "这一变动未必由该数据引起。"
    agrees = (label == price.POSITIVE) == (usual > 0)
    return "与上述常见方向一致。" if agrees else "与上述常见方向相反，当时可能另有因素主导。"


def make_release_extraction(subject: Subject, rng: random.Random) -> Row | None:
    """A release's sentence as JSON."""
    release = subject.release
    if release is None or not release.country:
        return None
    fields = {
        "国家": release.country, "指标": release.indicator, "公布值": release.shown(release.actual),
        "预期值": None if release.consensus is None else release.shown(release.consensus),
        "前值": None if release.previous is None else release.shown(release.previous),
        "与预期相比": release.result,
    }  # fmt: skip
    instruction = rng.choice((
        "从数据快讯中提取JSON：国家、指标、公布值、预期值、前值、与预期相比。只输出JSON，没有的填null。",
        "把这条经济数据整理成JSON，字段：国家、指标、公布值、预期值、前值、与预期相比；缺少的填null。只输出JSON。",
    ))  # fmt: skip
    return row_of_fields(instruction, sentence(release), as_json(fields), fields=fields, indicator=release.name)


def make_change(subject: Subject, rng: random.Random) -> Row | None:
    """The actual against the previous value alone."""
    release = subject.release
    if release is None or release.previous is None:
        return None
    previous, shown = release.previous, release.shown
    change = release.actual - previous
    answer = "持平" if change == 0 else "上升" if change > 0 else "下降"
    if change == 0:
        facts = f"公布值{shown(release.actual)}，与前值相同。"
    else:
        facts = f"公布值{shown(release.actual)}，前值{shown(previous)}，{answer}{release.gap(previous)}。"
    if release.topic == "labour" and change:
        weak = (change > 0) != release.higher_is_stronger
        facts += f"就业数据较上期{'走弱' if weak else '走强'}。"
    instruction = rng.choice((
        f"{release.name}较前值是上升、下降还是持平？变化多少？",
        f"与前值相比，{release.name}有何变化？",
    )) + "首行写“变化：”加上升、下降或持平。"  # fmt: skip
    extra = f"公布值：{shown(release.actual)}；前值：{shown(previous)}"
    return row_of_fields(instruction, extra, f"变化：{answer}\n说明：{facts}", label=answer, indicator=release.name)
