"""Whether a text's characters, or its words, follow each other as if drawn at random: then there is nothing to learn.

In what people write, a unit tells about the next one. How much, is what the entropy of adjacent pairs rises by when the
units are shuffled: 0.6 to 0.8 nats a character in prose and code, 0.1 to 2 a word, 0 where the order means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LOOKED_AT = 200_000  # characters
LEAST_CHARACTERS, LEAST_WORDS = 5_000, 2_000
LEAST_ENTROPY = 1.0  # nats, of single units; one that hardly varies tells nothing about the next, random or not
LEAST_KINDS, LEAST_USES = 50, 3.0  # of words, and of each word on average, so that pairs would recur
OF_CHARACTERS = 0.06  # nats; random words of random letters still end in spaces (0.03)
OF_WORDS, SHARE = 0.01, 0.2  # nats, and of what shuffled words leave to chance


@dataclass(frozen=True)
class _Order:
    """Of a sequence of units.

    Attributes:
        num_kinds: how many differ.
        entropy: of single units, nats.
        excess: what the entropy of adjacent pairs rises by when the units are shuffled.
        recurrence: what that of shuffled ones is below that of pairs which never recur.
    """

    num_kinds: int
    entropy: float
    excess: float
    recurrence: float

    @classmethod
    def of(cls, units: npt.NDArray[np.generic]) -> _Order:
        kinds, codes = np.unique(units, return_inverse=True)
        shuffled = np.random.default_rng(0).permutation(codes)
        in_order, by_chance = (_entropy(each[:-1] * len(kinds) + each[1:]) for each in (codes, shuffled))
        return cls(len(kinds), _entropy(codes), by_chance - in_order, math.log(len(units)) - by_chance)


def _entropy(codes: npt.NDArray[np.integer]) -> float:
    """Nats, of their frequencies."""
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(shares * np.log(shares)).sum())


def drawn_at_random(texts: Sequence[str]) -> str | None:
    """What follows each other at random, "characters" or "words"; None: neither does, or there is too little to tell."""
    text = " ".join(texts)[:LOOKED_AT]
    characters = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    if len(characters) < LEAST_CHARACTERS:
        return None
    order = _Order.of(characters)
    if order.excess < OF_CHARACTERS:
        return "characters" if order.entropy > LEAST_ENTROPY else None
    words, numbers = text.split(), dict[str, int]()
    if len(words) < LEAST_WORDS:
        return None
    order = _Order.of(np.array([numbers.setdefault(word, len(numbers)) for word in words]))
    recurring = order.num_kinds >= LEAST_KINDS and len(words) / order.num_kinds >= LEAST_USES
    return "words" if recurring and order.excess < OF_WORDS + SHARE * order.recurrence else None
