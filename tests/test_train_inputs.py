"""Bad input is named as what it is: by the loss of the first step, and by the order of a text before that."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qatrun import demo
from qatrun.data import IGNORE_INDEX, Batch
from qatrun.data.randomness import drawn_at_random
from qatrun.recipe import parse_recipe
from qatrun.report import dry_run
from qatrun.study import dry_run_of, preflight
from qatrun.train.first_loss import mistake_in_input

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DRAW = random.Random(0)
WORDS = ["".join(DRAW.choice(LETTERS) for _ in range(DRAW.randint(2, 9))) for _ in range(800)]
STORIES = [story for story, _ in zip(demo.documents("pretrain"), range(400), strict=False)]


def batch(num_kinds: int = 40, counted: int = 1024) -> Batch:
    """8 sequences of 129 tokens of even frequencies, of which the loss counts so many."""
    ids = torch.arange(8 * 129).view(8, 129) % num_kinds
    labels = ids.clone()
    labels[:, 1:].view(8, 128)[:, counted // 8 :] = IGNORE_INDEX
    return Batch(ids, labels)


class TestFirstLoss:
    """ln(512) is 6.24, ln(40) 3.69."""

    @pytest.mark.parametrize(
        ("loss", "held_out", "said"),
        [
            (3.5, None, None),
            (3.5, 3.0, None),
            (3.5, 1.3, "the start model's is 1.30 on held-out text of the same source: labels are shifted or masked"),
            (9.2, 3.2, "the start model's is 3.20 on held-out text of the same source: labels are shifted or masked"),
            (
                7.4,
                None,
                "far above ln(vocabulary) = 6.24, that of a mere guess: wrong data or another model's tokenizer",
            ),
            (
                7.4,
                7.1,
                "far above ln(vocabulary) = 6.24, that of a mere guess: wrong data or another model's tokenizer",
            ),
            (6.2, None, "near ln(vocabulary) = 6.24: a pretrained model that only guesses"),
            (4.1, None, "more than the 3.71 of token frequencies alone: the model knows nothing of this text"),
        ],
    )
    def test_it_tells_what_is_wrong(self, loss: float, held_out: float | None, said: str | None) -> None:
        found = mistake_in_input(loss, batch(), 512, held_out)
        assert (found is None) == (said is None)
        if said is not None:
            assert re.match(rf"the first loss is {loss:.2f}.*{re.escape(said)}", found or "")

    @pytest.mark.parametrize(("loss", "said"), [(7.4, "far above"), (6.9, None), (6.2, "near"), (4.1, None)])
    def test_a_text_with_order_is_one_however_foreign(self, loss: float, said: str | None) -> None:
        found = mistake_in_input(loss, batch(), 512, ordered=True)
        assert (found is None) == (said is None)
        assert said is None or said in (found or "")
        assert mistake_in_input(loss, batch(), 512, ordered=True, fits=True) is None
        assert mistake_in_input(loss, batch(), 512, fits=True) is not None

    @pytest.mark.parametrize("few", [batch(counted=512), Batch(batch().input_ids[:3], batch().labels[:3])])
    def test_frequencies_are_asked_only_of_enough_plain_text(self, few: Batch) -> None:
        """Answers may be of three words, each likelier than a model that does not know the task thinks."""
        assert mistake_in_input(4.1, few, 512) is None


class TestOrder:
    @pytest.mark.parametrize(
        ("texts", "what"),
        [
            (STORIES, None),
            (["".join(DRAW.choice(LETTERS + " ") for _ in range(8_000))], "characters"),
            (
                [" ".join("".join(DRAW.choice(LETTERS) for _ in range(DRAW.randint(2, 9))) for _ in range(4_000))],
                "characters",
            ),
            ([" ".join(DRAW.choice(WORDS[:100]) for _ in range(6_000))], "words"),
            ([" ".join(DRAW.choice(WORDS) for _ in range(6_000))], "words"),
        ],
    )
    def test_what_is_drawn_at_random_is_told(self, texts: list[str], what: str | None) -> None:
        assert drawn_at_random(texts) == what

    def test_stories_whose_words_are_shuffled_are_random_words(self) -> None:
        words = " ".join(STORIES).split()
        DRAW.shuffle(words)
        assert drawn_at_random([" ".join(words)]) == "words"

    @pytest.mark.parametrize(
        "text",
        ["", "a" * 9_000, "yes no " * 3_000, STORIES[0], " ".join(DRAW.choice(WORDS) for _ in range(1_500))],
        ids=["nothing", "one letter", "two words", "a short one", "too few words"],
    )
    def test_nothing_is_said_where_too_little_tells(self, text: str) -> None:
        assert drawn_at_random([text]) is None


def test_a_check_warns_of_what_would_train_but_is_hardly_meant(tmp_path: Path) -> None:
    text = tmp_path / "noise.jsonl"
    rows = (" ".join(DRAW.choice(WORDS[:100]) for _ in range(300)) for _ in range(30))
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "a",
        "model": {"path": "builtin:demo"},
        "data": {"train": {"path": str(text)}, "valid": {"path": "builtin:demo", "split": "valid"}, "seq_len": 32},
        "train": {"steps": 40, "lr_warmup_steps": 30},
        "warmup": {"steps": 10},
        "arms": {"bf16": {"qat": None}, "hif8": {}, "late": {"train": {"lr_warmup_steps": 40}}},
        "eval": {"tasks": {"demo_facts": 0}},
    }
    checked = preflight(parse_recipe(recipe))
    assert list(map(str, checked.warnings)) == [
        f"data.train.path -- the words of {text} follow each other as if drawn at random: is it the right text?",
        "train.lr_warmup_steps -- the learning rate still rises when most of the training is over (30 of 40 steps)",
        "arms.late.train.lr_warmup_steps -- the learning rate rises over all 40 steps: it reaches train.learning_rate in "
        "the last",
    ]
    with (console := Console(width=300)).capture() as shown:
        console.print(dry_run(dry_run_of(checked)))
    assert shown.get().count("warning: ") == 3
