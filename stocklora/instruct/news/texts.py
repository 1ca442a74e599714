"""Flashes as they go into a question: cleaned, digests and repeats told apart, and what they are about.

What a text is about decides only what is said of how such news reaches a price, never a label. Texts that say the same
in nearly the same words are found by the Jaccard similarity of their three-character shingles.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from stocklora.instruct.news.reactions import NEGATIVE, NEUTRAL, POSITIVE

HEADLINE = re.compile(r"^【(?P<title>[^【】]{4,})】\s*(?P<body>.*)$", re.DOTALL)
SOURCE_LINE = re.compile(r"^(?:金十数据|金十期货|财联社|本报)?\s*(?:\d{1,2}月\d{1,2}日)?\s*(?:讯|电)\s*[，,:：]\s*")
NOISE = re.compile(
    r"<[^<>]{1,80}>|点击查看.{0,12}$|查看更多.{0,4}$|>>+|[\u200b-\u200f\u2028\u2029\ufeff\x00-\x08\x0b-\x1f]"
)
DIGEST = re.compile(
    r"整理[：:]|汇总|要闻速递|一览|重点关注|[①②③]|(?:^|[^\d.])1[.、](?!\d).*[^\d.]2[.、](?!\d)", re.DOTALL
)
DIGEST_WITHIN = 2_000  # characters in which a digest shows itself; the pattern is slow on more

GOLD = "XAUUSD"  # whose usual reaction to news and US data is spoken of
# The first pattern that is found names the topic; the order runs from the most to the least particular.
TOPICS = (
    (
        "recap",
        r"(黄金|白银|铂金|期金|期银|金银|金价|黄金T\+D).{0,30}(日内|涨|跌|关口|现报|新高|失守|站上|反弹|回落)",
    ),
    ("gold", r"黄金|金价|白银|贵金属|SPDR"),
    (
        "recap",
        r"(开盘|收盘|收评|午评|盘前|盘中|主力合约|指数|期货|板块|概念股|基准股|伦铜|伦铝|布油|两油|WTI|布伦特|港股|以太坊|比特币)"
        r".{0,40}(涨|跌|触及|突破|报\d)",
    ),
    (
        "company",
        r"\(\w{1,6}\.[A-Z]{1,3}\)|股份|净利润|科创板|IPO|上市|公告|(?<!国)集团|CEO|董事长|特斯拉|英伟达|苹果公司|华为|证券：",
    ),
    (
        "data",
        r"^(?:【)?美国.{0,20}(CPI|PPI|PCE|非农|失业|初请|GDP|零售|PMI|就业人数|通胀|职位空缺|裁员人数|消费者信心|NFIB|NAHB|成屋|新屋|"
        r"耐用品|工厂订单|个人支出|进口物价|商业活动指数|制造业指数)|GDPNow|劳工统计局",
    ),
    ("rates", r"美联储|FOMC|鲍威尔|降息|加息|利率决议|日本央行|欧洲央行|英国央行|瑞士央行|加拿大央行|澳洲联储"),
    (
        "conflict",
        r"伊朗|以色列|加沙|哈马斯|胡塞|真主党|俄乌|俄罗斯|乌克兰|克里姆林宫|导弹|空袭|停火|战争|宣战|军方|袭击|"
        r"核设施|中东|使馆|国家安全委员会|委内瑞拉",
    ),
    ("tariffs", r"关税|贸易战|贸易协议|经贸磋商|反制"),
    ("oil", r"欧佩克|OPEC|原油|石油|油价|成品油|天然气|钻井"),
)
OPINION = re.compile(r"预计|预测|建议|认为|警告|展望|目标价|可能性")  # of a price: not a report of what it did

# topic -> how such news reaches the gold price
CHANNELS = {
    "gold": ("消息与贵金属市场直接相关，", "这是与黄金供需或仓位直接相关的消息，"),
    "data": ("美国数据经由降息预期影响美元和实际利率，进而影响金价；", "这类数据主要通过利率预期和美元传导至黄金；"),
    "rates": ("央行动向经由利率预期、实际利率和汇率影响金价；", "货币政策消息主要通过实际利率和美元传导至黄金；"),
    "conflict": ("地缘消息主要通过避险需求影响金价；", "地缘局势对黄金的影响主要来自避险买盘的进出；"),
    "tariffs": (
        "关税和贸易消息同时牵动避险需求、通胀与美元预期，方向并不单一；",
        "贸易消息对黄金有避险和美元两条传导路径；",
    ),
    "oil": ("油市消息主要经由通胀预期间接影响金价，传导偏弱；", "能源消息对黄金多为间接影响；"),
}
READINGS = {
    POSITIVE: ("就即时反应看，买盘占优。", "从公布后的走势看，市场的解读对金价偏有利。"),
    NEGATIVE: ("就即时反应看，卖盘占优。", "从公布后的走势看，消息没有给金价带来支撑。"),
    NEUTRAL: ("就即时反应看，多空基本平衡。", "从公布后的走势看，市场可能已有预期，或仍在等待更多线索。"),
}
RECAPS = (
    "该快讯描述的是已经发生的行情，本身不是新的基本面信息，其后的变动更多反映既有走势的延续或修正。",
    "这是一条行情播报，不含新的驱动因素，不宜把其后的变动看作它引起的结果。",
)
UNRELATED = {
    POSITIVE: ("消息与黄金没有直接的传导关系，同期上涨更可能来自其他因素，不宜归因于它。",),
    NEGATIVE: ("消息与黄金没有直接的传导关系，同期下跌更可能来自其他因素，不宜归因于它。",),
    NEUTRAL: ("消息与黄金没有直接的传导关系，价格没有明显反应也在情理之中。",),
}
DISTANT = {
    POSITIVE: ("消息与黄金的联系较为间接，短时窗口内的上涨也可能来自其他因素，归因需谨慎。",),
    NEGATIVE: ("消息与黄金的联系较为间接，短时窗口内的下跌也可能来自其他因素，归因需谨慎。",),
    NEUTRAL: ("消息与黄金的联系较为间接，市场没有给出明显反应。",),
}
OTHER_MARKETS = {
    POSITIVE: ("公布后买盘占优，但短时窗口内也可能叠加其他消息。",),
    NEGATIVE: ("公布后卖盘占优，但短时窗口内也可能叠加其他消息。",),
    NEUTRAL: ("公布后多空基本平衡，市场没有给出方向。",),
}


def cleaned(content: str) -> str:
    """``content`` without mark-up, invitations to click, invisible characters and the agency's date line."""
    text = NOISE.sub("", content.replace("\u00a0", " "))
    match = HEADLINE.match(text.strip())
    title, body = (match["title"].strip(), match["body"]) if match else ("", text)
    body = " ".join(SOURCE_LINE.sub("", body.strip()).split())
    return f"【{' '.join(title.split())}】{body}" if title else body


def fitted(content: str, most_characters: int) -> str | None:
    """The text for a question: whole, or its headline where it is too long; None for digests and what does not fit."""
    text = cleaned(content)
    if not text or DIGEST.search(text[:DIGEST_WITHIN]):
        return None
    if len(text) <= most_characters:
        return text
    match = HEADLINE.match(text)
    title = match["title"] if match else ""
    return title if 0 < len(title) <= most_characters else None


def topic_of(text: str) -> str:
    """One of the names in ``TOPICS``, or ``other``."""
    is_opinion = bool(OPINION.search(text))
    matching = (name for name, found in TOPICS if not (name == "recap" and is_opinion) and re.search(found, text))
    return next(matching, "other")


def remarks(text: str, ticker: str, label: str) -> list[str]:
    """What can be said of how this news reaches this price, given that the price moved as ``label`` says."""
    if ticker != GOLD:
        return list(OTHER_MARKETS[label])
    topic = topic_of(text)
    if topic == "recap":
        return list(RECAPS)
    if topic not in CHANNELS:
        return list((UNRELATED if topic == "company" else DISTANT)[label])
    return [channel + reading for channel in CHANNELS[topic] for reading in READINGS[label]]


# ------------------------------------------------------------------------------------------------ near duplicates

SHINGLE = 3
NOTHING = -1  # the only shingle of a text without any


def folded(text: str) -> str:
    """``text`` without case, width, white space and punctuation: what makes two spellings one."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if unicodedata.category(c)[0] in "LNS" or c in "%.-+")


def shingles(text: str) -> frozenset[int]:
    text = folded(text)
    size = max(1, min(SHINGLE, len(text)))
    return frozenset(zlib.crc32(text[i : i + size].encode()) for i in range(len(text) - size + 1))


def similarity(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard similarity, 0 to 1."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


def first_of_each(texts: Sequence[str], threshold: float) -> list[int]:
    """For every text the index of the earliest one that it repeats, or its own index.

    Args:
        threshold: similarity from which two texts are one; 1 finds those with the same shingles only.
    """
    first = list(range(len(texts)))
    sets = [shingles(text) for text in texts]
    frequency = Counter(member for members in sets for member in members)
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for index, members in enumerate(sets):
        # Two texts this alike share at least one of so many of their rarest shingles (prefix filtering, Chaudhuri et
        # al. 2006), so that few pairs need be compared and none is missed.
        some = len(members) - math.ceil(threshold * len(members) - 1e-9) + 1
        rarest = sorted(members, key=lambda member: (frequency[member], member))[:some] or [NOTHING]
        candidates = sorted({earlier for member in rarest for earlier in holders[member]})
        first[index] = next((i for i in candidates if similarity(members, sets[i]) >= threshold), index)
        if first[index] == index:  # only texts that stay are compared with: chains of small changes do not run on
            for member in rarest:
                holders[member].append(index)
    return first
