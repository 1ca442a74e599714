"""Economic releases: previous, consensus and actual as exact numbers with units, and what a surprise usually means.

A release comes from a calendar item (``name``, ``previous``, ``consensus``, ``actual``) or from a flash that reads like
one ("美国3月ADP就业人数 15.5万人，预期11.5万人，前值7.7万人。").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from stocklora.instruct.news.database import NUMBER, Event

COUNTRIES = (
    "美国", "中国香港", "中国台湾", "中国", "英国", "德国", "法国", "意大利", "西班牙", "欧元区", "日本", "韩国",
    "瑞士", "加拿大", "澳大利亚", "新西兰", "印度", "俄罗斯", "巴西", "土耳其",
)  # fmt: skip
CURRENCIES = {
    "美国": "美元", "英国": "英镑", "德国": "欧元", "法国": "欧元", "意大利": "欧元", "西班牙": "欧元",
    "欧元区": "欧元", "日本": "日元", "瑞士": "瑞郎", "加拿大": "加元", "澳大利亚": "澳元",
    "新西兰": "新西兰元", "中国": "人民币",
}  # fmt: skip
ABOVE, BELOW, EQUAL = "高于预期", "低于预期", "符合预期"

UNITS = (
    "%", "万亿元", "亿美元", "亿欧元", "亿日元", "亿英镑", "亿瑞郎", "亿加元", "亿澳元", "亿元", "亿立方英尺", "万桶",
    "万人", "万户", "万千瓦", "万件", "万套", "亿", "万", "口", "点",
)  # fmt: skip
_UNIT = "|".join(UNITS)
VALUE = re.compile(rf"({NUMBER})\s*({_UNIT})?")
FLASH = re.compile(
    rf"^(?P<name>[^，。,；;：:【】]{{4,40}}?)\s*(?:录得|为|公布值)?\s*(?P<actual>{NUMBER}(?:{_UNIT})?)"
    rf"(?:[，,]\s*预期(?:为)?\s*(?P<consensus>{NUMBER}(?:{_UNIT})?))?[，,]\s*前值(?:为|由{NUMBER}(?:{_UNIT})?(?:修正|上修|下修)(?:为|至))?"
    rf"\s*(?P<previous>{NUMBER}(?:{_UNIT})?)。?$"
)
INDEX = re.compile(r"PMI|指数|差值|指标")
# The unit that the agencies leave out of a calendar's numbers; the first pattern that is found decides.
UNIT_OF = (
    (r"利率|年率|月率|季率|同比|环比|增速|失业率|通胀率|占比|通胀预期|比例", "%"),
    (r"GDP总量", "万亿元"),
    (INDEX.pattern, ""),
    (r"外汇储备", "亿美元"),
    (r"天然气库存", "亿立方英尺"),
    (r"原油库存|汽油库存|精炼油库存|石油储备", "万桶"),
    (r"钻井", "口"),
    (r"抵押贷款许可", "万件"),
    (r"新屋|成屋|营建许可", "万户"),
    (r"非农|ADP|初请|续请|就业人数|就业人口|裁员|失业人数|失业总人数", "万人"),
    (r"职位空缺", "万个"),
    (r"装机容量", "万千瓦"),
    (r"^美国.*(贸易帐|经常帐)", "亿美元"),
    (r"^(德国|法国|欧元区).*(贸易帐|经常帐)", "亿欧元"),
    (r"^日本.*(贸易帐|经常帐)", "亿日元"),
    (r"^瑞士.*(贸易帐|经常帐)", "亿瑞郎"),
    (r"^加拿大.*(贸易帐|经常帐)", "亿加元"),
    (r"^英国.*(贸易帐|经常帐|净借款)", "亿英镑"),
    (r"^中国.*(贸易帐|经常帐)", "亿美元"),
)
# (pattern, topic, whether more of it is the stronger reading); what is not here is given without an interpretation
TOPIC_OF = (
    (r"库存", "inventory", True),
    (r"利率决定|目标利率|央行利率", "rate", True),
    (r"贷款市场报价利率|得标利率|占比|石油储备|装机|净借款|供应链|外汇储备|钻井|抵押贷款许可", "", True),
    (r"非农就业基准", "", True),
    (r"CPI|PPI|PCE|通胀|进口物价", "inflation", True),
    (r"失业|初请|续请|裁员", "labour", False),
    (r"非农|ADP|就业|职位空缺", "labour", True),
    (
        r"PMI|GDP|零售销售|零售总额|工业|订单|信心|景气|NFIB|ZEW|商业活动指数|制造业指数|成屋|新屋|房产市场|个人支出|工厂|"
        r"批发销售|服务业|领先指标|制造业产出",
        "activity",
        True,
    ),
)


@dataclass(frozen=True)
class Release:
    """One release; the values share ``unit`` and are exact.

    Attributes:
        name: with country and without the unit, such as ``美国3月ADP就业人数``.
        topic: ``inflation``, ``labour``, ``activity``, ``rate``, ``inventory``, or empty where nothing is said of it.
        higher_is_stronger: False for counts of the unemployed and their like.
    """

    country: str
    name: str
    unit: str
    actual: Decimal
    consensus: Decimal | None
    previous: Decimal | None
    topic: str
    higher_is_stronger: bool

    @property
    def indicator(self) -> str:
        """The name without the country."""
        return self.name.removeprefix(self.country)

    @property
    def decimals(self) -> int:
        """Decimals that show all of its values exactly, and alike."""
        values = [value for value in (self.actual, self.consensus, self.previous) if value is not None]
        return max(max(0, -int(value.normalize().as_tuple().exponent)) for value in values)

    def shown(self, value: Decimal) -> str:
        """``value`` with its unit."""
        return f"{value:.{self.decimals}f}{self.unit}"

    def gap(self, value: Decimal) -> str:
        """How far the actual is from ``value``: ``4.0万人``, ``0.2个百分点``, ``0.7点``."""
        points = "点" if INDEX.search(self.name) else ""  # of an index; of anything else the unit is not known
        unit = {"%": "个百分点", "": points}.get(self.unit, self.unit)
        return f"{abs(self.actual - value):.{self.decimals}f}{unit}"

    @property
    def result(self) -> str | None:
        """高于预期, 低于预期 or 符合预期; None without a consensus."""
        if self.consensus is None:
            return None
        return EQUAL if self.actual == self.consensus else ABOVE if self.actual > self.consensus else BELOW


def release_of(event: Event) -> Release | None:
    """The release that an event is, or None."""
    written, texts = _as_written(event)
    name, unit = _without_unit(written)
    parsed = [_value(text) for text in texts]
    if any(value is None and text is not None for value, text in zip(parsed, texts, strict=True)):
        return None
    actual, consensus, previous = (value and value[0] for value in parsed)
    if actual is None or (consensus is None and previous is None):
        return None
    units = {unit, *(value[1] for value in parsed if value is not None)} - {""}
    if len(units) > 1:  # 1.2亿 beside 9000万: not the same scale
        return None
    unit = next(iter(units), "") or next((u for pattern, u in UNIT_OF if re.search(pattern, name)), "")
    country = next((c for c in COUNTRIES if name.startswith(c)), event.country)
    name = name if name.startswith(country) else country + name  # a question must say what its answer is asked for
    topic, stronger = next(((t, s) for pattern, t, s in TOPIC_OF if re.search(pattern, name)), ("", True))
    return Release(country, name, unit, actual, consensus, previous, topic, stronger)


def _as_written(event: Event) -> tuple[str, tuple[str | None, ...]]:
    """The name, and the texts of actual, consensus and previous; no actual where it is no release."""
    if event.name:
        return event.name, (event.actual, event.consensus, event.previous)
    match = FLASH.match(event.content.strip())
    if match is None or not match["name"].startswith(COUNTRIES):
        return "", (None, None, None)
    return match["name"], match.group("actual", "consensus", "previous")


def _without_unit(name: str) -> tuple[str, str]:
    """``美国10月ADP就业人数(万人)`` -> (``美国10月ADP就业人数``, ``万人``); other brackets stay."""
    name = " ".join(name.split())
    match = re.fullmatch(r"(.+?)\s*[(（](.+?)[)）]", name)
    return (match[1], match[2]) if match and match[2] in UNITS else (name, "")


def _value(text: str | None) -> tuple[Decimal, str] | None:
    match = VALUE.fullmatch(text.strip()) if text else None
    if match is None:
        return None
    try:
        number = Decimal(match[1].replace(",", "").replace("−", "-").replace("+", ""))
    except InvalidOperation:
        return None
    return (number if number else abs(number)), match[2] or ""  # "-0.0" is no number below 0


def meaning(release: Release) -> str:
    """What a surprise of this kind usually means for prices, or nothing where there is no common reading."""
    result, currency = release.result, CURRENCIES.get(release.country)
    if result is None or not release.topic:
        return ""
    if result == EQUAL:
        return "结果与市场预期一致，通常意味着已有定价，新增影响有限。"
    above = result == ABOVE
    if release.topic == "inventory":
        good = next((g for g in ("天然气", "原油", "汽油", "精炼油") if g in release.name), None)
        return f"库存{result}，通常{'利空' if above else '利多'}{good}价格。" if good else ""
    strong, cuts = above == release.higher_is_stronger, ""
    if release.topic == "inflation":
        words, cuts = f"通胀压力{'强' if above else '弱'}于预期", f"降息预期通常随之{'降温' if above else '升温'}，"
        currency = None if release.country == "中国" else currency
    elif release.topic == "rate":
        words, currency = f"利率水平{result}，属于偏{'紧' if above else '松'}的意外", currency or "本币"
    else:
        words = f"{'就业' if release.topic == 'labour' else '经济活动'}表现{'强' if strong else '弱'}于预期"
    if release.country == "美国":
        return f"{words}，{cuts}一般利{'多' if strong else '空'}美元、利{'空' if strong else '多'}黄金。"
    return f"{words}，通常{'支持' if strong else '压制'}{currency}。" if currency else f"{words}。"


def usual_effect_on_gold(release: Release) -> int:
    """+1 or -1 where a surprise in this release usually lifts or weighs on gold, else 0. US data only."""
    read = release.country == "美国" and release.topic in ("inflation", "labour", "activity", "rate")
    if not read or release.result in (None, EQUAL):
        return 0
    return -1 if (release.result == ABOVE) == release.higher_is_stronger else 1
