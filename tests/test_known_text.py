"""The text of what the start model knew: which it is, that it is kept, and what a model writes by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from builders import VOCAB_SIZE, tiny_gpt2, tiny_llama
from torch.nn import functional as F
from training import Recorder
from transformers import GenerationConfig

from qatrun import demo
from qatrun.data import open_data, open_probe
from qatrun.errors import DamagedFileError, InputError
from qatrun.layout import StudyFolder
from qatrun.model import write_text
from qatrun.recipe import ModelConfig, Recipe, parse_recipe
from qatrun.study import known_text as known_text_module
from qatrun.study.known_text import KnownText, kinship, known_text
from qatrun.study.texts import has_order
from qatrun.tokenizer import load_tokenizer

NUM, SEQ_LEN = 32, 96


class TestWriting:
    def opinionated(self, make: Any = tiny_llama) -> Any:
        """A model that is far from uniform, and whose checkpoint asks for anything but its own distribution."""
        model = make()
        with torch.no_grad():
            model.get_input_embeddings().weight *= 12
        model.generation_config = GenerationConfig(
            do_sample=True, top_k=2, temperature=0.2, eos_token_id=list(range(50)), repetition_penalty=3.0, max_length=4
        )
        return model

    @pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
    def test_it_is_a_sample_of_the_models_own_distribution(self, make: Any) -> None:
        """Its mean NLL is then the model's entropy there: a cut or sharpened distribution falls short of it, and the end of
        a text would leave none of some tokens."""
        model = self.opinionated(make)
        ids = write_text(model, 3, 100, 40, seed=0, batch_size=64)
        assert ids.shape == (100, 40)
        assert set(ids[:, 0].tolist()) == {3}
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        excess = F.nll_loss(log_p.transpose(1, 2), ids[:, 1:], reduction="none") + (log_p.exp() * log_p).sum(-1)
        assert -float((log_p.exp() * log_p).sum(-1).mean()) < 0.95 * torch.tensor(VOCAB_SIZE).log()
        assert abs(float(excess.mean())) < 4 * float(excess.std()) / excess.numel() ** 0.5

    def test_it_is_the_same_again_and_leaves_no_trace(self) -> None:
        model = self.opinionated()
        settings, before = model.generation_config, torch.get_rng_state()
        once, again, other = (write_text(model, 3, 4, 9, seed=seed, batch_size=3) for seed in (0, 0, 1))
        assert torch.equal(once, again)
        assert not torch.equal(once, other)
        assert model.generation_config is settings
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_model_that_cannot_says_so(self) -> None:
        model = tiny_llama()
        model.generate = None
        with pytest.raises(InputError, match="it cannot write text: TypeError"):
            write_text(model, 3, 4, 9, seed=0, batch_size=4)


class TestKinship:
    def text(self, *, shift: int = 0, num: int = 60, seed: int = 0) -> torch.Tensor:
        """[num, 101] token ids of frequencies that fall off, with a separator that is no part of it."""
        shares = 1 / (1 + torch.arange(300.0))
        ids = torch.multinomial(shares, num * 101, replacement=True, generator=torch.Generator().manual_seed(seed))
        ids = (ids + shift) % 300 + 1
        return torch.where(torch.arange(len(ids)) % 7 == shift % 7, 0, ids).view(num, 101)

    def test_text_of_one_kind_is_as_near_as_halves_of_it(self) -> None:
        divergence, noise = kinship(self.text(), self.text(seed=1), [0]) or (9.0, 9.0)
        assert 0 < noise < 0.05
        assert divergence == pytest.approx(noise, rel=0.2)

    def test_another_kind_is_far_and_special_tokens_do_not_count(self) -> None:
        divergence, noise = kinship(self.text(), self.text(seed=1, shift=20), [0]) or (0.0, 0.0)
        assert divergence > noise + 2 * known_text_module.SAME_KIND
        with_special, _ = kinship(self.text(), self.text(seed=1), []) or (0.0, 0.0)
        without, _ = kinship(self.text(), torch.where(self.text(seed=1) == 0, 5, self.text(seed=1)), []) or (0.0, 0.0)
        assert without > with_special + 0.02  # what separators alone would say

    def test_nothing_is_told_of_too_little(self) -> None:
        assert kinship(self.text(num=15), self.text(seed=1), [0]) is None


def recipe_of(folder: Path, **data: Any) -> Recipe:
    sections = {
        "model": {"path": "builtin:demo", "compute_dtype": "float32"},
        "data": {"train": {"path": "builtin:demo", "split": "probe"}, "seq_len": SEQ_LEN, "valid_sequences": NUM}
        | data,
        "train": {"steps": 200},
        "warmup": {"steps": 10},
        "eval": {"tasks": {"demo_facts": 0}, "batch_size": 32},
    }
    return parse_recipe({"name": "a", "output_dir": str(folder), **sections})


def written(folder: Path, texts: Iterable[str]) -> dict[str, str]:
    """A source of these texts."""
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"path": str(file)}


def own_kind(folder: Path) -> dict[str, str]:
    return written(folder, islice(demo.documents("pretrain"), 200))


def another_kind(folder: Path) -> dict[str, str]:
    """The same words, those of the first letters of the alphabet only."""
    stories = islice(demo.documents("pretrain"), 400)
    return written(folder, (" ".join(word for word in story.split() if word[0].lower() < "k") for story in stories))


class TestChoice:
    def choose(self, folder: Path, **data: Any) -> tuple[KnownText, Recipe]:
        recipe = recipe_of(folder, **data)
        chosen = known_text(StudyFolder(folder / "a"), recipe, Recorder().on_warning)
        assert chosen is not None
        kept = KnownText.load(StudyFolder(folder / "a").start)
        assert torch.equal(kept.input_ids, chosen.input_ids)
        assert str(kept) == str(chosen)
        return chosen, recipe

    def test_text_that_is_given_is_taken(self, tmp_path: Path) -> None:
        chosen, recipe = self.choose(tmp_path, probe={"path": "builtin:demo", "split": "probe"})
        data, tokenizer = recipe.data, load_tokenizer(recipe.model)
        assert chosen.source == "given"
        expected = open_probe(data, tokenizer, 2 * NUM)  # for there is little
        assert expected is not None
        assert torch.equal(chosen.input_ids, expected)
        assert str(chosen) == f"data.probe, {2 * NUM} sequences of {SEQ_LEN} tokens"

    def test_held_out_text_of_the_kind_that_the_model_writes_is_taken(self, tmp_path: Path) -> None:
        chosen, recipe = self.choose(tmp_path, train=own_kind(tmp_path))
        assert chosen.source == "held-out"
        held_out = open_data(recipe.data, load_tokenizer(recipe.model), 0).valid.input_ids
        assert torch.equal(chosen.input_ids, held_out)
        assert "which the start model knows as well as what it writes (token frequencies 0." in str(chosen)

    def test_else_the_model_writes_its_own_which_is_kept_and_made_again_the_same(self, tmp_path: Path) -> None:
        chosen, recipe = self.choose(tmp_path, train=another_kind(tmp_path))
        assert chosen.source == "own writing"
        assert chosen.input_ids.shape == (2 * NUM, SEQ_LEN)
        assert "the held-out text is of another kind, or new (token frequencies 0." in str(chosen)
        file = StudyFolder(tmp_path / "a").start.known_text
        content = bytearray(file.read_bytes())
        content[-5] ^= 1  # a token id
        file.write_bytes(content)
        listener = Recorder()
        again = known_text(StudyFolder(tmp_path / "a"), recipe, listener.on_warning)
        assert again is not None
        assert torch.equal(again.input_ids, chosen.input_ids)
        (warning,) = listener.warnings
        assert (
            "known_text.safetensors cannot be read: its token ids are not those that were written; made again"
            in warning
        )

    def test_new_facts_in_familiar_words_are_not_what_it_knew(self, tmp_path: Path) -> None:
        """By its token frequencies the text is of the model's own kind; a loss that falls on it would hide what is lost."""
        chosen, _ = self.choose(tmp_path, train=written(tmp_path, islice(demo.documents("finetune"), 200)))
        assert chosen.source == "own writing"
        assert (chosen.divergence or 9) - (chosen.noise or 0) < known_text_module.SAME_KIND
        assert (chosen.surprise or 0) > known_text_module.AS_FAMILIAR

    def test_whether_the_tokenizer_fits_is_asked_of_foreign_text_and_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(known_text_module, "fits", lambda *_, **__: True)
        assert not self.choose(tmp_path, train=own_kind(tmp_path))[0].fits
        (tmp_path / "b").mkdir()
        words = " ".join(islice(demo.documents("pretrain"), 400)).split()
        shuffled = Random(0).sample(words, len(words))
        foreign = written(tmp_path / "b", (" ".join(shuffled[at : at + 50]) for at in range(0, len(shuffled), 50)))
        chosen, _ = self.choose(tmp_path / "b", train=foreign)
        assert chosen.fits
        assert KnownText.load(StudyFolder(tmp_path / "b" / "a").start).fits
        assert chosen.shows_fit(knew=False)
        given = KnownText(chosen.input_ids, "given")
        assert (given.shows_fit(knew=True), given.shows_fit(knew=False)) == (True, False)

    def test_a_model_that_cannot_write_is_not_watched_and_what_to_give_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_args: Any, **_settings: Any) -> torch.Tensor:
            raise InputError("it cannot write text: no cache")

        monkeypatch.setattr(known_text_module, "write_text", refuse)
        listener = Recorder()
        assert known_text(StudyFolder(tmp_path / "a"), recipe_of(tmp_path), listener.on_warning) is None
        (warning,) = listener.warnings
        assert warning.startswith("the start model writes no text of its own (it cannot write text: no cache)")
        assert "give data.probe" in warning
        with pytest.raises(DamagedFileError):
            KnownText.load(StudyFolder(tmp_path / "a").start)


def test_a_text_has_order_where_its_words_were_not_shuffled() -> None:
    tokenizer = load_tokenizer(ModelConfig(path=demo.BUILTIN))
    words = " ".join(islice(demo.documents("pretrain"), 200)).split()
    shuffled = Random(0).sample(words, len(words))
    in_order, at_random = (torch.tensor([tokenizer(" ".join(text))["input_ids"]]) for text in (words, shuffled))
    assert has_order(in_order, tokenizer)
    assert not has_order(at_random, tokenizer)
    assert not has_order(in_order[:, :50], tokenizer), "too little to tell"
