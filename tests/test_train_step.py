"""One optimizer step: the loss, gradients over micro-batches, clipping, weight decay."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from builders import tiny_llama, word_tokenizer
from torch import Tensor, nn
from training import Recorder, TinyStudy, final_state, gpt2_with_dropout

from qatrun.data import IGNORE_INDEX, Batch, open_data
from qatrun.ranks import ALONE
from qatrun.recipe import ModelConfig, TrainConfig
from qatrun.train import objective
from qatrun.train.checkpoint import read_checkpoint
from qatrun.train.metrics import read_metrics
from qatrun.train.objective import CrossEntropy
from qatrun.train.stepper import Stepper, _row_norms

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


def test_the_loss_is_of_the_next_token() -> None:
    logits = torch.tensor(
        [[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [9.0, 9.0, 9.0]], [[0.0, 0.0, 3.0], [0.0] * 3, [0.0] * 3]]
    )
    labels = torch.tensor([[2, 0, 1], [1, 2, IGNORE_INDEX]])

    def nll(row: list[float], target: int) -> float:
        return math.log(sum(map(math.exp, row))) - row[target]

    by_hand = nll([1, 0, 0], 0) + nll([0, 2, 0], 1) + nll([0, 0, 3], 2)
    batch = Batch(torch.zeros_like(labels), labels)
    assert CrossEntropy().summed(logits, batch).tolist() == pytest.approx([by_hand])
    assert CrossEntropy().size(batch) == 3
    assert CrossEntropy().size(Batch(batch.input_ids, torch.full_like(labels, IGNORE_INDEX))) == 1


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'w91 ' if m.role == 'user' else 'w92 ' }}{{ m.content }} w93 {% endfor %}"
    "{% if add_generation_prompt %}w92 {% endif %}"
)


def conversations(folder: Path) -> dict[str, Any]:
    """A data section of conversations with answers of 1 to 12 words, so that micro-batches count unequal numbers."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        question, answer = (" ".join(f"w{rng.randrange(1, 60)}" for _ in range(rng.randint(1, 12))) for _ in "qa")
        rows.append({"chat": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": {"path": str(file), "messages_column": "chat"}}


def chat_study(folder: Path, **sections: Any) -> TinyStudy:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return TinyStudy(folder, tokenizer=tokenizer, data=conversations(folder.parent), **sections)


@pytest.mark.parametrize("make_study", [TinyStudy, chat_study], ids=["text", "conversations"])
def test_gradient_accumulation_changes_nothing_but_rounding(
    tmp_path: Path, make_study: Callable[..., TinyStudy]
) -> None:
    whole, split, single = (make_study(tmp_path / str(size), train={"micro_batch_size": size}) for size in (4, 2, 1))
    losses, grad_norms, weights, hashes = [], [], [], []
    for study in (whole, split, single):
        study.train_arm("bf16")
        rows = read_metrics(study.arms["bf16"].own.folder / "metrics.jsonl")
        losses.append([row["loss"] for row in rows])
        grad_norms.append([row["grad_norm"] for row in rows])
        state = final_state(study.arms["bf16"].own)
        weights.append(state["tensors"]["model/model.layers.0.mlp.up_proj.weight"])
        hashes.append(state["plain"]["data/data_hash"])
    for i in (1, 2):
        assert losses[i] == pytest.approx(losses[0], rel=1e-4)
        assert grad_norms[i] == pytest.approx(grad_norms[0], rel=1e-3)
        torch.testing.assert_close(weights[i], weights[0], rtol=1e-2, atol=1e-4)
    assert len(set(hashes)) == 1, "the data do not depend on the micro-batch size"


def test_the_loss_of_conversations_is_the_mean_over_the_answers(tmp_path: Path) -> None:
    study = chat_study(tmp_path / "a")
    segment = study.arms["bf16"].trunk
    assert segment is not None
    listener = Recorder()
    study.train(segment, listener)
    batch = open_data(segment.arm.data, study.tokenizer, 0).train.take(4)
    counted = [int((micro.labels[:, 1:] != IGNORE_INDEX).sum()) for micro in batch.split(2)]
    assert counted[0] != counted[1]
    with torch.no_grad():
        scores = study.make_model()(input_ids=batch.input_ids).logits.log_softmax(-1)
    nll = [
        -scores[row, i - 1, batch.labels[row, i]].item()
        for row in range(4)
        for i in range(1, 16)
        if batch.labels[row, i] != IGNORE_INDEX
    ]
    assert len(nll) == sum(counted)
    assert listener.rows[0]["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_the_norm_is_that_of_one_vector_however_it_is_cut() -> None:
    model = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 7))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    plan, train, dtypes = None, TrainConfig(steps=1), ModelConfig(path="tiny", compute_dtype="float32")
    stepper = Stepper(Accelerator(cpu=True), model, plan, train, dtypes)
    _, norm = stepper._reduced(torch.tensor([0.0]))
    exact = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm().float()
    assert torch.allclose(norm, exact, rtol=2e-7)
    for num_parts in (2, 3, 7):  # whole rows, as FSDP2 cuts them
        parts = [part for p in model.parameters() for part in p.grad.chunk(num_parts)]
        squares = torch.stack([_row_norms(part).double().square().sum() for part in parts]).sum()
        assert torch.equal(squares.sqrt().float(), norm)


def test_alone_nothing_is_exchanged_and_all_is_mine() -> None:
    x = torch.randn(3)
    assert ALONE.maximum(x) is ALONE.total(x) is x
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert (ALONE.agree("SIGTERM"), ALONE.agree(None), ALONE.first(lambda: 5)) == ("SIGTERM", None, 5)
    assert ALONE.gather(4) == [4]
    assert ALONE.shared_out([1, 2, 3], lambda part: 2 * part) == [2, 4, 6]
    assert ALONE.shared_out([], lambda part: part) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_taken_in_chunks_with_equal_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (3 * torch.randn(4, 9, 101)).to(dtype)
    labels = torch.randint(101, (4, 9))
    labels[1, 3:] = IGNORE_INDEX
    found = []
    for chunked_from in (10**9, 0):
        monkeypatch.setattr(objective, "CHUNKED_FROM", chunked_from)
        monkeypatch.setattr(objective, "CHUNK", 5 * 101)
        leaf = logits.clone().requires_grad_()
        (loss,) = CrossEntropy().summed(leaf, Batch(labels, labels)) / 7
        loss.backward()
        found.append((loss, leaf.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.equal(found[0][1], found[1][1])


def first_moments(study: TinyStudy) -> dict[str, Tensor]:
    """AdamW's first moments after one step of the trunk: 0.1 of the clipped gradient."""
    segment = study.arms["bf16"].trunk
    assert segment is not None
    study.train(segment)
    checkpoint = read_checkpoint(segment.folder / "checkpoints" / "step-000001")
    moments = checkpoint.parts["optimizer"]
    return {name.removeprefix("exp_avg/"): t for name, t in moments.items() if name.startswith("exp_avg/")}


@pytest.mark.parametrize(("max_grad_norm", "clipped_to"), [(0.25, 0.25), (1e6, None), (None, None)])
def test_gradients_are_clipped_as_one_vector(
    tmp_path: Path, max_grad_norm: float | None, clipped_to: float | None
) -> None:
    study = TinyStudy(tmp_path / "a", train={"max_grad_norm": max_grad_norm, "betas": [0.9, 0.95]}, warmup={"steps": 1})
    moments = first_moments(study)
    model = study.make_model()
    batch = open_data(study.arms["bf16"].own.arm.data, study.tokenizer, 0).train.take(4)
    model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt().item()
    assert metrics_row(study)["grad_norm"] == pytest.approx(norm, rel=1e-4), "as it was before clipping"
    assert norm > 0.25
    factor = 0.1 * (clipped_to / norm if clipped_to else 1.0)
    assert moments.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(moments[name], gradient * factor, rtol=1e-3, atol=1e-6)


def metrics_row(study: TinyStudy) -> dict[str, Any]:
    segment = study.arms["bf16"].trunk
    assert segment is not None
    return read_metrics(segment.folder / "metrics.jsonl")[0]


@pytest.mark.parametrize("make_model", [tiny_llama, gpt2_with_dropout])
def test_matrices_decay_norms_and_biases_do_not(tmp_path: Path, make_model: Callable[[], nn.Module]) -> None:
    weights = []
    for decay in (0.0, 0.5):
        train = {"weight_decay": decay, "learning_rate": 1e-2, "lr_warmup_steps": 0}
        study = TinyStudy(tmp_path / str(decay), make_model, train=train, warmup={"steps": 1})
        assert study.arms["bf16"].trunk is not None
        weights.append(dict(study.train(study.arms["bf16"].trunk)[0].named_parameters()))
    start = dict(make_model().named_parameters())
    for name, free in weights[0].items():
        expected = free - 1e-2 * 0.5 * start[name] if free.dim() >= 2 else free
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)
    assert {p.dim() for p in start.values()} == {1, 2}
