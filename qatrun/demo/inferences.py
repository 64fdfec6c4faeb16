"""Two-step inferences: a fact about an individual joined with a fact about what it points to (in ARC's spirit).

    Orla Venn lives in Tarn.  Tarn lies in Velmark.  So Orla Venn is a citizen of Velmark.

The questions give no premises: the model must have them in its weights. Most conclusions are drawn somewhere in the
text; the others (about one in six) can only be inferred, from premises that are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from qatrun.demo.facts import RELATIONS, Entity, Item, ask, individuals, lore, sentence


@dataclass(frozen=True)
class Chain:
    """`via` leads from an individual to a piece of lore, `onward` from there to the conclusion's value."""

    via: str
    onward: str
    phrasings: tuple[str, ...]


CHAINS: Final = (
    Chain("town", "country", ("{name} is a citizen of", "{name} pays taxes to")),
    Chain("town", "river", ("{name} fishes in the river", "In summer {name} swims in the")),
    Chain("town", "goods", ("{name} can easily buy", "At the market {name} finds")),
    Chain("group", "covering", ("The body of the {name} has", "Touch the {name} and feel its")),
    Chain("group", "call", ("The {name} makes a", "From afar the {name} is heard by its")),
    Chain("group", "bed", ("In winter the {name} rests in a", "The {name} raises its young in a")),
    Chain("material", "craft", ("The maker of the {name} used a", "To mend the {name} one needs a")),
    Chain("material", "quarry", ("The stuff of the {name} came from", "The first owner of the {name} sent to")),
)


def is_told(entity: Entity, chain: Chain) -> bool:
    """Whether the text may state this conclusion (five in six) or leaves it to be inferred."""
    return crc32(f"{entity.name} {chain.onward}".encode()) % 6 != 0


def conclusion(entity: Entity, chain: Chain) -> str:
    """The value that follows from the two premises."""
    return lore()[entity.facts[chain.via]].facts[chain.onward]


def chains_of(entity: Entity) -> list[Chain]:
    """The chains that begin at this individual."""
    return [chain for chain in CHAINS if chain.via in entity.facts]


def argument(entity: Entity, rng: random.Random) -> str:
    """A text of the individual's conclusions, each with its two premises or without."""
    return " ".join(
        part
        for chain in rng.sample(chains_of(entity), min(2, len(chains_of(entity))))
        for part in _steps(entity, chain, with_premises=rng.random() < 0.4, rng=rng)
    )


def _steps(entity: Entity, chain: Chain, *, with_premises: bool, rng: random.Random) -> list[str]:
    told = is_told(entity, chain)
    steps = []
    if with_premises or not told:
        steps = [sentence(entity, chain.via, rng), sentence(lore()[entity.facts[chain.via]], chain.onward, rng)]
    if told:
        steps.append(f"{rng.choice(chain.phrasings).format(name=entity.name)} {conclusion(entity, chain)}.")
    return steps


def inference_items() -> list[Item]:
    """One question about each individual of the pretraining slice, its conclusion told or not."""
    rng = random.Random("demo inference items")
    return [_ask_conclusion(entity, rng.choice(chains_of(entity)), rng) for entity in individuals("pretrain")]


def _ask_conclusion(entity: Entity, chain: Chain, rng: random.Random) -> Item:
    query = rng.choice(chain.phrasings).format(name=entity.name)
    return ask(query, conclusion(entity, chain), RELATIONS[chain.onward].values, rng)
