"""The training loop: runs that are stopped and resumed, gradients, losses, scales, and how a run ends."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_llama, word_tokenizer
from torch import Tensor, nn
from training import Recorder, TinyStudy, ctrl_c, differences, final_state, gpt2_with_dropout

from qatrun.data import IGNORE_INDEX, open_data
from qatrun.errors import Interrupted, NonFiniteError
from qatrun.quant import Mode, QuantState
from qatrun.train import latest_checkpoint, read_checkpoint, read_metrics
from qatrun.train.loop import FLUSH_EVERY, summed_loss
from qatrun.train.nonfinite import first_bad_tensors

STEPS, SWITCH = 7, 3


pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


def metrics_of(study: TinyStudy, arm: str) -> list[dict[str, Any]]:
    return read_metrics(study.arms[arm].own.folder / "metrics.jsonl")


# Loss and gradients


def test_the_loss_is_of_the_next_token() -> None:
    logits = torch.tensor(
        [[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [9.0, 9.0, 9.0]], [[0.0, 0.0, 3.0], [0.0] * 3, [0.0] * 3]]
    )
    labels = torch.tensor([[2, 0, 1], [1, 2, IGNORE_INDEX]])

    def nll(row: list[float], target: int) -> float:
        return math.log(sum(map(math.exp, row))) - row[target]

    by_hand = nll([1, 0, 0], 0) + nll([0, 2, 0], 1) + nll([0, 0, 3], 2)
    assert summed_loss(logits, labels).item() == pytest.approx(by_hand)


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
        rows = metrics_of(study, "bf16")
        losses.append([row["loss"] for row in rows])
        grad_norms.append([row["grad_norm"] for row in rows])
        state = final_state(study.arms["bf16"].own)
        weights.append(state["tensors"]["model/model.layers.0.mlp.up_proj.weight"])
        hashes.append(state["progress"]["data"]["data_hash"])
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


def first_moments(study: TinyStudy) -> dict[str, Tensor]:
    """AdamW's first moments after one step of the trunk: 0.1 of the clipped gradient."""
    segment = study.arms["bf16"].trunk
    assert segment is not None
    study.train(segment)
    checkpoint = read_checkpoint(segment.folder / "checkpoints" / "step-000001")
    return {name.removeprefix("exp_avg/"): t for name, t in checkpoint.optimizer.items() if name.startswith("exp_avg/")}


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


# Scales across the switch


def test_the_first_qat_step_has_scales_from_a_full_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against amaxes of plain models with the weights of each step, over the micro-batches of each step."""
    at_switch: list[Mapping[str, float]] = []
    enter = QuantState.enter

    def recording(state: QuantState, mode: Mode) -> None:
        before = state.mode
        enter(state, mode)
        if mode is Mode.QUANTIZE and before is not mode:
            at_switch.append(dict(zip(state.scales.names, state.scales.scale.tolist(), strict=True)))

    monkeypatch.setattr(QuantState, "enter", recording)
    steps, window = 5, 3
    study = TinyStudy(
        tmp_path / "a",
        warmup={"steps": steps},
        train={"save_every": 1, "keep_last": 9, "steps": 9, "lr_warmup_steps": 0, "learning_rate": 3e-2},
        qat={"scaling": {"window": window}, "weight": {"target_amax": 7}},
    )
    study.train_arm()
    segments = study.arms["hif8"]
    assert segments.trunk is not None
    assert segments.own.plan is not None
    stream = open_data(segments.own.arm.data, study.tokenizer, 0).train
    amaxes: dict[str, list[float]] = {name: [] for name in map(str, segments.own.plan.slots())}
    for step in range(steps):
        model = study.make_model()
        if step:
            saved = read_checkpoint(segments.trunk.folder / "checkpoints" / f"step-{step:06d}").model
            model.load_state_dict(dict(saved), strict=False)
        seen: dict[str, float] = {}
        for name, module in model.named_modules():
            if f"{name}:input" in amaxes:
                module.register_forward_pre_hook(
                    lambda _m, args, key=f"{name}:input", seen=seen: seen.update(
                        {key: max(seen.get(key, 0.0), args[0].abs().max().item())}
                    )
                )
            if f"{name}:weight" in amaxes:
                seen[f"{name}:weight"] = module.weight.abs().max().item()
        for micro in stream.take(4).split(2):
            model(input_ids=micro.input_ids)
        for name, history in amaxes.items():
            history.append(seen[name])
    targets = {"input": 15, "weight": 7}
    expected = {name: max(amax[-window:]) / targets[name.rpartition(":")[2]] for name, amax in amaxes.items()}
    assert at_switch == [pytest.approx(expected, rel=1e-6)]
    assert any(max(amax[:-window]) > max(amax[-window:]) for amax in amaxes.values()), "older amaxes would show"


def test_observers_do_not_touch_a_bf16_arm(tmp_path: Path) -> None:
    """Weights of the BF16 arm are the same whether its trunk watched amax for another arm or not."""
    model = {"compute_dtype": "bfloat16"}
    qat = {"format": "hif8", "grad_output": {}, "scaling": {"window": 3}}
    watched = TinyStudy(tmp_path / "a", model=model, qat=qat)
    alone = TinyStudy(tmp_path / "b", model=model, arms={"bf16": {"qat": None}})
    for study in (watched, alone):
        study.train_arm("bf16")
    assert watched.arms["bf16"].trunk is not None
    trunk, _ = latest_checkpoint(watched.arms["bf16"].trunk.folder / "checkpoints")
    assert trunk is not None
    assert trunk.quant_tensors()["history"].count_nonzero() == trunk.quant_tensors()["history"].numel()
    one, other = (final_state(study.arms["bf16"].own) for study in (watched, alone))
    one["progress"].pop("identity")
    other["progress"].pop("identity")
    assert differences(one, other) == []


def test_quantizing_begins_at_the_switch_and_stays(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a", arms={"bf16": {"qat": None}, "hif8": {}, "late": {"qat": {"start_step": 5}}})
    for arm in study.arms:
        study.train_arm(arm)
    phases = {arm: [row["phase"] for row in metrics_of(study, arm)] for arm in study.arms}
    assert phases == {
        "bf16": ["bf16"] * STEPS,
        "hif8": ["bf16"] * SWITCH + ["qat"] * (STEPS - SWITCH),
        "late": ["bf16"] * 5 + ["qat"] * 2,
    }
    losses = {arm: [row["loss"] for row in metrics_of(study, arm)] for arm in study.arms}
    assert losses["late"][:5] == losses["bf16"][:5]
    assert losses["hif8"][:SWITCH] == losses["bf16"][:SWITCH]
    assert losses["hif8"][SWITCH] != losses["bf16"][SWITCH]
    assert losses["late"][5] != losses["bf16"][5]
    hashes = {final_state(study.arms[arm].own)["progress"]["data"]["data_hash"] for arm in study.arms}
    assert len(hashes) == 1


# How a run ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    study = TinyStudy(tmp_path / "a", train={"save_every": 100})
    with pytest.raises(Interrupted, match=rf"{number.name} at step 2 of trunk; saved") as raised:
        study.train_arm(make_listener=lambda: Recorder({2: lambda: os.kill(os.getpid(), number)}))
    assert raised.value.exit_code == 3
    assert study.arms["hif8"].trunk is not None
    checkpoint, _ = latest_checkpoint(study.arms["hif8"].trunk.folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a")

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        study.train_arm(make_listener=lambda: Recorder({2: twice}))


def poison(model: nn.Module, name: str, value: float) -> Callable[[], None]:
    def set_weight() -> None:
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = value

    return set_weight


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"loss nan at step 4 of hif8; first bad: parameter model.layers.1.mlp.up_proj.weight"),
        (3e38, r"(loss|gradient norm) (nan|inf) at step 4 of hif8; first bad: (output|gradient) of .*layers.1"),
    ],
)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_number_that_is_not_finite_stops_the_run(
    tmp_path: Path, compute_dtype: str, value: float, message: str
) -> None:
    settings: dict[str, Any] = {"model": {"compute_dtype": compute_dtype}, "warmup": {"steps": 0}}
    settings["qat"] = {"start_step": 5}
    healthy, poisoned = TinyStudy(tmp_path / "a", **settings), TinyStudy(tmp_path / "b", **settings)
    healthy.train_arm()
    models: list[nn.Module] = []
    make_model = poisoned.make_model

    def keep_model() -> Any:
        models.append(make_model())
        return models[-1]

    poisoned.make_model = keep_model
    segment = poisoned.arms["hif8"].own
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(NonFiniteError, match=message):
        poisoned.train(segment, Recorder({3: lambda: poison(models[-1], name, value)()}))
    poisoned.train(segment)
    assert differences(final_state(healthy.arms["hif8"].own), final_state(segment)) == []


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a")
    make_model = study.make_model
    name = "model.layers.0.self_attn.v_proj.weight"

    def with_a_bad_gradient() -> Any:
        model = make_model()
        model.get_parameter(name).register_hook(lambda gradient: gradient * math.inf)
        return model

    study.make_model = with_a_bad_gradient
    with pytest.raises(
        NonFiniteError, match=f"gradient norm (inf|nan) at step 1 of trunk; first bad: gradient of {name}"
    ):
        study.train_arm()


class _BadToken(nn.Module):
    """Token 2 makes its second layer overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.embed.weight[2] = 1e30
            self.second.weight.fill_(1e30)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden: Tensor = self.second(self.first(self.embed(input_ids)))
        return hidden


def test_the_bad_output_is_found_in_whatever_micro_batch_it_is() -> None:
    good, bad = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
    assert first_bad_tensors(_BadToken(), [good]) == []
    assert first_bad_tensors(_BadToken(), [good, bad]) == ["output of second"]


def test_the_gradient_that_went_bad_first_is_named_first() -> None:
    model = _BadToken()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert first_bad_tensors(model, [])[0] == "gradient of second.bias"


# Warnings, records, trackers


def test_a_first_loss_of_a_mere_guess_warns_and_a_trained_model_does_not(tmp_path: Path) -> None:
    listener = Recorder()
    untrained = TinyStudy(tmp_path / "a", train={"steps": 60, "lr_schedule": "constant"}, warmup={"steps": 40})
    trunk = untrained.arms["bf16"].trunk
    assert trunk is not None
    model, _ = untrained.train(trunk, listener)
    assert len(listener.warnings) == 1
    assert f"ln(vocabulary) = {math.log(101):.2f}" in listener.warnings[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def trained() -> Any:
        fresh = tiny_llama()
        fresh.load_state_dict(weights, strict=False)
        return fresh

    quiet = Recorder()
    study = TinyStudy(tmp_path / "b", trained)
    assert study.arms["bf16"].trunk is not None
    study.train(study.arms["bf16"].trunk, quiet)
    assert quiet.rows[0]["loss"] < 0.9 * math.log(101)
    assert quiet.warnings == []


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a", train={"lr_schedule": "linear", "learning_rate": 0.01})
    study.train_arm()
    rows = metrics_of(study, "hif8")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, STEPS + 1)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.005, *(0.002 * k for k in (5, 5, 4, 3, 2, 1))])
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    study = TinyStudy(tmp_path / "a")
    trunk = study.arms["hif8"].trunk
    assert trunk is not None
    study.train(trunk, trackers=["tensorboard"])
    (file,) = (file for file in trunk.folder.rglob("events.out.tfevents.*") if file.parent.name == "a")
    events = accumulator.EventAccumulator(str(file)).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in read_metrics(trunk.folder / "metrics.jsonl")])


@pytest.mark.parametrize("qat", [{}, {"grad_output": {}, "scaling": {"window": 3, "unit": "microbatch"}}], ids=str)
def test_how_often_the_device_is_read_changes_nothing(
    tmp_path: Path, qat: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    each_step, seldom = (TinyStudy(tmp_path / name, qat=qat, train={"save_every": 5}) for name in "ab")
    each_step.train_arm()
    monkeypatch.setitem(FLUSH_EVERY, "cpu", 4)
    seldom.train_arm()
    assert differences(final_state(each_step.arms["hif8"].own), final_state(seldom.arms["hif8"].own)) == []


def test_an_update_that_is_not_finite_is_held_back_until_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is bad at the second of four steps that are checked together."""
    monkeypatch.setitem(FLUSH_EVERY, "cpu", 4)
    study = TinyStudy(tmp_path / "a", warmup={"steps": 0}, train={"save_every": 7, "global_batch_size": 2})
    weights: list[torch.Tensor] = []
    name = "model.layers.0.self_attn.v_proj.weight"
    make_model = study.make_model

    def with_a_bad_second_gradient() -> Any:
        model = make_model()
        parameter = model.get_parameter(name)

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            weights.append(parameter.detach().clone())
            return gradient * math.inf if len(weights) in (2, 5) else None  # 5: when it is looked into

        parameter.register_hook(spoil)
        return model

    study.make_model = with_a_bad_second_gradient
    recorder = Recorder()
    with pytest.raises(
        NonFiniteError, match=rf"gradient norm (inf|nan) at step 2 of hif8; first bad: gradient of {name}"
    ):
        study.train(study.arms["hif8"].own, recorder)
    assert [row["step"] for row in recorder.rows] == [1]
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])
