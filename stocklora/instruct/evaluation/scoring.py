"""How good one answer is: likeness to the expected one, sentiment label, JSON fields, numbers with a source."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from stocklora.cli.settings import parse_json
from stocklora.instruct.chat.text_stream import UNFINISHED, without_reasoning
from stocklora.instruct.evaluation.measures import SENTIMENTS, Scores, wanted_label
from stocklora.instruct.rows.formats import Record

# What models say that were not taught our words; a base model is not to lose for its choice of words.
LABEL_WORDS = {
    "利好": ("利好", "正面", "积极", "看多", "偏多", "positive", "bullish"),
    "利空": ("利空", "负面", "消极", "看空", "偏空", "negative", "bearish"),
    "中性": ("中性", "中立", "neutral"),
}
# A line that begins so talks about the question or gives reasons, in which labels are no answer.
TALK = "分析|解释|解读|[^:\n]*(?:理由|原因|说明|依据|快讯|消息|新闻|资讯|reason|news)"
HEAD = rf"(?m)^[\W_]{{0,4}}(?!{TALK})[\u4e00-\u9fffa-z ]{{1,10}}[\W_]{{0,3}}:[\s\"'“”*【\[]*"
SAID = (
    r"(?:情绪|倾向|判断|结论|影响|标签|评级|等级|风险|信号|结果|变化|sentiment|label)"
    r"\s*(?:判断|倾向|方向|分析)?\s*(?:为|是|is|属于|:)+[\s\"'“”*【\[]*"
)
TAIL = "(?:等|级|风险)*"  # of a label of one character: 中, 中等, 中等风险
NOT = r"(?:不(?:是|为|算|属于|构成|能算|代表|意味着)?|非|没|未|无|\bnot?\b|n't)\s*(?:an?\s)?[\"'“”*【\[]*"
OR = "(?:[、/,|]|或者?|还是|和|与|及|or|and)?"
CLAUSE_END = re.compile(r"[\n。？！；，?!;,]")
LEAST_ECHO = 6  # characters of the question that are not said again by chance
LIST_MARK = re.compile(r"^[\s*#>]*[(（]?\d{1,2}[.、)）](?!\d)", re.MULTILINE)
CIRCLED = re.compile("[①-⒛]")  # numbers of a list, which NFKC would make digits
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
NUMBER = re.compile(rf"({DIGITS})\s*(%|个?百分点|个?基点|bps?(?![a-z]))?", re.IGNORECASE)
PLAIN_NUMBER = re.compile(rf"([-+]?{DIGITS})(%?)")


def score(record: Record, text: str, finish: str, labels: Sequence[str] = SENTIMENTS) -> Scores:
    """Score the answer ``text``, which ended as ``finish`` says (see ``chat.Answer``).

    Args:
        labels: those that there are for rows of this kind.
    """
    text = without_reasoning(text)
    expected = record.answer.strip()
    wanted, fields = wanted_label(record), record.meta.get("fields")
    question = "\n".join(message.content for message in record.prompt)
    label = None if wanted is None else predicted_label(text, labels, question, cut=finish != "stop")
    shares = json_scores(text, fields) if isinstance(fields, Mapping) and fields else (None, None, None)
    said, asked = numbers_in(text), numbers_in(question)
    return Scores(
        success=float(bool(text) and finish == "stop"),
        chrf=chrf(text, expected),
        rouge_l=rouge_l(text, expected),
        label=label,
        label_correct=None if wanted is None else float(label == wanted),
        json_valid=shares[0],
        field_accuracy=shares[1],
        fields_exact=shares[2],
        numbers=len(said),
        numbers_supported=sum(number in asked or (number[0], True) in asked for number in said),
    )


# ------------------------------------------------------------------------------------------------------ likeness


def chrf(text: str, expected: str) -> float:
    """chrF2 of one sentence (Popović 2015): F2 of character n-grams up to 6, which needs no Chinese word breaks."""
    return float(_chrf().sentence_score(text, [expected]).score) / 100.0 if text else 0.0


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def rouge_l(text: str, expected: str) -> float:
    """ROUGE-L F1 (Lin 2004) over single characters."""
    hypothesis, reference = " ".join("".join(text.split())), " ".join("".join(expected.split()))
    if not hypothesis or not reference:
        return 0.0
    # The library adds 1e-8 to a denominator.
    return round(float(_rouge().get_scores(hypothesis, reference)[0]["rouge-l"]["f"]), 6)


@functools.cache
def _rouge() -> Any:
    from rouge_chinese import Rouge

    return Rouge(metrics=["rouge-l"])


# ------------------------------------------------------------------------------------------------------- labels


def predicted_label(text: str, labels: Sequence[str] = SENTIMENTS, question: str = "", cut: bool = False) -> str | None:
    """The label that an answer gives, one of ``labels``.

    A first line that is a label decides; else what stands behind ``情绪：`` or the like at the head of a line, the
    first time; else behind ``判断为`` and its kin; else the only label that occurs at all, is not denied and is not
    repeated from ``question``. An answer that names several, and not which is meant, gives none.
    """
    words = {_text_of(word): label for label in labels for word in LABEL_WORDS.get(label, (label,))}
    if not words:
        return None
    # The longest first, so that a label may begin as another does. One character alone is part of many words.
    any_word = "|".join(
        re.escape(word) if len(word) > 1 else f"{re.escape(word)}(?={TAIL}(?!\\w))"
        for word in sorted(words, key=len, reverse=True)
    )
    whole, text = text, _text_of(text)
    if alone := re.match(rf"[\W_]*({any_word}){TAIL}[^\w\n]*(?:\n|$)", text):
        return words[alone[1]]
    if said := re.search(HEAD + f"({any_word})", text) or re.search(SAID + f"({any_word})", text):
        other = re.match(rf"[^\S\n]*{OR}[^\S\n]*({any_word})", text[said.end() :])
        return None if other and words[other[1]] != words[said[1]] else words[said[1]]
    long = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True) if len(word) > 1)
    if not long:
        return None
    own = _text_of(without_echo(whole, question, cut))
    found = {words[word] for denied, word in re.findall(f"({NOT})?({long})", own) if not denied}
    return found.pop() if len(found) == 1 else None


def without_echo(text: str, question: str, cut: bool = False) -> str:
    """``text`` without the clauses that it repeats from the question: labels that stand there are no answer.

    Args:
        cut: the answer was cut, and so may be the last clause that it repeats.
    """
    clauses = [clause for part in CLAUSE_END.split(question) if len(clause := part.strip()) >= LEAST_ECHO]
    for clause in sorted(clauses, key=len, reverse=True):
        text = text.replace(clause, " ")
    text = text.rstrip(UNFINISHED)
    last = CLAUSE_END.split(text)[-1].lstrip()
    if cut and len(last) >= LEAST_ECHO and any(clause.startswith(last) for clause in clauses):
        text = text.removesuffix(last)
    return text


# --------------------------------------------------------------------------------------------------------- JSON


def json_scores(text: str, expected: Mapping[str, Any]) -> tuple[float, float, float]:
    """(valid, share of the fields that are right, all of them right); see ``Scores``."""
    whole = parse_object(text)
    found = whole if whole is not None else first_object(text)
    right = [found is not None and name in found and same_value(found[name], value) for name, value in expected.items()]
    return float(whole is not None), sum(right) / len(right), float(all(right))


def parse_object(text: str) -> dict[str, Any] | None:
    """``text`` as a JSON object, if it is one and nothing else."""
    try:
        content = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object somewhere in ``text``."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            content, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return content
    return None


def same_value(given: Any, wanted: Any) -> bool:
    """Whether two JSON values say the same: 3.20 and "3.2" do, "3.2%" and 3.2 don't."""
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(wanted, Mapping):
        return (
            isinstance(given, Mapping)
            and set(given) == set(wanted)
            and all(same_value(given[name], value) for name, value in wanted.items())
        )
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(given, (list, tuple))
            and len(given) == len(wanted)
            and all(same_value(one, other) for one, other in zip(given, wanted, strict=True))
        )
    if given is None or wanted is None:
        return given in (None, "") and wanted in (None, "")
    if isinstance(given, (Mapping, list, tuple)):
        return False
    one, other = _text_of(given), _text_of(wanted)
    first, second = PLAIN_NUMBER.fullmatch(one), PLAIN_NUMBER.fullmatch(other)
    if first and second:
        return (decimal_of(first[1]), first[2]) == (decimal_of(second[1]), second[2])
    return one == other


def _text_of(value: Any) -> str:
    return unicodedata.normalize("NFKC", str(value)).strip().casefold().replace("−", "-")


# ------------------------------------------------------------------------------------------------------ numbers


def numbers_in(text: str) -> set[tuple[Decimal, bool]]:
    """The different numbers in a text, without signs and marks of lists, each with whether it is a percentage.

    A fall of 3% is -3%, 25 basis points are 0.25%, and percentage points count as percent.
    """
    text = LIST_MARK.sub(" ", unicodedata.normalize("NFKC", CIRCLED.sub(" ", text)))
    return {
        (decimal_of(digits) / (100 if "基点" in unit or "bp" in unit.lower() else 1), bool(unit))
        for digits, unit in NUMBER.findall(text)
    }


def decimal_of(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))
