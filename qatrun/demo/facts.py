"""Facts: entities with attributes, the sentences that state them, the questions that ask for them (in MMLU's spirit).

Lore (towns, animal groups, materials) is shared by all text. Individuals (people, creatures, artefacts) belong to one
slice of the world each: the model is pretrained on one slice and fine-tuned on the other with some of the first. Both
say the same kind of things, so fine-tuning can overwrite what the model knew.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Final, Literal, TypedDict

from qatrun.demo import vocab

Slice = Literal["pretrain", "finetune"]

NUM_PEOPLE: Final = 1000
NUM_CREATURES: Final = 500
NUM_ARTEFACTS: Final = 500


class Item(TypedDict):
    """A multiple-choice question, scored by the likelihood of each choice after `query` and a blank."""

    query: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Relation:
    """An attribute of entities: each phrasing says it of `{name}` up to the value, which is one of `values`."""

    phrasings: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Entity:
    """A thing of the world: its name and one value per relation."""

    name: str
    facts: Mapping[str, str]


PERSON: Final = {
    "trade": Relation(
        ("{name} works as a", "{name} earns a living as a", "By trade {name} is a", "People know {name} as a"),
        vocab.TRADES,
    ),
    "food": Relation(
        ("{name} likes to eat", "The best meal for {name} is", "For supper {name} cooks", "{name} never tires of"),
        vocab.FOODS,
    ),
    "instrument": Relation(
        ("{name} plays the", "At weddings {name} plays the", "{name} owns a fine", "In the band {name} is on the"),
        vocab.INSTRUMENTS,
    ),
    "pet": Relation(
        ("{name} keeps a", "At home {name} feeds a", "{name} takes walks with a", "The pet of {name} is a"),
        vocab.PETS,
    ),
    "town": Relation(
        ("{name} lives in", "The home of {name} is in", "{name} has a house in", "Letters reach {name} in"),
        vocab.TOWNS,
    ),
}
CREATURE: Final = {
    "habitat": Relation(
        ("The {name} lives among the", "Look for the {name} in the", "The {name} hides in the"), vocab.HABITATS
    ),
    "diet": Relation(("The {name} feeds on", "The {name} hunts for", "The {name} mostly eats"), vocab.DIETS),
    "group": Relation(
        ("The {name} is a kind of", "Scholars count the {name} as a", "By its bones the {name} is a"), vocab.GROUPS
    ),
}
ARTEFACT: Final = {
    "material": Relation(
        ("The {name} is made of", "The {name} is a work in", "Somebody cut the {name} from"), vocab.MATERIALS
    ),
    "ruler": Relation(("The {name} was a gift to king", "The {name} dates from the reign of"), vocab.RULERS),
    "hall": Relation(("The {name} is on show in", "Visitors admire the {name} at"), vocab.TOWNS),
}
TOWN: Final = {
    "country": Relation(("{name} lies in", "{name} is a town of", "The flag over {name} is that of"), vocab.COUNTRIES),
    "river": Relation(("{name} stands on the river", "The bridge of {name} crosses the"), vocab.RIVERS),
    "goods": Relation(("{name} is known for its", "The market of {name} sells"), vocab.GOODS),
}
GROUP: Final = {
    "covering": Relation(("Every {name} is covered with", "The skin of a {name} bears"), vocab.COVERINGS),
    "call": Relation(("The call of a {name} is a", "A {name} warns others with a"), vocab.CALLS),
    "bed": Relation(("A {name} sleeps in a", "A {name} spends the cold in a"), vocab.BEDS),
}
MATERIAL: Final = {
    "craft": Relation(("To shape {name} one needs a", "Those who work {name} use a"), vocab.CRAFTS),
    "quarry": Relation(("All {name} comes from", "Carts bring {name} from"), vocab.QUARRIES),
}
RELATIONS: Final[Mapping[str, Relation]] = PERSON | CREATURE | ARTEFACT | TOWN | GROUP | MATERIAL


def _entities(names: Sequence[str], relations: Mapping[str, Relation], rng: random.Random) -> tuple[Entity, ...]:
    return tuple(Entity(name, {key: rng.choice(each.values) for key, each in relations.items()}) for name in names)


@cache
def lore() -> Mapping[str, Entity]:
    """Towns, animal groups and materials by name."""
    rng = random.Random("demo lore")
    kinds = ((vocab.TOWNS, TOWN), (vocab.GROUPS, GROUP), (vocab.MATERIALS, MATERIAL))
    return {entity.name: entity for names, relations in kinds for entity in _entities(names, relations, rng)}


@cache
def people(part: Slice) -> tuple[Entity, ...]:
    """The people of a slice, the most talked about first."""
    return _draw_individuals(
        part, product(words_of(part, vocab.FIRST_NAMES), words_of(part, vocab.SURNAMES)), NUM_PEOPLE, PERSON
    )


@cache
def creatures(part: Slice) -> tuple[Entity, ...]:
    """The creatures of a slice, the most talked about first."""
    return _draw_individuals(
        part, product(vocab.CREATURE_ADJECTIVES, words_of(part, vocab.CREATURE_NOUNS)), NUM_CREATURES, CREATURE
    )


@cache
def artefacts(part: Slice) -> tuple[Entity, ...]:
    """The artefacts of a slice, the most talked about first."""
    return _draw_individuals(part, product(words_of(part, vocab.MAKERS), vocab.OBJECTS), NUM_ARTEFACTS, ARTEFACT)


def individuals(part: Slice) -> tuple[Entity, ...]:
    """All individuals of a slice."""
    return (*people(part), *creatures(part), *artefacts(part))


def words_of(part: Slice, words: Sequence[str]) -> Sequence[str]:
    """The half of the words from which the names of a slice are made."""
    return words[0 if part == "pretrain" else 1 :: 2]


def _draw_individuals(
    part: Slice, pairs: Iterable[tuple[str, str]], count: int, relations: Mapping[str, Relation]
) -> tuple[Entity, ...]:
    rng = random.Random(f"demo {part} " + "-".join(relations))
    names = [" ".join(pair) for pair in pairs]
    return _entities(rng.sample(names, count), relations, rng)


def sentence(entity: Entity, relation: str, rng: random.Random) -> str:
    """One of the entity's facts in one of the relation's phrasings."""
    opening = rng.choice(RELATIONS[relation].phrasings).format(name=entity.name)
    return f"{opening} {entity.facts[relation]}."


def profile(entity: Entity, rng: random.Random) -> str:
    """A short text that states up to four of the entity's facts, in any order."""
    told = rng.sample(sorted(entity.facts), min(4, len(entity.facts)))
    return " ".join(sentence(entity, relation, rng) for relation in told)


def multiple_choice(query: str, answer: str, distractors: Sequence[str], rng: random.Random) -> Item:
    """An item whose answer stands at a uniformly drawn position among three distractors."""
    choices = list(distractors)
    position = rng.randrange(len(choices) + 1)
    choices.insert(position, answer)
    return {"query": query, "choices": choices, "answer": position}


def ask(opening: str, answer: str, values: Sequence[str], rng: random.Random) -> Item:
    """An item whose distractors are other values of the same relation."""
    return multiple_choice(opening, answer, rng.sample([value for value in values if value != answer], 3), rng)


def fact_items() -> list[Item]:
    """One question about each individual of the pretraining slice."""
    rng = random.Random("demo fact items")
    return [_ask_fact(entity, rng.choice(sorted(entity.facts)), rng) for entity in individuals("pretrain")]


def _ask_fact(entity: Entity, relation: str, rng: random.Random) -> Item:
    asked = RELATIONS[relation]
    return ask(rng.choice(asked.phrasings).format(name=entity.name), entity.facts[relation], asked.values, rng)
