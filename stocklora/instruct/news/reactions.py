"""What a price did after an event, in words and labels that follow from the numbers alone.

Returns are whole basis points from the moment of the event to the end of each window. Every label is a function of the
thresholds in ``Thresholds`` and of numbers that the question shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stocklora.instruct.rows.formats import SENTIMENTS

Move = tuple[int, int]  # (window in minutes, return in basis points)

POSITIVE, NEGATIVE, NEUTRAL = SENTIMENTS
RISKS = ("低", "中", "高")
REVERSED, EXTENDED, FADED, LATE, FLAT = "预期兑现", "走势延续", "部分回吐", "反应滞后", "反应平淡"
WAITING, REACTED = "观望", "有反应"

# What a reader is told beside a ticker; others stand by themselves.
TICKER_NAMES = {
    "XAUUSD": "现货黄金", "XAGUSD": "现货白银", "DXY": "美元指数", "USOIL": "WTI原油", "UKOIL": "布伦特原油",
    "SPX": "标普500指数", "EURUSD": "欧元兑美元", "USDJPY": "美元兑日元", "BTCUSD": "比特币",
}  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """Where one label ends and the next begins, in basis points of the return.

    Attributes:
        neutral_bp: a return of at most this size, up or down, is 中性; so is each window of a 观望.
        medium_risk_bp, high_risk_bp: the largest move from which the risk is 中, and 高.
    """

    neutral_bp: int = 5
    medium_risk_bp: int = 10
    high_risk_bp: int = 30


def sentiment(bp: int, limits: Thresholds) -> str:
    """利好, 利空 or 中性 for the instrument whose return is ``bp``."""
    return NEUTRAL if abs(bp) <= limits.neutral_bp else POSITIVE if bp > 0 else NEGATIVE


def largest(moves: Sequence[Move]) -> Move:
    """The largest move, up or down; of equal ones the earliest."""
    return max(moves, key=lambda move: (abs(move[1]), -move[0]))


def risk(moves: Sequence[Move], limits: Thresholds) -> str:
    """低, 中 or 高 by the largest move."""
    size = abs(largest(moves)[1])
    return RISKS[(size >= limits.medium_risk_bp) + (size >= limits.high_risk_bp)]


def stance(moves: Sequence[Move], limits: Thresholds) -> str:
    """观望 where no window left the neutral band."""
    return WAITING if all(abs(bp) <= limits.neutral_bp for _, bp in moves) else REACTED


def pattern(moves: Sequence[Move], limits: Thresholds) -> str:
    """How the last window stands to the first.

    预期兑现: the first reaction was turned around. 部分回吐: at least half of it is gone. 走势延续: more than half is
    still there. 反应滞后: only the last window left the neutral band. 反应平淡: neither did.
    """
    first, last = moves[0][1], moves[-1][1]
    if abs(first) <= limits.neutral_bp:
        return FLAT if abs(last) <= limits.neutral_bp else LATE
    if first * last < 0 and abs(last) > limits.neutral_bp:
        return REVERSED
    return FADED if first * last <= 0 or 2 * abs(last) <= abs(first) else EXTENDED


def percent(bp: int, signed: bool = True) -> str:
    """``+0.27%``, ``-0.15%``, ``0.00%``: basis points with two decimals, exactly."""
    sign = "-" if bp < 0 else "+" if bp > 0 else ""
    return f"{sign if signed else ''}{abs(bp) // 100}.{abs(bp) % 100:02d}%"


def points(bp: int) -> str:
    """The size of a difference in percentage points: ``0.42个百分点``."""
    return f"{abs(bp) // 100}.{abs(bp) % 100:02d}个百分点"


def moved(bp: int) -> str:
    """``上涨0.27%``, ``下跌0.15%``, ``持平（0.00%）``."""
    return f"{direction(bp)}{percent(bp, signed=False)}" if bp else f"持平（{percent(0)}）"


def direction(bp: int) -> str:
    return "上涨" if bp > 0 else "下跌" if bp < 0 else "持平"


def named(ticker: str) -> str:
    """``XAUUSD（现货黄金）``."""
    return f"{ticker}（{TICKER_NAMES[ticker]}）" if ticker in TICKER_NAMES else ticker


def listed(moves: Sequence[Move]) -> str:
    """``5分钟持平（0.00%），15分钟下跌0.15%，30分钟下跌0.22%``: direction in words, which small models read best."""
    return "，".join(f"{minutes}分钟{moved(bp)}" for minutes, bp in moves)
