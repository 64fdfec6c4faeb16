"""Words of the demo world: plain English for values, invented names for people, places and creatures."""

from __future__ import annotations

import random
from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRADES: Final = _words(
    """baker weaver potter miller cooper tailor mason carpenter fisher shepherd beekeeper glazier printer saddler brewer
    tanner roofer clockmaker dyer ferryman gardener joiner locksmith painter"""
)
FOODS: Final = _words(
    """lentils plums herring cheese pancakes mushrooms chestnuts porridge dumplings radishes pickles noodles pears trout
    walnuts leeks turnips honeycomb figs beans cherries biscuits cabbage omelettes"""
)
INSTRUMENTS: Final = _words(
    """fiddle flute drum harp lute horn bagpipe zither cello trumpet whistle banjo accordion clarinet oboe guitar
    tambourine mandolin piano bugle"""
)
PETS: Final = _words(
    """terrier goat parrot tortoise rabbit pony goose ferret canary hedgehog donkey kitten spaniel pigeon hamster
    lamb"""
)
HABITATS: Final = _words(
    """reeds caves dunes meadows cliffs hedges swamps orchards moors lagoons pinewoods gorges heaths ponds ruins
    vineyards"""
)
DIETS: Final = _words(
    """snails acorns beetles moss berries worms seeds crickets clover minnows roots nectar shrimps ants bark
    thistles"""
)
GROUPS: Final = _words("songbird rodent lizard toad moth deer crab hawk weasel bat snake fox badger newt wren hare")
COVERINGS: Final = _words("feathers scales fur bristles plates down fleece slime spines velvet")
CALLS: Final = _words("croak hiss yelp chirp growl hum squeal click howl rattle")
BEDS: Final = _words("burrow nest hollow crevice thicket stump haystack chimney ditch loft")
MATERIALS: Final = _words(
    "bronze oak marble silver clay amber iron walnut slate ivory copper pewter maple granite jade tin"
)
CRAFTS: Final = _words("forge lathe chisel kiln vice grindstone bellows workbench crucible saw drill press")
OBJECTS: Final = _words(
    """bell clock lantern chair flask crown gate mask bowl compass mirror casket goblet statue ladder anchor chest
    throne fountain dagger"""
)
GOODS: Final = _words(
    "wool salt timber rope candles soap onions pottery lace herbs coal cider parchment tar glassware hemp"
)
CREATURE_ADJECTIVES: Final = _words(
    """grey spotted crested striped lesser greater dusky golden marsh river mountain northern southern long short
    horned tufted pale scarlet silent"""
)

TOOLS: Final = _words("knife hammer brush needle spoon rake sieve ladle file mallet trowel comb")
LIQUIDS: Final = _words("water vinegar oil milk brine tea syrup lye wine broth")
ROOMS: Final = _words("shed cellar yard attic kitchen barn porch pantry stable hallway")
SPANS: Final = _words("hour day week night minute morning month season")
COVERS: Final = _words("linen felt canvas leather paper straw silk sacking")
POWDERS: Final = _words("chalk ash sand resin soot flour sugar pepper rust sawdust")
VESSELS: Final = _words("bucket basin crate jar basket barrel tray kettle tub pan")
FINISHES: Final = _words(
    """small large round square plain fancy red blue green white heavy light modern new wide narrow cheap costly broken
    crooked dark bright rough thin thick secret borrowed"""
)

_ONSETS: Final = _words("b br d dr f g gr h k l m n p r s st t th v w")
_VOWELS: Final = _words("a e i o u ae ei")
_CODAS: Final = _words("l n r s nd rk lm st nt th")


def invented_names(purpose: str, count: int, endings: str, *, capital: bool = True) -> tuple[str, ...]:
    """Pronounceable invented names, all different, the same on every machine.

    Args:
        purpose: what the names are for; it seeds the draw.
        count: how many.
        endings: last syllables to draw from, separated by blanks; they tell a town from a surname.
        capital: whether each name begins with a capital letter.
    """
    rng = random.Random(f"demo names: {purpose}")
    names: dict[str, None] = {}
    while len(names) < count:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        name = stem + rng.choice(endings.split())
        names[name.capitalize() if capital else name] = None
    return tuple(names)


FIRST_NAMES: Final = invented_names("first names", 90, "a o i an el in ie us")
SURNAMES: Final = invented_names("surnames", 120, "er man ley sen ski wick")
TOWNS: Final = invented_names("towns", 60, "ham ton by ford stead")
COUNTRIES: Final = invented_names("countries", 12, "land mark ia")
RIVERS: Final = invented_names("rivers", 16, "e ey aw")
QUARRIES: Final = invented_names("quarries", 12, "fell crag")
RULERS: Final = invented_names("rulers", 16, "ard win")
MAKERS: Final = invented_names("makers", 80, "ic ov et")
CREATURE_NOUNS: Final = invented_names("creatures", 80, "et ling ock", capital=False)
