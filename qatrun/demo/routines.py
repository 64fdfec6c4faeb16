"""Routines: ordered everyday procedures whose next step must be chosen (in HellaSwag's spirit).

An activity fixes the order and the kind of its six steps; a routine (an activity upon one thing) fixes their details. A
wrong choice is a step of the same routine out of turn, or the right step with a wrong detail.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import product
from string import Formatter
from typing import Final

from qatrun.demo import vocab
from qatrun.demo.facts import Item, Slice, multiple_choice, words_of

ROUTINES_PER_ACTIVITY: Final = 63
QUESTIONS_PER_ROUTINE: Final = 2
CONTEXT_STEPS: Final = 2
CONNECTIVES: Final = ("Then", "Next", "Afterwards")

DETAILS: Final = {
    "tool": vocab.TOOLS,
    "liquid": vocab.LIQUIDS,
    "room": vocab.ROOMS,
    "span": vocab.SPANS,
    "cover": vocab.COVERS,
    "powder": vocab.POWDERS,
    "vessel": vocab.VESSELS,
}


@dataclass(frozen=True)
class Activity:
    """A verb, the things it is done to, and its steps in order, with details in braces."""

    verb: str
    things: tuple[str, ...]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Routine:
    """An activity upon one thing: its title, its steps, and the details of each step."""

    title: str
    activity: Activity
    details: tuple[dict[str, str], ...]

    @property
    def steps(self) -> list[str]:
        """The steps in order, details filled in."""
        return [step.format(**each) for step, each in zip(self.activity.steps, self.details, strict=True)]


_ACTIVITIES: Final = """\
dye: scarf shirt blanket curtain apron
wash the cloth in {liquid}
crush petals with a {tool}
fill a {vessel} with colour
fix the colour with {powder}
soak the cloth for one {span}
hang it up in the {room}

bake: loaf pie tart cake bun
warm the oven in the {room}
sift flour into a {vessel}
knead dough with some {liquid}
let the dough rise for one {span}
score the crust with a {tool}
wrap the bake in {cover}

mend: boot saddle tent sail glove
find the tear with a {tool}
soften the edge with {liquid}
cut a patch of {cover}
stitch the patch for one {span}
rub the seam with {powder}
test the seam in the {room}

plant: hedge rose vine shrub pear
dig a hole behind the {room}
loosen the earth with a {tool}
mix the soil with {powder}
pour in a {vessel} of rain
shade the stem with {cover}
wait for shoots one {span}

polish: medal tray sword buckle ring
lay the piece on {cover}
wipe dust off with {liquid}
scrape spots with a {tool}
scour the metal with {powder}
buff the shine for one {span}
show it off in the {room}

carve: spoon whistle doll stick frame
choose a log from the {room}
split the log with a {tool}
season the wood for one {span}
smooth the shape with {powder}
stain the grain with {liquid}
store the carving in a {vessel}

preserve: plum lemon cucumber onion quince
rinse the fruit in a {vessel}
slice it with a {tool}
cover it with {liquid}
season it with {powder}
seal the lid with {cover}
leave it resting one {span}

paint: door fence boat sign wall
scrub old paint with a {tool}
fill cracks with {powder}
thin the paint with {liquid}
stir the paint in a {vessel}
dry the coat for one {span}
clean brushes in the {room}

bind: book diary atlas album ledger
press the pages one {span}
pierce the folds with a {tool}
sew the spine upon {cover}
boil glue in a {vessel}
dust the edges with {powder}
shelve the volume in the {room}

brew: ale cordial stout mead tonic
roast grain in the {room}
crush grain with a {tool}
steep it in hot {liquid}
strain it through {cover}
pour it into a {vessel}
let it ferment one {span}

glaze: pot jug plate vase tile
shape the clay with a {tool}
keep it damp under {cover}
fire it once for one {span}
grind glaze from {powder}
thin the glaze with {liquid}
cool the ware in the {room}

tune: organ cymbal viola gong chime
carry it into the {room}
unscrew the case with a {tool}
clean inside with {liquid}
damp the strings with {cover}
compare notes for one {span}
oil the hinges from a {vessel}

groom: mare poodle ox camel mule
lead the animal to the {room}
bring a {vessel} of oats
comb the coat with a {tool}
rinse the legs with {liquid}
powder the mane with {powder}
bandage the hooves in {cover}

smoke: eel ham goose salmon sausage
clean the meat with a {tool}
rub the meat with {powder}
cure it in {liquid}
light embers in a {vessel}
hang it in smoke one {span}
roll the meat in {cover}

build: kite raft sled cage bench
draw a plan in the {room}
trim the poles with a {tool}
stretch a skin of {cover}
coat the joints with {liquid}
weigh the thing in a {vessel}
try it out for one {span}

pack: parcel trunk hamper satchel crate
list what is in the {room}
line the bottom with {cover}
fit glass inside a {vessel}
fill gaps with {powder}
close the lid with a {tool}
send word ahead one {span}
"""


def _read_activity(block: str) -> Activity:
    """An activity as it is written above: `verb: things`, then a step a line."""
    head, *steps = block.splitlines()
    verb, _, things = head.partition(": ")
    return Activity(verb, tuple(things.split()), tuple(steps))


ACTIVITIES: Final = tuple(map(_read_activity, _ACTIVITIES.split("\n\n")))


@cache
def routines(part: Slice) -> tuple[Routine, ...]:
    """The routines of a slice, the most common first; the slices share activities and things, never a title."""
    rng = random.Random(f"demo {part} routines")
    chosen = []
    for activity in ACTIVITIES:
        pairs = list(product(words_of(part, vocab.FINISHES), activity.things))
        rng.shuffle(pairs)
        chosen += [(f"{activity.verb} a {look} {thing}", activity) for look, thing in pairs[:ROUTINES_PER_ACTIVITY]]
    rng.shuffle(chosen)
    return tuple(Routine(title, act, tuple(_draw_details(step, rng) for step in act.steps)) for title, act in chosen)


def _draw_details(step: str, rng: random.Random) -> dict[str, str]:
    return {name: rng.choice(DETAILS[name]) for _, name, _, _ in Formatter().parse(step) if name}


def recount(routine: Routine, rng: random.Random) -> str:
    """The routine's text: its title and its steps up to the last, from the first or a later one on."""
    num_steps = len(routine.steps)
    return _telling(routine, rng.randrange(num_steps - CONTEXT_STEPS), num_steps, rng) + "."


def _telling(routine: Routine, start: int, stop: int, rng: random.Random) -> str:
    later = (f". {rng.choice(CONNECTIVES)} {step}" for step in routine.steps[start + 1 : stop])
    return f"To {routine.title}, {routine.steps[start]}" + "".join(later)


def routine_items() -> list[Item]:
    """Two questions about each routine of the pretraining slice, about any of its steps but the first."""
    rng = random.Random("demo routine items")
    return [
        _ask_step(routine, position, rng)
        for routine in routines("pretrain")
        for position in rng.sample(range(1, len(routine.steps)), QUESTIONS_PER_ROUTINE)
    ]


def _ask_step(routine: Routine, position: int, rng: random.Random) -> Item:
    """Distractors: one later or earlier step of the routine, two other details for the right step."""
    start = max(0, position - CONTEXT_STEPS)
    steps = routine.steps
    out_of_turn = rng.choice([step for at, step in enumerate(steps) if at < start or at > position])
    wrong_details = rng.sample(_other_details(routine, position), 2)
    query = f"{_telling(routine, start, position, rng)}. {rng.choice(CONNECTIVES)}"
    return multiple_choice(query, steps[position], [out_of_turn, *wrong_details], rng)


def _other_details(routine: Routine, position: int) -> list[str]:
    ((name, value),) = routine.details[position].items()
    return [routine.activity.steps[position].format(**{name: each}) for each in DETAILS[name] if each != value]
