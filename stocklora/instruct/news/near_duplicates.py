"""Texts that say the same in nearly the same words, found without comparing every pair.

MinHash over three-character shingles (Broder 1997) with banding proposes pairs; their exact Jaccard similarity decides.
The lower the threshold, the shorter the bands, so that at any of them a pair is missed less than once in a thousand.
Standard library only, and the same on every machine (``zlib.crc32``, not Python's salted hash).
"""

from __future__ import annotations

import random
import unicodedata
import zlib
from collections.abc import Sequence

SHINGLE = 3
HASHES = 64
MISSED = 1e-3  # probability to miss a pair that is just alike enough; at 0.8 it is 0.0002, with 16 bands of 4
PRIME = (1 << 61) - 1
_COEFFICIENTS = [
    (generator.randrange(1, PRIME), generator.randrange(PRIME))
    for generator in [random.Random(1997)]
    for _ in range(HASHES)
]


def folded(text: str) -> str:
    """``text`` without case, width, white space and punctuation: what makes two spellings one."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if unicodedata.category(c)[0] in "LNS" or c in "%.-+")


def shingles(text: str) -> frozenset[int]:
    text = folded(text)
    size = min(SHINGLE, len(text))
    return (
        frozenset(zlib.crc32(text[i : i + size].encode()) for i in range(len(text) - size + 1)) if text else frozenset()
    )


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
    rows = _rows_of_a_band(threshold)
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index, members in enumerate(sets):
        candidates: set[int] = set()
        keys = _bands(members, rows)
        for key in keys:
            candidates.update(buckets.get(key, ()))
        for earlier in sorted(candidates):
            if similarity(members, sets[earlier]) >= threshold:
                first[index] = earlier
                break
        else:  # only texts that stay are compared with: chains of small changes do not run on
            for key in keys:
                buckets.setdefault(key, []).append(index)
    return first


def _rows_of_a_band(threshold: float) -> int:
    """The longest bands, and so the fewest pairs to compare, that miss no more than ``MISSED``."""
    fitting = (rows for rows in (4, 3, 2) if (1 - threshold**rows) ** (HASHES // rows) <= MISSED)
    return next(fitting, 1)


def _bands(members: frozenset[int], rows: int) -> list[tuple[int, ...]]:
    if not members:
        return [(-1,)]
    signature = [min((a * member + b) % PRIME for member in members) for a, b in _COEFFICIENTS]
    return [(band, *signature[band * rows : (band + 1) * rows]) for band in range(HASHES // rows)]
