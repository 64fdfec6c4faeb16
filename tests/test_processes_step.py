"""Two processes compute what one does, bit for bit: a sum of two has no order, so a wrong factor, lost amax or stale weight
shows. Each fault below is planted and must be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from builders import VOCAB_SIZE, tiny_gpt2, tiny_llama
from torch import Tensor
from worlds import in_world

from qatrun import ranks
from qatrun.data import IGNORE_INDEX, Batch
from qatrun.quant import FakeQuantLinear, Mode, make_plan
from qatrun.quant.tally import Tally
from qatrun.ranks import world
from qatrun.recipe import ModelConfig, QatConfig, TrainConfig
from qatrun.train import sharding
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
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[make]()
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


def all_trained() -> list[dict[str, Tensor]]:
    return [trained(**settings) for settings in SETTINGS.values()]


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """What is not the same to the bit."""
    return {name.split("/")[0] for name in one if not torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7))}


@pytest.fixture(scope="module")
def on_two() -> list[list[dict[str, Tensor]]]:
    return in_world(2, all_trained)


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=list(SETTINGS))
def test_two_processes_are_one(on_two: list[list[dict[str, Tensor]]], number: int, one_thread: None) -> None:
    alone = trained(**list(SETTINGS.values())[number])
    for of_process in on_two:
        assert differing(alone, of_process[number]) == set()
    assert alone["loss"].isfinite().all()
    assert alone["statistics"][SWITCH:, :, 3].ge(0).all()


def trained_by_rounds() -> dict[str, Tensor]:
    return trained(qat={"scaling": {"unit": "microbatch", "window": 3}})


def test_a_unit_of_micro_batches_is_a_round_of_all_processes(one_thread: None) -> None:
    """Of one each, which are a step."""
    assert differing(trained(), in_world(2, trained_by_rounds)[0]) == set()


# ------------------------------------------------------------------------------------------------------- planted faults
def no_fault() -> None: ...


def averaged_gradients() -> None:
    def halved(self: Any, factor: float) -> None:
        set_factor(self, 2.0)

    set_factor = sharding.FSDPModule.set_gradient_divide_factor
    sharding.FSDPModule.set_gradient_divide_factor = halved


def own_amax() -> None:
    ranks._Processes.maximum = lambda self, x: x


def own_statistics() -> None:
    Tally.share = lambda self, world: None


def own_norm() -> None:
    ranks._Processes.total = lambda self, x: x if x.numel() == 2 else total(self, x)


total = ranks._Processes.total


def every_micro_batch_twice() -> None:
    ranks._Processes.mine = lambda self, parts: parts


def stale_weight() -> None:
    kept: dict[int, Tensor] = {}

    def effective_weight(self: FakeQuantLinear) -> Tensor:
        return kept.setdefault(id(self), self.weight.detach().clone())

    FakeQuantLinear.effective_weight = effective_weight


def rounded_on_the_wire() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def lossy(module: Any, **settings: Any) -> Any:
        return fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), **settings)

    fully_shard = sharding.fully_shard
    sharding.fully_shard = lossy


FAULTS: dict[Callable[[], None], set[str]] = {
    averaged_gradients: {"norm"},
    own_amax: {"amax"},
    own_statistics: {"statistics"},
    own_norm: {"norm"},
    every_micro_batch_twice: {"norm"},
    stale_weight: {"weights"},
    rounded_on_the_wire: {"amax"},
}


def trained_with(fault: Callable[[], None]) -> dict[str, Tensor]:
    fault()
    return trained()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_shows(fault: Callable[[], None], one_thread: None) -> None:
    assert differing(trained(), in_world(2, trained_with, fault)[0]) >= FAULTS[fault]


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


def grids_held() -> tuple[int, int, int]:
    """Bytes of weights on their grid that are kept after a forward, of full weights, and of this process's part."""
    model = tiny_llama()
    train, dtypes = TrainConfig(steps=1, micro_batch_size=2), ModelConfig(path="tiny", compute_dtype="float32")
    num_full = sum(p.nbytes for p in model.parameters())
    stepper = Stepper(Accelerator(cpu=True), model, make_plan(model, QatConfig()), train, dtypes)
    assert stepper.quant is not None
    stepper.quant.enter(Mode.QUANTIZE)
    loss = stepper.loss(batch_of(0, 2), 10)
    results = [m.quant.of["weight"].latest._result for m in model.modules() if isinstance(m, FakeQuantLinear)]
    held = sum(result.saved.nbytes for result in results if result is not None)
    loss.backward()
    return held, num_full, sum(sharding.own_part(p).nbytes for p in model.parameters())


def test_no_full_weight_outlives_its_layer() -> None:
    for held, num_full, num_own in in_world(2, grids_held):
        assert held == 0
        assert num_own == pytest.approx(num_full / 2, rel=0.1)
