"""Questions on how a price reacted to news, and on economic releases; each answer follows from what its question shows.

A maker takes a subject and returns the row's fields (``instruction``, ``input``, ``output`` and what scores them), or
None where the event does not carry that question. Wording is drawn from ``rng``; labels and numbers are not.
"""

from __future__ import annotations

import json
import random

from stocklora.instruct.news import reactions as price
from stocklora.instruct.news import releases
from stocklora.instruct.news.questions import Row, Subject, about_reaction, for_label, row_of_fields, sentence
from stocklora.instruct.news.texts import GOLD, remarks


def make_sentiment(subject: Subject, rng: random.Random) -> Row | None:
    """情绪 of the reference window, and why."""
    reference, news = subject.reference, subject.news
    if reference is None or news is None:
        return None
    minutes, bp = reference
    label, band, ticker = price.sentiment(bp, subject.limits), subject.band, subject.ticker
    instruction = rng.choice((
        f"按公布后{minutes}分钟的涨跌幅判断消息对{ticker}的情绪，不超过±{band}为中性。",
        f"这条消息对{ticker}是利好、利空还是中性？以{minutes}分钟涨跌幅为准，±{band}以内（含）为中性。",
        f"阅读快讯和行情，给出{ticker}的情绪{'' if subject.short else '和理由'}："
        f"{minutes}分钟涨跌幅不超过±{band}为中性，否则为利好或利空。",
    ))  # fmt: skip
    asks_for_reason = "" if "和理由：" in instruction else "，再说理由"
    moved = price.moved(bp)
    if label == price.NEUTRAL:
        reason = rng.choice((
            f"公布后{minutes}分钟，{ticker}{moved}，没有超出±{band}的中性区间。",
            f"{ticker}在公布后{minutes}分钟内{moved}，幅度不大于{band}，方向不明确。",
        ))  # fmt: skip
    else:
        reason = rng.choice((
            f"公布后{minutes}分钟，{ticker}{moved}，幅度大于{band}的中性界限。",
            f"{ticker}在公布后{minutes}分钟{moved}，已超出±{band}的中性区间。",
        ))  # fmt: skip
    reason += rng.choice(remarks(news, ticker, label))
    return for_label(
        subject, rng, (reference,), instruction, "情绪", label, reason,
        reason_name="理由", asks_for_reason=asks_for_reason,
        short_instruction=rng.choice((
            f"{ticker}的情绪？±{band}以内为中性。",
            f"利好、利空还是中性？±{band}以内为中性。",
            f"按{minutes}分钟涨跌幅判断情绪，±{band}以内为中性。",
        )),
        short_evidence=f"{moved}，",
    )  # fmt: skip


def make_window_sentiment(subject: Subject, rng: random.Random) -> Row | None:
    """情绪 of every window as JSON: several labels of one news item, each of its own return."""
    moves = subject.moves
    if len(moves) < 2 or subject.news is None:
        return None
    band = subject.band
    fields = {f"{minutes}分钟": price.sentiment(bp, subject.limits) for minutes, bp in moves}
    instruction = rng.choice((
        f"用JSON写出各窗口的情绪，不超过±{band}为中性。",
        f"各窗口对{subject.ticker}是利好、利空还是中性？±{band}以内（含）为中性，用JSON回答。",
        f"按每个窗口的涨跌幅判断情绪，±{band}以内为中性，只输出JSON。",
    ))  # fmt: skip
    return about_reaction(subject, rng, moves, instruction, json.dumps(fields, ensure_ascii=False), fields=fields)


def make_extraction(subject: Subject, rng: random.Random) -> Row | None:
    """The reaction as JSON."""
    reference = subject.reference
    if reference is None or subject.news is None:
        return None
    minutes, bp = reference
    band = subject.band
    fields = {
        "标的": subject.ticker, "窗口": f"{minutes}分钟", "方向": price.direction(bp),
        "幅度": price.percent(bp, signed=False), "情绪": price.sentiment(bp, subject.limits),
    }  # fmt: skip
    instruction = rng.choice((
        f"从快讯和行情中提取JSON：标的、窗口、方向、幅度、情绪（幅度不超过{band}为中性）。只输出JSON。",
        f"把市场反应整理成JSON，字段：标的、窗口、方向、幅度、情绪。±{band}以内（含）情绪为中性。只输出JSON。",
        f"用JSON表示市场反应（标的、窗口、方向、幅度、情绪），不要输出其他内容；幅度不超过{band}时情绪为中性。",
    ))  # fmt: skip
    output = json.dumps(fields, ensure_ascii=False)
    return about_reaction(subject, rng, (reference,), instruction, output, fields=fields)


def make_windows(subject: Subject, rng: random.Random) -> Row | None:
    """Several windows compared: the largest, the direction, the change from first to last."""
    moves = subject.moves
    if len(moves) < 2 or subject.news is None or not any(bp for _, bp in moves):
        return None
    (first_minutes, first), (last_minutes, last) = moves[0], moves[-1]
    minutes, bp = price.largest(moves)
    ties = [f"{window}分钟" for window, move in moves if abs(move) == abs(bp)]
    if len(ties) > 1:
        sentences = [f"{'、'.join(ties)}窗口的幅度相同，均为{price.percent(bp, signed=False)}，是各窗口中最大的。"]
    else:
        most = (
            f"幅度最大的是{minutes}分钟窗口，{subject.ticker}{price.moved(bp)}。",
            f"{subject.ticker}在{minutes}分钟窗口变动最大，{price.moved(bp)}。",
        )
        sentences = [rng.choice(most)]
    signs = {(move > 0) - (move < 0) for _, move in moves}
    if {1, -1} <= signs:
        sentences.append("各窗口方向不一致，既有上涨也有下跌。")
    elif 0 in signs:
        up = "上涨" if 1 in signs else "下跌"
        sentences.append(f"有窗口持平，其余窗口均为{up}，没有出现方向相反的情况。")
    else:
        sentences.append(f"各窗口方向一致，均为{price.direction(bp)}。")
    change = last - first
    if change == 0:
        sentences.append(f"从{first_minutes}分钟到{last_minutes}分钟，累计涨跌幅没有变化，均为{price.percent(last)}。")
    else:
        step = f"{'上行' if change > 0 else '下行'}{price.points(change)}"
        words = f"由{price.percent(first)}变为{price.percent(last)}，{step}"
        sentences.append(f"从{first_minutes}分钟到{last_minutes}分钟，累计涨跌幅{words}。")
    instruction = rng.choice((
        f"比较{subject.ticker}在各时间窗口的表现：哪个幅度最大，方向是否一致，首尾变化多少？",
        f"下面是{subject.ticker}在多个窗口的累计涨跌幅，请比较短窗口与长窗口的差别。",
        f"对比不同时间窗口的行情反应，指出{subject.ticker}的最大波动、方向一致性和首尾差异。",
    ))  # fmt: skip
    return about_reaction(subject, rng, moves, instruction, "".join(sentences))


PATTERN_WORDS = {
    price.REVERSED: (
        "最初的反应被后来的走势反转，符合“预期兑现”的特征，追随第一反应的风险较高。",
        "初始方向没有守住且已经反向，符合“预期兑现”的特征，但单凭价格不能断定原因。",
    ),
    price.EXTENDED: (
        "初始方向得以保持，消息在公布前看来没有被充分计价。",
        "后续走势没有抹去最初的反应，市场仍在消化这一信息。",
    ),
    price.FADED: (
        "最初的反应已回吐一半以上，说明第一反应有过度的成分。",
        "初始波动至少有一半没有守住，消息的影响在减弱。",
    ),
    price.LATE: (
        "公布之初反应平平，方向在之后才出现，也可能来自后续的其他因素。",
        "价格起初没有表态，后来才走出中性区间，归因需要谨慎。",
    ),
    price.FLAT: (
        "首尾两个窗口都没有走出中性区间，消息或已被提前计价，或影响有限。",
        "价格首尾都没有明显反应，市场很可能已有预期，或并不看重这条消息。",
    ),
}
# What the windows in between took back, or did, which the first and the last alone do not show.
PATTERN_BETWEEN = {
    price.EXTENDED: (
        "首尾方向一致，但中途一度回到起点或转向，追随时要留意反复。",
        "从首尾看初始方向仍在，不过中途曾被完全抹去，走势并不稳固。",
    ),
    price.FLAT: (
        "首尾都在中性区间内，中途虽有波动，但未能保持。",
        "中途曾走出中性区间，最后又回到其中，这一反应没有留下来。",
    ),
}


def make_priced_in(subject: Subject, rng: random.Random) -> Row | None:
    """Priced in or not, by how the last window stands to the first."""
    moves = subject.moves
    if len(moves) < 2 or subject.news is None:
        return None
    label, band = price.pattern(moves, subject.limits), subject.band
    (first_minutes, first), (last_minutes, last) = moves[0], moves[-1]
    instruction = rng.choice((
        f"消息是否已被提前计价？按首尾两个窗口给{subject.ticker}的走势归类，不超过±{band}为静，否则为动：",
        f"按最短和最长窗口给{subject.ticker}的反应归类，±{band}以内（含）为静，超出为动：",
    )) + (
        "首静尾静为反应平淡，首静尾动为反应滞后；首动时，尾反向且为动是预期兑现，尾同向且大于首的一半是走势延续，"
        "其余是部分回吐。"
    )  # fmt: skip
    facts = rng.choice((
        f"{subject.ticker}在{first_minutes}分钟时{price.moved(first)}，到{last_minutes}分钟时累计{price.moved(last)}。",
        f"公布后{first_minutes}分钟{subject.ticker}{price.moved(first)}，{last_minutes}分钟累计{price.moved(last)}。",
    ))  # fmt: skip
    between = [bp for _, bp in moves[1:-1]]
    unsteady = {
        price.EXTENDED: any(bp * first <= 0 for bp in between),
        price.FLAT: any(abs(bp) > subject.limits.neutral_bp for bp in between),
    }
    words = (PATTERN_BETWEEN if unsteady.get(label) else PATTERN_WORDS)[label]
    return for_label(subject, rng, moves, instruction, "判断", label, facts + rng.choice(words))


def make_watch(subject: Subject, rng: random.Random) -> Row | None:
    """Wait and see, or a reaction."""
    if not subject.moves or subject.news is None:
        return None
    label, band = price.stance(subject.moves, subject.limits), subject.band
    minutes, bp = price.largest(subject.moves)
    instruction = rng.choice((
        f"{subject.ticker}对这条消息是观望还是已有反应？各窗口都不超过±{band}为观望。",
        f"判断{subject.ticker}是否出现观望信号：各窗口都在±{band}以内（含）为观望，否则为有反应。",
    ))  # fmt: skip
    if label == price.WAITING:
        facts = f"各窗口中最大的变动出现在{minutes}分钟，{subject.ticker}{price.moved(bp)}，没有超出±{band}。"
        if not bp:
            facts = f"{subject.ticker}在所给窗口内{price.moved(bp)}，没有超出±{band}。"
        words = rng.choice((
            "市场以观望为主，等待更多线索比跟随这条消息更稳妥。", "资金没有表态，单凭这条消息不足以建立方向性判断。",
        ))  # fmt: skip
    else:
        facts = f"变动最大的是{minutes}分钟窗口，{subject.ticker}{price.moved(bp)}，超出±{band}。"
        words = rng.choice((
            "价格已经作出反应，但短时走势不等于趋势，仍需结合后续信息。",
            "价格已有反应，后续要看这一变动能否保持。",
        ))  # fmt: skip
    return for_label(subject, rng, subject.moves, instruction, "信号", label, facts + words)


RISK_WORDS = {
    "低": ("短时波动有限，按常规仓位管理即可。", "价格波动很小，消息面带来的短线风险不高。"),
    "中": ("波动已高于平静时段，短线参与宜控制仓位并设好止损。", "短时波动不小，建议等价格企稳后再评估。"),
    "高": (
        "短时波动剧烈，点差和滑点都可能扩大，应降低杠杆、避免追单。",
        "波动幅度很大，止损可能无法按预设价格成交，宜先控制风险。",
    ),
}


def make_risk(subject: Subject, rng: random.Random) -> Row | None:
    """The short-term risk level by the largest move."""
    if not subject.moves or subject.news is None:
        return None
    limits = subject.limits
    label, (minutes, bp) = price.risk(subject.moves, limits), price.largest(subject.moves)
    medium, high = (price.percent(limit, signed=False) for limit in (limits.medium_risk_bp, limits.high_risk_bp))
    instruction = rng.choice((
        f"评定{subject.ticker}的短线风险等级：最大涨跌幅低于{medium}为低，达到{medium}为中，达到{high}为高。",
        f"按各窗口的最大波动给出{subject.ticker}的短线风险{'' if subject.short else '和操作提示'}"
        f"（达到{medium}为中，达到{high}为高）。",
        f"这条消息公布后{subject.ticker}的短线风险有多大？最大波动{medium}以下为低，{high}及以上为高，其间为中。",
    ))  # fmt: skip
    bound = {"低": f"低于{medium}", "中": f"达到{medium}而低于{high}", "高": f"达到{high}"}[label]
    place = f"最大变动出现在{minutes}分钟窗口，" if bp else "所给窗口内"
    reason = f"{place}{subject.ticker}{price.moved(bp)}，{bound}。" + rng.choice(RISK_WORDS[label])
    return for_label(subject, rng, subject.moves, instruction, "风险等级", label, reason, asks_for_reason="")


# ------------------------------------------------------------------------------------------------------- releases


def make_indicator(subject: Subject, rng: random.Random) -> Row | None:
    """Previous, consensus and actual read together, what it usually means, and the measured reaction, if any."""
    release = subject.release
    if release is None or release.result is None or release.consensus is None or release.previous is None:
        return None
    result, consensus, previous, shown = release.result, release.consensus, release.previous, release.shown
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
        place, phase = ("高于", "，处于扩张区间") if release.actual > 50 else ("低于", "，处于收缩区间")
        output += "读数等于50的荣枯线。" if release.actual == 50 else f"读数{place}50的荣枯线{phase}。"
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
        return f"幅度不超过{subject.band}，数据对价格的短时影响不明显。"
    if usual == 0 or subject.ticker != GOLD:
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
    return row_of_fields(
        instruction, sentence(release), json.dumps(fields, ensure_ascii=False), fields=fields, indicator=release.name
    )


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
