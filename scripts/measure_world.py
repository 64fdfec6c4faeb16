"""What a training step takes in a world of several processes: time, memory of each, bytes sent; of a Llama with random
weights, on the CPU. The first process alone has them, the others begin on the meta device, as in a study.

    python scripts/measure_world.py                                         # one process
    torchrun --nproc_per_node 2 scripts/measure_world.py                    # two
    torchrun --nproc_per_node 2 scripts/measure_world.py --like openpangu --layers 4 --steps 1

Memory is what a process takes beyond what it took before there was a model; the first one's peak is that of its steps, not
of handing the weights out. Bytes are those that went over the loopback device (Linux) while the steps ran, whoever sent
them: on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from qatrun import ranks
from qatrun.data import Batch
from qatrun.numerics import bfloat16_products
from qatrun.quant import Mode, coverage, make_plan, survey
from qatrun.recipe import QatConfig, parse_recipe
from qatrun.study.estimate import memory_bytes
from qatrun.text import readable_size
from qatrun.train.memory import peak_memory_bytes, reset_peak_memory
from qatrun.train.stepper import Stepper

SHAPES = {
    "35m": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 8192},
    "openpangu": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 128,
        "vocab_size": 153376,
        "attention_bias": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=SHAPES, default="35m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4, help="in a step, of all processes together")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    world = ranks.start()
    torch.set_num_threads(1)
    with ranks.entered(world):
        measure(arguments, world)


def measure(arguments: argparse.Namespace, world: ranks.World) -> None:
    config = LlamaConfig(
        **SHAPES[arguments.like], num_hidden_layers=arguments.layers, tie_word_embeddings=True, use_cache=False
    )
    torch.manual_seed(0)
    before = psutil.Process().memory_info().rss
    with torch.device("cpu" if world.leads else "meta"):
        model = LlamaForCausalLM(config)
    size = arguments.micro_batch * arguments.micro_batches
    data = {"train": {"path": "random"}, "seq_len": arguments.seq_len}
    train = {"steps": 1, "global_batch_size": size, "micro_batch_size": arguments.micro_batch, "lr_warmup_steps": 0}
    sections = {"name": "measured", "model": {"path": "random"}, "eval": {"tasks": {"none": 0}}, "warmup": {"steps": 0}}
    arm = parse_recipe({**sections, "data": data, "train": train}).arm_by_name["hif8"]
    seen = survey(model)
    plan = make_plan(model, arm.qat or QatConfig(), seen)
    num_quantized = coverage(model, plan, seen).quantized_weights
    num_parameters = sum(p.numel() for p in model.parameters())
    estimated = memory_bytes(arm, num_parameters, num_quantized, config, world.size)["qat training"]

    stepper = Stepper(Accelerator(cpu=True), model, plan, arm.train, arm.model)
    assert stepper.quant is not None
    stepper.quant.enter(Mode.QUANTIZE)
    ids = torch.randint(config.vocab_size, (size, arguments.seq_len))
    with bfloat16_products():
        stepper.step(Batch(ids, ids), 1e-4)
        stepper.quant.tally.take()
        reset_peak_memory()
        world.gather(None)
        sent, began, busy = _sent(), time.perf_counter(), time.process_time()
        for _ in range(arguments.steps):
            stepper.step(Batch(ids, ids), 1e-4)
            stepper.quant.tally.take()
        seconds = (time.perf_counter() - began) / arguments.steps
        cpu_seconds = sum(world.gather(time.process_time() - busy)) / arguments.steps
    peaks = world.gather(peak_memory_bytes() - before)
    if world.leads:
        traffic = (_sent() - sent) / arguments.steps
        print(f"{num_parameters:,} parameters, {world.size} processes")
        print(f"  {arguments.micro_batches} micro-batches of {arguments.micro_batch} x {arguments.seq_len} a step")
        print(f"  {seconds:.2f} s a step, {cpu_seconds:.2f} s of CPU time together")
        print(f"  {size * arguments.seq_len / seconds:,.0f} tokens/s")
        print(f"  peak {', '.join(map(readable_size, peaks))} (estimate {readable_size(estimated)})")
        print(
            f"  sent {readable_size(int(traffic))} a step, {traffic / (4 * num_parameters):.2f} x the float32 weights"
        )


def _sent() -> int:
    """Bytes that the loopback device has sent."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
