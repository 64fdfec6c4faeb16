"""The demo world is the same everywhere, its questions have one true answer, and its model knows a part of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import random
import re
import subprocess
import sys
from collections import defaultdict
from itertools import chain, islice, pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatrun import demo
from qatrun.demo import facts, inferences, routines

SPLITS = ("pretrain", "finetune", "valid")
CHOICE_TASKS = ("demo_facts", "demo_inference")


@pytest.fixture(scope="module")
def pretraining_text() -> list[str]:
    return list(demo.documents("pretrain"))


@pytest.fixture(scope="module")
def pretraining_sentences(pretraining_text: list[str]) -> set[str]:
    return {sentence for text in pretraining_text for sentence in text.removesuffix(".").split(". ")}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "scripts" / "pretrain_demo.py"
    spec = importlib.util.spec_from_file_location("pretrain_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(lines: object) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("pretrain", "b66b34d6b7f8d55f"), ("finetune", "46f0a36142dace5d"), ("valid", "d3ad4a7d0fcdfe97")],
)
def test_documents_are_the_same_everywhere(split: str, expected: str) -> None:
    assert digest(list(islice(demo.documents(split), 2000))) == expected


@pytest.mark.parametrize(
    ("task", "expected"),
    [("demo_facts", "12312bb4d4e0016a"), ("demo_routines", "78332975c3731991"), ("demo_inference", "4a3dee211b1adc9b")],
)
def test_items_are_the_same_everywhere(task: str, expected: str) -> None:
    assert digest(demo.items(task)) == expected


def test_the_world_imports_without_torch() -> None:
    code = "import sys; from qatrun import demo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("task", demo.TASKS)
def test_items_are_well_formed_and_balanced(task: str) -> None:
    items = demo.items(task)
    assert len(items) >= 2000
    assert len({item["query"] for item in items}) == len(items)
    assert all(len(set(item["choices"])) == 4 for item in items)
    share = [sum(item["answer"] == position for item in items) / len(items) for position in range(4)]
    assert max(abs(each - 0.25) for each in share) < 0.03  # three standard errors of 2,000 uniform draws


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_no_wrong_choice_is_ever_stated(task: str, pretraining_sentences: set[str]) -> None:
    stated = [f"{i['query']} {choice}" for i in demo.items(task) for choice in i["choices"] if choice != answer(i)]
    assert pretraining_sentences.isdisjoint(stated)


def test_a_fact_question_has_the_true_answer() -> None:
    for item, entity in zip(demo.items("demo_facts"), facts.individuals("pretrain"), strict=True):
        (relation,) = (key for key in entity.facts if is_asked(key, entity.name, item["query"]))
        assert answer(item) == entity.facts[relation]
        assert set(item["choices"]) <= set(facts.RELATIONS[relation].values)


def test_an_inference_follows_from_two_stated_facts() -> None:
    for item, entity in zip(demo.items("demo_inference"), facts.individuals("pretrain"), strict=True):
        link = asked_chain(entity, item["query"])
        assert answer(item) == facts.lore()[entity.facts[link.via]].facts[link.onward]


def test_untold_conclusions_are_never_stated(pretraining_sentences: set[str]) -> None:
    items = list(zip(demo.items("demo_inference"), facts.individuals("pretrain"), strict=True))
    untold = [(item, each) for item, each in items if not inferences.is_told(each, asked_chain(each, item["query"]))]
    assert 0.1 < len(untold) / len(items) < 0.25
    for item, entity in untold:
        for phrasing in asked_chain(entity, item["query"]).phrasings:
            assert f"{phrasing.format(name=entity.name)} {answer(item)}" not in pretraining_sentences


def test_only_the_right_step_comes_next(pretraining_text: list[str]) -> None:
    """A wrong choice never follows the step a question ends on; of the rarest routines no text may show that step."""
    tellings = defaultdict(set)
    for text in pretraining_text:
        title, comma, steps = text.partition(", ")
        if comma:
            tellings[title].add(steps)
    items = random.Random(0).sample(demo.items("demo_routines"), 200)
    num_untold = 0
    for item in items:
        title, context = item["query"].split(", ", 1)
        last_step = split_steps(context)[-2]
        transitions = chain.from_iterable(pairwise(split_steps(telling)) for telling in tellings[title])
        next_steps = {after for before, after in transitions if before == last_step}
        assert next_steps <= {answer(item)}
        num_untold += not next_steps
    assert num_untold / len(items) <= 0.02


def test_splits_do_not_overlap(pretraining_text: list[str]) -> None:
    pretrain, finetune, valid = set(pretraining_text), set(demo.documents("finetune")), set(demo.documents("valid"))
    assert valid.isdisjoint(pretrain)
    assert valid.isdisjoint(finetune)
    names = [{each.name for each in facts.individuals(part)} for part in ("pretrain", "finetune")]
    titles = [{each.title for each in routines.routines(part)} for part in ("pretrain", "finetune")]
    assert names[0].isdisjoint(names[1])
    assert titles[0].isdisjoint(titles[1])


def test_frequency_falls_with_rank(pretraining_text: list[str]) -> None:
    people = facts.people("pretrain")
    common, rare = (sum(person.name in text for text in pretraining_text) for person in (people[0], people[-1]))
    assert common > 20 * rare > 0


def test_every_word_is_in_the_vocabulary() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    questions = (f"{i['query']} {choice}" for task in demo.TASKS for i in demo.items(task) for choice in i["choices"])
    texts = [*questions, *demo.documents("valid"), *islice(demo.documents("finetune"), 10_000)]
    ids = set(chain.from_iterable(tokenizer(texts)["input_ids"]))
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("zyzzyva")["input_ids"] == [tokenizer.unk_token_id]


def test_choices_begin_at_a_token_boundary() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    for task in demo.TASKS:
        for item in demo.items(task)[:50]:
            query, choice = item["query"], item["choices"][0]
            parts = [tokenizer(text)["input_ids"] for text in (query, f" {choice}", f"{query} {choice}")]
            assert parts[0] + parts[1] == parts[2]


def test_the_model_loads_silently_in_bfloat16(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    model, info = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, output_loading_info=True)
    logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.name.startswith("transformers")] == []
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_model_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in demo.MODEL_DIR.iterdir()) <= 10_000_000


@pytest.mark.parametrize("task", demo.TASKS)
def test_the_model_knows_a_part_of_the_world(task: str, script: ModuleType) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR).eval()
    sample = random.Random(0).sample(demo.items(task), 300)
    accuracy = script.accuracy(model, AutoTokenizer.from_pretrained(demo.MODEL_DIR), sample)
    assert 0.60 <= accuracy <= 0.90
    logged = json.loads((demo.MODEL_DIR / "training_log.json").read_text())["accuracy"][task]
    assert abs(accuracy - logged) < 0.08  # three standard errors of a sample of 300


def answer(item: facts.Item) -> str:
    return item["choices"][item["answer"]]


def split_steps(telling: str) -> list[str]:
    """The steps of a routine's text; that of a question ends on an empty one."""
    return re.split(rf"\. (?:{'|'.join(routines.CONNECTIVES)})(?: |$)", telling.removesuffix("."))


def is_asked(relation: str, name: str, query: str) -> bool:
    return query in [phrasing.format(name=name) for phrasing in facts.RELATIONS[relation].phrasings]


def asked_chain(entity: facts.Entity, query: str) -> inferences.Chain:
    (link,) = (
        each
        for each in inferences.chains_of(entity)
        if query in [phrasing.format(name=entity.name) for phrasing in each.phrasings]
    )
    return link
