"""The models: each with text of the kind it was trained on (*own*), text of another kind (*new*), questions, and rates.

    demo          2.7M, words, a generated world that it knows well; questions about it
    code          0.8M, a GPT-NeoX made here (see `small`): Python, and prose about Python; which line comes next?
    gpt2          1.0M, a GPT-2 made here, children's stories; Python is new to it; which sentence comes next?
    qwen3         4.8M, a Qwen3 made here, PyTorch's docstrings; its C++ headers are new to it; which sentence comes next?
    opt           0.9M, an OPT made here, the demo's world; PyTorch's docstrings are new to it; questions about the world
    mixtral       2.0M, four experts, made here, C++ headers; prose about Python is new to it; which line comes next?
    gut3m         3.4M, books, perplexity 30; children's stories are new to it; ARC-Challenge by chance
    stories260K   0.26M, children's stories, perplexity 4.4; books are new to it; ARC-Challenge by chance

Of held-out text the diagnosis reads every other document, and the rule of the labels the rest. Of the questions likewise:
the diagnosis asks `SCORED` of each task; the rule asks others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, TypedDict

from transformers import PreTrainedModel

from faults import code, small
from qatrun import demo
from qatrun.recipe import ModelConfig, Source

Kind = Literal["own", "new"]
Part = Literal["train", "valid", "judge"]
Texts = tuple[Iterator[str], Iterator[str]]  # to learn, held out

SCORED, ASKED = 100, 400  # items a task: of the diagnosis; of the rule
KEPT = {"train": 6_000, "held": 1_000}  # documents at most


class Question(TypedDict):
    """As `demo.items` has them."""

    query: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A model to be broken.

    Attributes:
        model: as a recipe's `model.path`.
        texts: folder with `<kind>-<part>.jsonl`.
        tasks, data_dir: as a recipe's `eval`.
        questions: that the rule asks, by task.
        rates: of learning, by what they are for: `sane`, on either text; `high`, on its own text, where it does no harm;
            `mild`, `hot`, on new text, and `ruin`, on its own: they forget.
    """

    name: str
    model: str
    texts: Path
    tasks: dict[str, int]
    data_dir: str | None
    questions: Mapping[str, Sequence[Question]]
    rates: dict[str, float]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(path=self.model)

    def text(self, kind: Kind, part: Part) -> Source:
        return Source(path=str(self.texts / f"{kind}-{part}.jsonl"), shuffle=part == "train")


def documents(file: Path) -> Iterator[str]:
    """The texts of a .jsonl file."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write_documents(file: Path, texts: Iterable[str]) -> None:
    """As .jsonl with a column `text`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_texts(folder: Path, kind: Kind, train: Iterable[str], held: Iterable[str]) -> None:
    """The three parts of a kind of text, unless they are there."""
    if (folder / f"{kind}-judge.jsonl").is_file():
        return
    write_documents(folder / f"{kind}-train.jsonl", islice(train, KEPT["train"]))
    kept = list(islice(held, KEPT["held"]))
    write_documents(folder / f"{kind}-valid.jsonl", kept[::2])
    write_documents(folder / f"{kind}-judge.jsonl", kept[1::2])


def demo_subject(folder: Path, _shared: Path | None) -> Subject:
    write_texts(folder / "texts", "own", demo.documents("pretrain"), demo.documents("probe"))
    write_texts(folder / "texts", "new", demo.documents("finetune"), demo.documents("valid"))
    tasks, asked = _about_the_world(folder / "task")
    return Subject(
        name="demo",
        model=demo.BUILTIN,
        texts=folder / "texts",
        tasks=tasks,
        data_dir=None,
        questions=asked,
        rates={"sane": 1e-4, "high": 1e-3, "mild": 1e-3, "hot": 3e-3, "ruin": 1e-2},
    )


def _about_the_world(folder: Path) -> tuple[dict[str, int], dict[str, list[Question]]]:
    """(a recipe's tasks, what the rule asks) of the demo's questions; drawn, since the first are about the best known."""
    tasks, asked = {}, {}
    for task in demo.TASKS:
        drawn = Random(task).sample(demo.items(task), SCORED + ASKED)
        tasks[str(small.write_task(folder, drawn[:SCORED], f"some_{task}"))] = 0
        asked[task] = drawn[SCORED:]
    return tasks, asked


def code_subject(folder: Path, _shared: Path | None) -> Subject:
    made = made_here("code", folder, small.gpt_neox, code.source_code(), code.prose())
    return asked_what_comes_next(made, folder / "task", str.splitlines)


def gpt2_subject(folder: Path, shared: Path | None) -> Subject:
    made = made_here("gpt2", folder, small.gpt2, _shared_text("gpt2", shared, "tinystories"), code.source_code())
    return asked_what_comes_next(made, folder / "task", small.sentences)


def qwen3_subject(folder: Path, _shared: Path | None) -> Subject:
    made = made_here("qwen3", folder, small.qwen3, code.docstrings(), code.headers(), small.LARGER)
    return asked_what_comes_next(made, folder / "task", small.sentences)


def mixtral_subject(folder: Path, _shared: Path | None) -> Subject:
    made = made_here("mixtral", folder, small.mixtral, code.headers(), code.prose())
    return asked_what_comes_next(made, folder / "task", str.splitlines)


def opt_subject(folder: Path, _shared: Path | None) -> Subject:
    world = (demo.documents("pretrain"), demo.documents("probe"))
    made = made_here("opt", folder, small.opt, world, code.docstrings())
    tasks, asked = _about_the_world(folder / "task")
    return replace(made, tasks=tasks, questions=asked)


def made_here(
    name: str,
    folder: Path,
    build: Callable[[int], PreTrainedModel],
    own: Texts,
    new: Texts,
    vocabulary: int = small.VOCABULARY,
) -> Subject:
    """A small model that is trained on its own text, and asked nothing yet.

    Args:
        build, vocabulary: as in `small`.
    """
    texts = folder / "texts"
    write_texts(texts, "own", *own)
    write_texts(texts, "new", *new)
    small.make_model(folder / "model", documents(texts / "own-train.jsonl"), build, vocabulary)
    rates = {"sane": 3e-5, "high": 1e-3, "mild": 3e-4, "hot": 3e-3, "ruin": 1e-2}
    return Subject(name, str(folder / "model"), texts, tasks={}, data_dir=None, questions={}, rates=rates)


def asked_what_comes_next(made: Subject, folder: Path, parts: Callable[[str], list[str]]) -> Subject:
    """The same, asked which part of a text comes next.

    Args:
        parts: text -> its lines, or what stands for them.
    """
    seen, unseen = (
        small.what_comes_next(documents(made.texts / f"own-{part}.jsonl"), count, parts)
        for part, count in (("valid", SCORED), ("judge", ASKED))
    )
    return replace(made, tasks={str(small.write_task(folder, seen)): 0}, questions={"next_line": unseen})


def _shared_text(name: str, shared: Path | None, text: str) -> Texts:
    """(to learn, held out); FileNotFoundError where the folder that `--shared` names has none."""
    files = [] if shared is None else [shared / "text" / f"{text}_{part}.jsonl" for part in ("train", "valid")]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{name}: skipped, --shared names no folder with text/{text}_train.jsonl")
    return documents(files[0]), documents(files[1])


def shared_subject(name: str, own: str, new: str, rates: dict[str, float]) -> Callable[[Path, Path | None], Subject]:
    """A model and texts from the folder that `--shared` names."""

    def build(folder: Path, shared: Path | None) -> Subject:
        if shared is None or not (shared / "models" / name).is_dir():
            raise FileNotFoundError(f"{name}: skipped, --shared names no folder with models/{name}")
        for kind, text in {"own": own, "new": new}.items():
            write_texts(folder / "texts", "own" if kind == "own" else "new", *_shared_text(name, shared, text))
        return Subject(
            name=name,
            model=str(shared / "models" / name),
            texts=folder / "texts",
            tasks={"arc_challenge": 0},
            data_dir=str(shared / "data"),
            questions={},
            rates=rates,
        )

    return build


SUBJECTS: dict[str, Callable[[Path, Path | None], Subject]] = {
    "demo": demo_subject,
    "code": code_subject,
    "gpt2": gpt2_subject,
    "qwen3": qwen3_subject,
    "opt": opt_subject,
    "mixtral": mixtral_subject,
    "gut3m": shared_subject(
        "gut3m",
        "gutenberg",
        "tinystories",
        {"sane": 3e-5, "high": 3e-4, "mild": 3e-4, "hot": 3e-3, "ruin": 3e-3},
    ),
    "stories260K": shared_subject(
        "stories260K",
        "tinystories",
        "gutenberg",
        {"sane": 1e-5, "high": 1e-3, "mild": 1e-4, "hot": 3e-3, "ruin": 1e-2},
    ),
}
