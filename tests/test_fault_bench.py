"""The fault bench: what it plants is what it says, and its rule and its matrix say what they should."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import StringIO
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, token_ids, word_tokenizer
from quantized_training import attached
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from faults import code, healthy, planted, small, studies, summary, tally  # noqa: E402
from faults.cells import Cell, Cells, Nats, keep, read_cells  # noqa: E402
from faults.labels import ANY, Judge, knows, label, mistakes, nats_of_each, questions  # noqa: E402
from faults.models import SCORED, Subject, write_texts  # noqa: E402
from faults.studies import FAULTS, FORMATS, STUDIES, WARMUP, Study, recipe_of  # noqa: E402
from qatrun.data import IGNORE_INDEX  # noqa: E402
from qatrun.records.diagnosis import Cause  # noqa: E402


def tiny_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=101, max_position_embeddings=64, **sizes)).eval()


def made(build: Any) -> Any:
    torch.manual_seed(0)
    return build(0).eval()


@pytest.mark.parametrize(
    ("make_model", "norm"),
    [
        (tiny_llama, "layers.0.input_layernorm"),
        (tiny_neox, "layers.0.input_layernorm"),
        (tiny_gpt2, "h.0.ln_1"),
        (lambda: made(small.opt), "decoder.layers.0.final_layer_norm"),
        (lambda: made(small.mixtral), "layers.0.post_attention_layernorm"),
    ],
)
def test_outlier_channels_are_there_and_preserve_the_function(make_model: Any, norm: str) -> None:
    model = make_model()
    weight = model.base_model.get_parameter(f"{norm}.weight")
    before, were = logits(model), weight.clone()
    planted.plant_outliers(model)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    grown = weight / were
    num_outliers = len(grown) // planted.EVERY_CHANNEL
    assert grown[:: planted.EVERY_CHANNEL].tolist() == [planted.OUTLIER] * num_outliers
    assert grown.sum() == len(grown) - num_outliers + num_outliers * planted.OUTLIER


@pytest.mark.parametrize("factor", [1, 8])
def test_scales_are_as_many_times_too_small_however_often_they_move(factor: int) -> None:
    with planted.underestimated(factor):
        model, state = attached(scaling={"window": 4})
        quantized_steps(model, state, num_steps=6)
    scales = state.scales
    torch.testing.assert_close(scales.scale, scales.history.amax(dim=0) / scales.target / factor)
    torch.testing.assert_close(scales.inv_scale, 1 / scales.scale)


def test_the_tokenizer_gives_every_token_the_id_of_another() -> None:
    vocabulary = word_tokenizer().get_vocab()
    dealt = planted.permuted(vocabulary, fixed={0, 1})
    assert sorted(dealt.values()) == sorted(vocabulary.values())
    assert dealt["<eos>"] == vocabulary["<eos>"]
    assert sum(dealt[token] == number for token, number in vocabulary.items()) < 10


def test_quiet_batches_hold_one_word_and_nothing_else() -> None:
    texts = (f"w1 w2 w3 {'w4 ' * (n % 7)}" for n in range(1000))
    rows = planted.bursty(texts, "w9", (1, 4), tokens_a_step=32, count=lambda text: len(text.split()) + 1)
    tokens = [token for row in rows for token in (*row.split(), "<end>")]
    steps = [tokens[at : at + 32] for at in range(0, 320, 32)]
    assert [set(step) == {"w9"} for step in steps] == [number in (1, 4) for number in range(10)]


def test_a_question_counts_the_right_answer_alone() -> None:
    item: Any = {"query": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 1}
    other: Any = {"query": "w1", "choices": ["w6"], "answer": 0}
    asked = questions(word_tokenizer(), [item, other])
    assert asked.input_ids.tolist() == [[2, 3, 5, 6], [2, 7, 0, 0]]
    no = IGNORE_INDEX
    assert asked.labels.tolist() == [[no, no, 5, 6], [no, 7, no, no]]


def test_answers_count_where_the_model_knows_them() -> None:
    model, tokenizer = tiny_llama(), word_tokenizer()
    rng = Random(0)
    items: list[Any] = [
        {"query": f"w{rng.randrange(90)} w{rng.randrange(90)}", "choices": ["w3", "w4 w5"], "answer": rng.randrange(2)}
        for _ in range(60)
    ]
    assert not knows(model, tokenizer, items)
    cost = [nats_of_each(model, questions(tokenizer, items, choice)) for choice in range(2)]
    known = [item | {"answer": int(one > other)} for item, one, other in zip(items, *cost, strict=True)]
    assert knows(model, tokenizer, known)


@pytest.mark.parametrize("text", ["headers", "docstrings", "source_code"])
def test_text_that_is_held_out_is_not_learned(text: str) -> None:
    learned, held = (
        {piece for piece in islice(part, 200) if len(piece) > code.PIECE // 2} for part in getattr(code, text)()
    )
    assert min(len(learned), len(held)) > 100
    assert not learned & held


def test_which_line_comes_next() -> None:
    text = "\n".join(f"line {n} = value" for n in range(30))
    for item in small.what_comes_next([text, text.replace("line", "other")], 20):
        shown, right = item["query"].splitlines(), item["choices"][item["answer"]]
        assert len(set(item["choices"])) == 4
        assert int(right.split()[1]) == int(shown[-1].split()[1]) + 1


def test_which_sentence_comes_next() -> None:
    text = " ".join(f"It was {n}." for n in range(30))
    (item,) = small.what_comes_next([text, text.replace("was", "is")], 1, small.sentences)
    assert item["choices"][item["answer"]].count(".") == 1
    assert item["query"].count("\n") == small.SHOWN_LINES - 1


def subject(folder: Path) -> Subject:
    for kind in ("own", "new"):
        write_texts(folder / "texts", kind, iter(["w1 w2", "w3"]), iter(["w4", "w5", "w6"]))
    rates = {"sane": 1e-4, "high": 1e-3, "mild": 1e-3, "hot": 3e-3, "ruin": 1e-2}
    return Subject("demo", "builtin:demo", folder / "texts", {"demo_facts": 0}, None, {}, rates)


def test_diagnosis_and_rule_read_other_documents(tmp_path: Path) -> None:
    subject(tmp_path)
    read = {part: (tmp_path / "texts" / f"own-{part}.jsonl").read_text().split() for part in ("valid", "judge")}
    assert read["valid"]
    assert not set(read["valid"]) & set(read["judge"]) - {'{"text":'}
    assert SCORED < 400


def test_every_fault_has_an_arm_and_a_twin_of_its_rate(tmp_path: Path) -> None:
    planned: set[str] = set()
    for study in STUDIES:
        if study.garbage or study.name in ("burst", "outlier", "tokenizer"):
            planned |= set(study.arms)
            continue
        arms = recipe_of(study, subject(tmp_path), 0, tmp_path, {1, 2, 4, 8}).arm_by_name
        for name, arm in arms.items():
            if arm.twin is not None:
                format, _, fault = name.partition("-")
                planned.add(fault)
                assert format in FORMATS
                assert arm.train.learning_rate == arms[arm.twin].train.learning_rate
                assert arm.qat is not None
                assert (arm.qat.clip == "target") == (FAULTS[fault].qat.get("clip") == "target")
        healthy = recipe_of(study, subject(tmp_path), 0, tmp_path, {1}).arm_by_name
        assert not any("8x" in name for name in healthy)
        assert all(arm.switch_step in (None, WARMUP) for arm in arms.values())
    assert planned | {"damaged"} == set(FAULTS)


def a_cell(
    fault: str = "none", *, training: float = 0.0, quantization: float = 0.01, answers: dict[str, Any] | None = None
) -> Cell:
    """A cell that training and quantization cost so much on both texts; each cause ruled out but for these answers."""
    found = dict.fromkeys(("input", "forgetting", "saturation", "resolution", "divergence"), "ruled out")
    causes = {
        name: given if isinstance(given, Cause) else Cause(answer=given)
        for name, given in (found | (answers or {})).items()
    }
    nats = [
        Nats(own=[value + noise, value - noise] * 30, new=[value + noise, value - noise] * 30, answer=[])
        for value, noise in ((1.0, 0.0), (1.0 + training, 0.01), (1.0 + training + quantization, 0.0))
    ]
    return Cell(
        model="m", seed=0, study="own", arm=f"hif8-{fault}", format="hif8", fault=fault, text="own", probe=False,
        start=nats[0], twin=nats[1], on=nats[2], answers=causes, sentence="a sentence", alarms={},
    )  # fmt: skip


HIDES = {"unit": "nats a token", "answer": "not shown"}


@pytest.mark.parametrize(
    ("cell", "truth", "wrong"),
    [
        (a_cell(), (), []),
        (a_cell(answers={"forgetting": "found"}), (), [("accused", "forgetting")]),
        (a_cell(training=0.035), (), []),
        (a_cell(training=0.049), (), []),  # open
        (a_cell(training=0.049, answers={"forgetting": "found"}), (), []),
        (a_cell(training=0.06), ("forgetting",), [("missed", "forgetting")]),
        (a_cell(training=0.06, answers={"forgetting": "found"}), ("forgetting",), []),
        (a_cell(training=0.06, answers={"forgetting": "not shown"}), ("forgetting",), [("hid", "forgetting")]),
        (a_cell("scale-8x", quantization=0.029), (), []),  # 0.01 is what the format costs anyway
        (a_cell("scale-8x", quantization=0.05), ("saturation",), [("missed", "saturation")]),
        (
            a_cell("scale-8x", quantization=0.05, answers={"saturation": Cause(**HIDES, could_hide=0.045)}),
            ("saturation",),
            [],
        ),
        (
            a_cell("scale-8x", quantization=0.05, answers={"saturation": Cause(**HIDES, could_hide=0.03)}),
            ("saturation",),
            [("hid", "saturation")],
        ),
        (
            a_cell("scale-8x", quantization=0.5, answers={"resolution": "found", "saturation": "found"}),
            ("saturation",),
            [("accused", "resolution")],
        ),
        (a_cell(quantization=0.05, answers={"divergence": "found"}), (ANY,), []),
        (a_cell(quantization=0.05), (ANY,), [("missed", ANY)]),
        (a_cell(training=2.0, quantization=0.1, answers={"forgetting": "found"}), ("forgetting",), []),  # two that part
        (a_cell("words", training=0.5, answers={"forgetting": "found"}), ("input",), [("missed", "input")]),
        (a_cell("words", answers={"input": "found", "resolution": "found"}), ("input",), []),
        (a_cell("words").model_copy(update={"alarms": {"input": 1}}), ("input",), []),
        (a_cell().model_copy(update={"warned": ["at random"]}), (), [("accused", "input")]),
        (a_cell("damaged").model_copy(update={"answers": {}}), ("damaged",), [("missed", "damaged")]),
        (a_cell("damaged").model_copy(update={"answers": {}, "refused": "changed"}), ("damaged",), []),
    ],
)  # fmt: skip
def test_the_rule_and_what_is_wrong_by_it(cell: Cell, truth: tuple[str, ...], wrong: list[tuple[str, str]]) -> None:
    found = label(cell, FAULTS[cell.fault].causes, a_cell())
    assert found.truth == truth
    assert list(mistakes(cell, found)) == wrong


def test_long_answers_have_the_line_of_a_text_of_as_many_tokens() -> None:
    answers = [Nats(own=[1.0] * 40, new=[1.0] * 40, answer=[value] * 40) for value in (1.0, 1.3)]
    nats = {"start": answers[0], "twin": answers[0], "on": answers[1]}
    short = a_cell().model_copy(update={**nats, "answer_tokens": 2.0})
    long = short.model_copy(update={"answer_tokens": 20.0})
    healthy = short.model_copy(update={"on": answers[0]})
    assert [label(cell, (), healthy).truth for cell in (short, long)] == [(ANY,), ()]


def test_the_summary_counts_and_names_what_is_wrong(tmp_path: Path) -> None:
    missed = a_cell("scale-8x", quantization=0.5).model_copy(update={"alarms": {"saturation": WARMUP + 3}})
    keep(tmp_path / "m" / "seed-0" / "cells.json", [a_cell(), a_cell("high", answers={"forgetting": "not shown"})])
    keep(tmp_path / "m" / "seed-0" / "cells.json", [a_cell("high"), missed])
    text = StringIO()
    wrong = summary.summarize(read_cells(tmp_path), tmp_path / "faults.csv", Console(file=text, width=200))
    assert wrong == 1
    assert "m seed 0 own/hif8-scale-8x (without probe): missed saturation" in text.getvalue()
    rows = tally.read_csv(tmp_path / "faults.csv")
    assert [row["fault"] for row in rows] == ["none", "high", "scale-8x"]
    assert [(row["label"], row["found"], row["wrong"], row["alarm_delay"]) for row in rows[1:]] == [
        ("", "ruled out", "", ""),
        ("saturation", "ruled out", "missed:saturation", "3"),
    ]
    (of_cell, *_) = tally.alarms(rows, [])
    assert of_cell[1:8] == ("1", "1", "2 %", "3 (3 to 3)", "3", "0", "71 %")
    assert isinstance(Cells(cells=[missed]), Cells)


def test_documents_say_what_the_cells_say() -> None:
    rows, healthy = (tally.read_csv(SCRIPTS / "bench_results" / name) for name in ("faults.csv", "healthy.csv"))
    root = SCRIPTS.parent
    document = (root / "docs" / "fault-bench.md").read_text(encoding="utf-8")
    right = tally.markdown(tally.DIAGNOSIS, tally.diagnosis(rows))
    assert right in document
    assert tally.markdown(tally.ALARMS, tally.alarms(rows, healthy)) in document
    assert f"{len(rows)} cells" in document
    assert right in (root / "README.md").read_text(encoding="utf-8")


def test_a_mistake_is_counted_once_and_shares_have_their_upper_ends() -> None:
    cell = {"model": "demo", "seed": "3", "label": "forgetting", "open": "", "found": "forgetting", "wrong": ""}
    rows = [cell] * 18 + [
        {**cell, "wrong": "missed:resolution accused:divergence"},
        {**cell, "wrong": "hid:forgetting"},
    ]
    rows += [{**cell, "label": "", "found": "not shown"}, {**cell, "label": "", "open": "forgetting"}]
    assert tally.diagnosis(rows)[-1] == ("all, judging", "20", "0", "1", "1", "32 %", "1", "0", "98 %", "1", "1")


def test_healthy_arms_over_seeds_have_a_row_each(tmp_path: Path) -> None:
    arm = tmp_path / "m" / "healthy" / "seed-100" / "own" / "hif8-none"
    arm.mkdir(parents=True)
    (arm / "result.json").write_text("{}")
    (arm / "alarms.jsonl").write_text("")
    assert list(healthy.rows(tmp_path)) == [("m", "100", "own", "hif8", "")]


def test_a_damaged_layer_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    codes = token_ids(64).to(torch.uint8)
    save_file({"codes": codes, "other": torch.ones(4, 4)}, file)
    before = planted.damage(file)
    assert (load_file(file)["codes"] != codes).float().mean() > 0.5
    assert torch.equal(load_file(file)["other"], torch.ones(4, 4))
    file.write_bytes(before)
    assert torch.equal(load_file(file)["codes"], codes)


class Silent:
    """A display that shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_a_study_is_run_labelled_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "SCORED", 4)
    monkeypatch.setattr(studies, "STEPS", 12)
    monkeypatch.setattr(studies, "WARMUP", 4)
    monkeypatch.setattr(studies, "SEQ_LEN", 16)
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rng = Random(0)
    texts = [" ".join(f"w{rng.randrange(1, 90)}" for _ in range(30)) for _ in range(400)]
    for kind in ("own", "new"):
        write_texts(tmp_path / "texts", kind, iter(texts[:200]), iter(texts[200:]))
    tiny = replace(subject(tmp_path), model=str(tmp_path / "model"))
    judge = Judge(tiny, 16)
    study = Study("new", "new", True, {"none": ("hif8",), "scale-8x": ("hif8",)})
    cells = studies.run(study, tiny, judge, 0, tmp_path, Silent())
    assert [cell.fault for cell in cells] == ["none", "scale-8x"]
    assert cells[0].twin == cells[1].twin != cells[1].on
    assert cells[0].start.own == pytest.approx(cells[0].start.new)
    assert "saturation" not in cells[0].alarms
    assert "saturation" in cells[1].alarms
    asked: list[set[str]] = []
    monkeypatch.setattr(studies, "run_study", lambda recipe, *_, **__: asked.append(set(recipe.arms)))
    assert studies.run(study, tiny, judge, 0, tmp_path, Silent()) == cells
    assert asked == [{"bf16", "hif8-none", "hif8-scale-8x"}]  # a study takes more arms, not fewer
