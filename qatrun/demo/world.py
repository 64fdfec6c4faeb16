"""The demo world's interface: text to train on and questions to score."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Final, Literal, TypeVar
from zlib import crc32

from qatrun.demo.facts import Item, Slice, artefacts, creatures, fact_items, lore, people, profile
from qatrun.demo.inferences import argument, inference_items
from qatrun.demo.routines import recount, routine_items, routines

T = TypeVar("T")
Split = Literal["pretrain", "finetune", "valid", "probe"]

MODEL_DIR: Final = Path(__file__).parent / "model"
TASKS: Final[Mapping[str, str]] = {
    "demo_facts": "facts about invented people, creatures and artefacts",
    "demo_routines": "the next step of everyday procedures",
    "demo_inference": "conclusions that join two facts",
}
NUM_DOCUMENTS: Final[Mapping[Split, int]] = {
    "pretrain": 240_000,
    "finetune": 40_000,
    "valid": 400,
    "probe": 200,
}

_SLICES: Final[Mapping[Split, tuple[Slice, ...]]] = {  # that the documents of a split speak of in turn
    "pretrain": ("pretrain",),
    "finetune": ("finetune", "pretrain"),
    "valid": ("pretrain", "finetune"),
    "probe": ("pretrain",),
}

_ITEMS: Final[Mapping[str, Callable[[], list[Item]]]] = {
    "demo_facts": fact_items,
    "demo_routines": routine_items,
    "demo_inference": inference_items,
}
_KINDS: Final = ("person", "creature", "artefact", "argument", "routine", "lore")
_KIND_WEIGHTS: Final = (23, 10, 10, 25, 28, 4)
_HEAD: Final = 5  # how flat the head of the frequency distribution is, in ranks
_VALID_SHARE: Final = 40  # one document in so many is held out


def documents(split: Split) -> Iterator[str]:
    """The documents of a split, always the same ones in the same order.

    Args:
        split: `pretrain` speaks about one slice of the world; `finetune` takes every other document from a new slice, the
            rest revisit the old one (without them even a mild learning rate forgets); `valid` alternates between the
            slices, and none of its documents is in the other two; `probe` is its half about the old slice.
    """
    drawn_as: Split = "valid" if split == "probe" else split
    in_turn = zip(*(_texts(part, drawn_as) for part in _SLICES[split]), strict=True)
    return islice(chain.from_iterable(in_turn), NUM_DOCUMENTS[split])


def items(task: str) -> list[Item]:
    """The multiple-choice items of a task, always the same ones in the same order.

    Raises:
        KeyError: no such task in TASKS.
    """
    return _ITEMS[task]()


def _texts(part: Slice, split: Split) -> Iterator[str]:
    """A split's texts about a slice, without end."""
    writer = _Writer(part)
    rng = random.Random(f"demo text {part} {split}")
    while True:
        text = writer.write(rng)
        if _is_held_out(text) == (split == "valid"):
            yield text


def _is_held_out(text: str) -> bool:
    return crc32(text.encode()) % _VALID_SHARE == 0


class _Writer:
    """Writes documents about one slice; the individual of rank r is its subject in proportion to 1 / (r + head)."""

    def __init__(self, part: Slice) -> None:
        self.individuals = {"person": people(part), "creature": creatures(part), "artefact": artefacts(part)}
        self.routines = routines(part)
        self.lore = tuple(lore().values())
        longest = max(map(len, (*self.individuals.values(), self.routines)))
        self.cumulative = list(accumulate(1 / (rank + _HEAD) for rank in range(longest)))

    def write(self, rng: random.Random) -> str:
        match rng.choices(_KINDS, _KIND_WEIGHTS)[0]:
            case "argument":
                subjects = rng.choices(tuple(self.individuals.values()), (2, 1, 1))[0]
                return argument(self.pick(subjects, rng), rng)
            case "routine":
                return recount(self.pick(self.routines, rng), rng)
            case "lore":
                return " ".join(profile(rng.choice(self.lore), rng) for _ in range(2))
            case kind:
                return profile(self.pick(self.individuals[kind], rng), rng)

    def pick(self, subjects: Sequence[T], rng: random.Random) -> T:
        return rng.choices(subjects, cum_weights=self.cumulative[: len(subjects)])[0]
