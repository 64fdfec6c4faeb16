"""Two processes compute what one does, bit for bit: a sum of two has no order, so a wrong factor, lost amax or stale weight
shows. Each fault below is planted and must be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from builders import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from worlds import in_world

from qatrun import ranks
from qatrun.data import IGNORE_INDEX, Batch
from qatrun.quant import FakeQuantLinear, Latest, Mode, QTensor, Quantizer, QuantState, make_plan
from qatrun.quant.tally import Tally
from qatrun.ranks import world
from qatrun.recipe import ModelConfig, QatConfig, TrainConfig
from qatrun.train import coded_gather, sharding
from qatrun.train.sharding import whole
from qatrun.train.stepper import Stepper

STEPS, SWITCH, SEQ_LEN = 6, 2, 16
WINDOW = {"scaling": {"window": 3}}
SETTINGS: dict[str, dict[str, Any]] = {
    "hif8": {},
    "bf16 products": {"compute_dtype": "bfloat16"},
    "gradients and codes": {"qat": {"grad_output": {}, "clip": "target", "saved_activations": "codes", **WINDOW}},
    "checkpointed": {"checkpointing": True},
    "int8 dynamic": {"qat": {"format": "int8", "scaling": {"type": "dynamic"}}},
    "per channel and token": {
        "qat": {
            "format": "fp8_e4m3",
            "weight": {"granularity": "per_channel"},
            "input": {"granularity": "per_token"},
            **WINDOW,
        }
    },
    "gpt2": {"make": "gpt2"},
    "mixture": {"make": "mixtral"},
}


def batch_of(step: int, num: int) -> Batch:
    """Sequences with unlike numbers of targets, so that a mean of means shows."""
    ids = torch.randint(VOCAB_SIZE, (num, SEQ_LEN), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    for row in range(num):
        labels[row, : (row * 7 + step * 3) % 12] = IGNORE_INDEX
    return Batch(ids, labels)


def trained(
    num_sequences: int = 4,
    *,
    qat: dict[str, Any] = WINDOW,
    compute_dtype: str = "float32",
    checkpointing: bool = False,
    make: str = "llama",
    learning_rate: float = 1e-2,
) -> dict[str, Tensor]:
    """What a few steps of micro-batches of 2 come to, in the world at hand."""
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}[make]()
    train = TrainConfig(
        steps=STEPS, global_batch_size=num_sequences, micro_batch_size=2, gradient_checkpointing=checkpointing
    )
    dtypes = ModelConfig(path="tiny", compute_dtype=compute_dtype)
    stepper = Stepper(Accelerator(cpu=True), model, make_plan(model, QatConfig(**qat)), train, dtypes)
    assert stepper.quant is not None
    rows: dict[str, list[Tensor]] = {"loss": [], "norm": [], "amax": [], "scale": [], "statistics": []}
    for step in range(STEPS):
        stepper.quant.enter(Mode.QUANTIZE if step >= SWITCH else Mode.OBSERVE)
        stepper.quant.tally.measures_noise = step % 2 == 0
        taken = stepper.step(batch_of(step, num_sequences), learning_rate)
        found = (taken.loss, taken.grad_norm, stepper.quant.scales.history[0], stepper.quant.scales.scale)
        for row, value in zip(rows.values(), (*found, stepper.quant.tally.take()), strict=True):
            row.append(value.clone())
    traces = {name: torch.stack(values) for name, values in rows.items()}
    return traces | {f"weights/{name}": whole(p.detach()) for name, p in model.named_parameters()}


def trained_by_rounds() -> dict[str, Tensor]:
    return trained(qat={"scaling": {"unit": "microbatch", "window": 3}})


def all_trained() -> list[dict[str, Tensor]]:
    return [*(trained(**settings) for settings in SETTINGS.values()), trained_by_rounds()]


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """What is not the same to the bit."""
    return {name.split("/")[0] for name in one if not torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7))}


@cache
def alone(name: str) -> dict[str, Tensor]:
    return trained(**SETTINGS[name])


@pytest.fixture(scope="module")
def on_two() -> list[list[dict[str, Tensor]]]:
    return in_world(2, all_trained)


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=list(SETTINGS))
def test_two_processes_are_one(on_two: list[list[dict[str, Tensor]]], number: int, one_thread: None) -> None:
    expected = alone(list(SETTINGS)[number])
    for of_process in on_two:
        assert differing(expected, of_process[number]) == set()
    assert expected["loss"].isfinite().all()
    assert expected["statistics"][SWITCH:, :, 3].ge(0).all()


def test_a_unit_of_micro_batches_is_a_round_of_all_processes(
    on_two: list[list[dict[str, Tensor]]], one_thread: None
) -> None:
    """Of one each, which are a step."""
    assert differing(alone("hif8"), on_two[0][-1]) == set()


# ------------------------------------------------------------------------------------------------------- planted faults
def averaged_gradients(patch: pytest.MonkeyPatch) -> None:
    set_factor = sharding.FSDPModule.set_gradient_divide_factor
    patch.setattr(sharding.FSDPModule, "set_gradient_divide_factor", lambda self, _: set_factor(self, 2.0))


def own_amax(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ranks._Processes, "maximum", lambda self, x: x)


def own_statistics(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tally, "share", lambda self, world: None)


def own_norm(patch: pytest.MonkeyPatch) -> None:
    total = ranks._Processes.total
    patch.setattr(ranks._Processes, "total", lambda self, x: x if x.numel() == 2 else total(self, x))


def every_micro_batch_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ranks._Processes, "mine", lambda self, parts: parts)


def stale_weight(patch: pytest.MonkeyPatch) -> None:
    kept: dict[int, Tensor] = {}

    def effective_weight(self: FakeQuantLinear) -> Tensor:
        return kept.setdefault(id(self), self.weight.detach().clone())

    patch.setattr(FakeQuantLinear, "effective_weight", effective_weight)
    patch.setattr(Quantizer, "same_in_parts", lambda self: False)


def rounded_on_the_wire(patch: pytest.MonkeyPatch) -> None:
    lossy = partial(sharding.fully_shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    patch.setattr(sharding, "fully_shard", lossy)


def stale_codes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Latest, "forget", lambda self, _=None: None)
    patch.setattr(QuantState, "generation", lambda self: 0)


def codes_by_scales_of_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantizer, "same_in_parts", lambda self: self.state.mode is Mode.QUANTIZE)


def codes_without_their_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(coded_gather, "QTensor", lambda grid, values, codes, scale, *_: QTensor(grid, values, codes, scale))


# Fault -> what it must change, under which settings.
FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[set[str], str]] = {
    averaged_gradients: ({"norm"}, "hif8"),
    own_amax: ({"amax"}, "hif8"),
    own_statistics: ({"statistics"}, "hif8"),
    own_norm: ({"norm"}, "hif8"),
    every_micro_batch_twice: ({"norm"}, "hif8"),
    stale_weight: ({"weights"}, "hif8"),
    rounded_on_the_wire: ({"amax"}, "hif8"),
    stale_codes: ({"weights"}, "hif8"),
    codes_by_scales_of_parts: ({"weights"}, "int8 dynamic"),
    codes_without_their_mask: ({"weights"}, "gradients and codes"),
}


def trained_with_each() -> list[dict[str, Tensor]]:
    found = []
    for fault, (_, name) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            found.append(trained(**SETTINGS[name]))
    return found


@pytest.fixture(scope="module")
def faulty() -> list[dict[str, Tensor]]:
    return in_world(2, trained_with_each)[0]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault.__name__ for fault in FAULTS])
def test_a_fault_shows(faulty: list[dict[str, Tensor]], number: int, one_thread: None) -> None:
    changed, name = list(FAULTS.values())[number]
    assert differing(alone(name), faulty[number]) >= changed


# ------------------------------------------------------------------------------------------------- more than two of them
def three_ways() -> tuple[dict[str, Tensor], bool]:
    found = trained(6, learning_rate=1e-5)
    everywhere = world().gather(
        {name: value for name, value in found.items() if name in ("amax", "scale", "statistics")}
    )
    return found, all(not differing(everywhere[0], other) for other in everywhere)


def test_three_processes_with_uneven_shards(one_thread: None) -> None:
    """Sums of three have an order: all is equal up to that, and to the bit on all processes."""
    alone = trained(6, learning_rate=1e-5)
    (found, same), *_ = in_world(3, three_ways)
    assert same
    assert torch.equal(alone["amax"][0], found["amax"][0])
    for name, value in alone.items():
        assert torch.allclose(value.nan_to_num(7), found[name].nan_to_num(7), rtol=1e-4, atol=1e-6), name


class Counted:
    """Gathers as FSDP does, and counts the bytes."""

    num_bytes = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made = torch.empty(*size, dtype=dtype, device=device)
        self.num_bytes += made.nbytes
        return made

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def gathered() -> tuple[dict[str, int], int, int, int]:
    """(Bytes that a forward and its backward gather, by what it is; bytes of weights that this process keeps after a
    forward on their grid; of full weights; of its part of them.)"""
    model, found = tiny_llama(), dict[str, int]()
    train, dtypes = TrainConfig(steps=1, micro_batch_size=2), ModelConfig(path="tiny", compute_dtype="float32")
    num_full = sum(p.nbytes for p in model.parameters())
    stepper = Stepper(Accelerator(cpu=True), model, make_plan(model, QatConfig(**WINDOW)), train, dtypes)
    counted, quant = Counted(), stepper.quant
    assert quant is not None
    for module in model.modules():
        if isinstance(module, sharding.FSDPModule):
            module.set_custom_all_gather(counted)
    for name in ("first", "coded", "noise", "coded again", "off"):
        quant.enter(Mode.OFF if name == "off" else Mode.QUANTIZE)
        quant.tally.measures_noise = name == "noise"
        counted.num_bytes = 0
        loss = stepper.loss(batch_of(0, 2), 10)
        if name == "coded":
            results = [m.quant.of["weight"].latest._result for m in model.modules() if isinstance(m, FakeQuantLinear)]
            held = sum(result.saved.nbytes for result in results if result is not None)
        loss.backward()
        quant.push()
        found[name] = counted.num_bytes
    return found, held, num_full, sum(sharding.own_part(p).nbytes for p in model.parameters())


def test_weights_travel_as_codes_and_none_outlives_its_layer() -> None:
    """A byte and a bit a value, forward and backward, in place of four bytes; what is kept are codes of the own rows."""
    num_quantized = sum(p.numel() for name, p in tiny_llama().named_parameters() if name.endswith("_proj.weight"))
    for found, held, num_full, num_own in in_world(2, gathered):
        assert found["first"] == found["noise"] == found["off"]  # the first has no scale yet
        assert found["first"] - found["coded"] == 2 * num_quantized * (4 - 9 / 8)
        assert found["coded again"] == found["coded"]
        assert held == num_quantized / 2
        assert num_own == pytest.approx(num_full / 2, rel=0.1)
