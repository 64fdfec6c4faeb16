"""What each linear costs: by other formulas, with a planted fault found first; what is kept for a budget; and the verb."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB_SIZE, tiny_llama, token_ids
from tiny_world import run_qatrun, write_world
from transformers import AutoModelForCausalLM, MixtralConfig

from qatrun.errors import InputError
from qatrun.quant import QuantPlan, attach, calibrate, coverage, make_plan
from qatrun.quant.calibration import calibrated_plan
from qatrun.quant.sensitivity import (
    Cost,
    costs_by_one_backward,
    costs_one_at_a_time,
    divergences,
    input_groups,
    quantizing,
)
from qatrun.recipe import QatConfig, load_recipe
from qatrun.study.checking import preflight
from qatrun.study.keeping import Part, curve_of, is_flat, num_kept, parse_budget, ranked

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


def attached(model: Any, ids: torch.Tensor, **qat: Any) -> QuantPlan:
    plan = calibrated_plan(make_plan(model, QatConfig(**{"format": "int8"} | qat)))
    attach(model, plan)
    calibrate(model, [ids])
    return plan


def test_one_backward_is_half_of_gradient_times_error_squared() -> None:
    model, ids = tiny_llama(), token_ids(3)
    plan = attached(model, ids)
    found = costs_by_one_backward(model, plan.linears, ids, ids)
    assert found.keys() == set(plan.linears)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    name = "model.layers.1.mlp.down_proj"
    linear, seen = model.get_submodule(name), {}

    def keep(module: Any, args: Any, y: torch.Tensor) -> None:
        y.retain_grad()
        seen["x"], seen["y"] = args[0].detach(), y

    with quantizing(model, ()):
        handle = linear.register_forward_hook(keep)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        handle.remove()
    steps = {role: linear.quant.of[role] for role in ("weight", "input")}
    scales = {role: float(model.quant_state.scales.scale[quantizer.index]) for role, quantizer in steps.items()}
    x, w = (
        (values.double() / scales[role]).round().clamp(-127, 127) * scales[role]
        for values, role in ((seen["x"], "input"), (linear.weight.detach(), "weight"))
    )
    error = x @ w.T - seen["y"].detach().double()
    expected = float((seen["y"].grad.double() * error).square().sum() / 2)
    assert found[name].nats == pytest.approx(expected, rel=1e-3)
    assert found[name].noise == pytest.approx(float(error.square().sum()), rel=1e-3)


def test_one_at_a_time_is_the_divergence_of_a_model_with_only_those() -> None:
    model, ids = tiny_llama(), token_ids(3)
    plan = attached(model, ids)
    groups = {name: group.modules for name, group in input_groups(model, plan).items()}
    assert groups["model.layers.0.self_attn.q_proj"] == tuple(
        f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")
    )
    assert sum(map(len, groups.values())) == len(plan.linears)
    found = dict(costs_one_at_a_time(model, groups, ids, ids))
    name = "model.layers.0.mlp.gate_proj"
    alone, plain = tiny_llama(), tiny_llama()
    attached(alone, ids, targets=["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"])
    log_p, log_q = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1).detach() for m in (plain, alone))
    assert found[name].nats == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-6)
    target = ids[:, 1:, None]
    rise = (log_p - log_q).gather(-1, target).sum((1, 2))
    sums = divergences(plain(input_ids=ids).logits, alone(input_ids=ids).logits, ids)
    assert sums[:, 1].tolist() == pytest.approx(rise.tolist(), rel=1e-6)


def tiny_mixture() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCAB_SIZE}
    return AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **more, use_cache=False)).eval()


def test_the_experts_of_a_module_are_a_group_by_the_names_of_their_parameters() -> None:
    model, ids = tiny_mixture(), token_ids(3)
    plan = attached(model, ids)
    groups = input_groups(model, plan)
    experts = groups["model.layers.1.mlp.experts"]
    assert experts.modules == ("model.layers.1.mlp.experts",)
    assert experts.names == ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    assert experts.num_weights == 4 * (32 * 32 + 32 * 16)
    assert sum(group.num_weights for group in groups.values()) == coverage(model, plan).quantized_weights
    one = costs_by_one_backward(model, [each for group in groups.values() for each in group.modules], ids, ids)
    exact = dict(costs_one_at_a_time(model, {name: group.modules for name, group in groups.items()}, ids, ids))
    for cost in (one["model.layers.1.mlp.experts"], exact["model.layers.1.mlp.experts"]):
        assert cost.nats > 0
        assert 1e-6 < cost.noise / cost.signal < 1e-2
    ignored = make_plan(tiny_mixture(), QatConfig(modules=[{"match": list(experts.names), "format": None}]))
    assert set(plan.linears) - set(ignored.linears) == {
        f"{name}.{index}" for name in experts.names for index in range(4)
    }


@torch.no_grad()
def plant(model: Any, block: int) -> None:
    """Two channels of the input of a block's MLP 64 times as large, and read as much less: the same function."""
    layer = model.model.layers[block]
    layer.post_attention_layernorm.weight[:2] *= 64
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight[:, :2] /= 64


@pytest.mark.parametrize("block", [0, 1])
def test_planted_outliers_are_found_first_by_both(block: int) -> None:
    model, ids = tiny_llama(), token_ids(4)
    plant(model, block)
    plan = attached(model, ids)
    groups = {name: group.modules for name, group in input_groups(model, plan).items()}
    one = costs_by_one_backward(model, plan.linears, ids, ids)
    by_backward = {name: sum(one[linear].nats for linear in linears) for name, linears in groups.items()}
    by_divergence = {name: cost.nats for name, cost in costs_one_at_a_time(model, groups, ids, ids)}
    for costs in (by_backward, by_divergence):
        first, second = sorted(costs, key=costs.__getitem__, reverse=True)[:2]
        assert first == f"model.layers.{block}.mlp.gate_proj"
        assert costs[first] > 3 * costs[second]


def parts(*costs: float, weights: tuple[int, ...] = ()) -> dict[str, Part]:
    sizes = weights or (100,) * len(costs)
    return {
        f"g{i}": Part((f"g{i}",), size, Cost(nats, 1.0, 0.01))
        for i, (nats, size) in enumerate(zip(costs, sizes, strict=True))
    }


def test_groups_are_kept_by_what_they_cost_for_each_weight() -> None:
    groups = ranked(parts(0.010, 0.004, 0.001, weights=(1000, 100, 100)), scale=2.0)
    assert [group.name for group in groups] == ["g1", "g0", "g2"]
    assert [group.nats for group in groups] == pytest.approx([0.008, 0.020, 0.002])
    assert groups[0].sqnr_db == pytest.approx(20.0)
    curve = curve_of(groups)
    assert [point.nats for point in curve] == pytest.approx([0.030, 0.022, 0.002, 0.0])
    assert [point.bits for point in curve] == pytest.approx([8, 8 + 8 / 12, 8 + 8 * 11 / 12, 16])
    texts = ("0.03", "0.0021", "3 %", "1e-9", "1e+9%", "8bits", "9 bits")
    kept = {text: num_kept(curve, parse_budget(text)) for text in texts}
    assert kept == {"0.03": 0, "0.0021": 2, "3 %": 1, "1e-9": 3, "1e+9%": 0, "8bits": 0, "9 bits": 1}


def test_a_curve_is_flat_where_no_few_groups_carry_the_cost() -> None:
    even, steep = (
        curve_of(ranked(parts(*costs), 1.0)) for costs in ((0.001,) * 8, (0.1, 0.002, 0.002, 0.001, *(0.001,) * 4))
    )
    assert is_flat(even)
    assert not is_flat(steep)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "nan", "inf", "2x", "1 %%", "0.1 bits", "16bits", "% 1", "1e400", "101"]
)
def test_a_budget_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--budget {text}: "):
        parse_budget(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    write_world(folder)
    model = tiny_llama(eos_token_id=0, bos_token_id=None)
    plant(model, 1)
    model.save_pretrained(folder / "model")
    return folder


SEARCH = (
    "sensitivity",
    "tiny.yaml",
    "--set=qat.format=int8",
    "--set=arms={bf16: {qat: null}, int8: {}}",
    "--sequences=8",
)
PLANTED = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("method", [(), ("--exact",)], ids=["one backward", "exact"])
def test_the_verb_finds_the_fault_and_writes_a_recipe_that_mends_it(
    world: Path, method: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # names are folded where it is narrow
    output = Path(f"found{len(method)}")
    ran = run_qatrun(*SEARCH, *method, "--budget=9.8bits", f"--output={output}", cwd=world)
    assert ran.code == 0, ran.err
    assert "model.layers.1.mlp.gate_proj, up_proj" in ran.out
    found = json.loads((world / output / "sensitivity.json").read_text())
    assert [group["linears"] for group in found["groups"] if group["kept"]] == [PLANTED]
    assert found["choice"]["nats"] < found["everything"]["nats"] / 2
    low, high = found["choice"]["nats_ci95"]
    assert low < found["choice"]["nats"] < high
    files = {str(path.relative_to(world / output)) for path in (world / output).rglob("*") if path.is_file()}
    assert files - {".lock"} == {
        *("settings.json", "costs.jsonl", "sensitivity.json", "curve.svg", "keep.yaml", "report.html"),
        *("report/curve.csv", "report/groups.csv"),
    }
    assert "prefers-color-scheme: dark" in (world / output / "curve.svg").read_text()
    recipe = load_recipe(world / output / "keep.yaml")
    assert recipe.name == "tiny-keep"
    assert recipe.arm_by_name["int8"].qat is not None
    assert recipe.arm_by_name["int8"].qat.format == "int8", "what was set, too"


def test_it_goes_on_where_it_was_stopped(world: Path) -> None:
    whole, stopped = (world / name for name in ("whole", "stopped"))
    assert run_qatrun(*SEARCH, "--exact", f"--output={whole}", cwd=world).code == 0
    shutil.copytree(whole, stopped)
    lines = (whole / "costs.jsonl").read_text().splitlines(keepends=True)
    kept = lines[: len(lines) // 2]
    (stopped / "costs.jsonl").write_text("".join(kept) + lines[-1][:20])
    (stopped / "sensitivity.json").unlink()
    assert run_qatrun(*SEARCH, "--exact", f"--output={stopped}", cwd=world).code == 0
    again = (stopped / "costs.jsonl").read_text().splitlines(keepends=True)
    assert again == lines
    assert (stopped / "sensitivity.json").read_text() == (whole / "sensitivity.json").read_text()


def test_it_is_of_the_calibration_that_the_recipe_has(world: Path) -> None:
    """Smoothing folds the planted channels away."""
    costs = []
    for name, more in (("plain", ()), ("smooth", ("--set=qat.calibration={smooth: 0.5}",))):
        assert run_qatrun(*SEARCH, *more, f"--output={name}", cwd=world).code == 0
        costs.append(json.loads((world / name / "sensitivity.json").read_text())["everything"]["nats"])
    assert costs[1] < costs[0] / 3


MISTAKES = {
    "--budget=much": "--budget much: must be nats a token (0.002), a rise of perplexity (1%) or the average bits of a",
    "--arm=int9": "--arm int9: no such quantized arm (did you mean 'int8'?)",
    "--set=arms={bf16: {qat: null}}": "qat -- nothing is quantized: no arm has qat",
    "--set=model.path=nope": "model.path -- no model folder 'nope' here",
    "--set=data.train.path=nope.jsonl": "data.train.path -- no such file 'nope.jsonl'",
    "--set=qat.targets=[none]": "qat.targets -- pattern 'none' matches no linear",
    "--output=text.jsonl": "text.jsonl is a file; give another --output",
    "--output=model": "model holds something else (config.json, generation_config.json and model.safetensors)",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_what_is_refused_says_so_and_writes_nothing(world: Path, option: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    ran = run_qatrun(*SEARCH, option, cwd=world)
    assert ran.code == 2
    assert MISTAKES[option] in ran.err
    assert "Traceback" not in ran.err
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_what_other_settings_found_is_not_thrown_away_unasked(world: Path) -> None:
    output = f"--output={world / 'other'}"
    assert run_qatrun(*SEARCH, output, cwd=world).code == 0
    ran = run_qatrun(*SEARCH, "--exact", output, cwd=world)
    assert ran.code == 2
    assert "was found with other settings: exact (False -> True); --overwrite it" in ran.err
    smaller = run_qatrun(*SEARCH, "--set=train.micro_batch_size=2", output, cwd=world)
    assert "micro_batch_size (4 -> 2)" in smaller.err, "costs are of batches"
    (world / "other/settings.json").write_text("{")
    assert "settings.json (damaged)" in run_qatrun(*SEARCH, "--exact", output, cwd=world).err
    assert run_qatrun(*SEARCH, "--exact", output, "--overwrite", cwd=world).code == 0


def test_the_fragment_leaves_what_it_names_in_bf16(world: Path) -> None:
    assert run_qatrun(*SEARCH, "--budget=9.8bits", "--output=kept", cwd=world).code == 0
    recipe = load_recipe(
        world / "kept/keep.yaml", [f"data.train.path={world / 'text.jsonl'}", f"model.path={world}/model"]
    )
    plan = preflight(recipe).plans["int8"]
    assert plan is not None
    assert not set(PLANTED) & set(plan.linears)
    assert len(plan.linears) == 14 - len(PLANTED)
    assert math.isfinite(json.loads((world / "kept/sensitivity.json").read_text())["choice"]["nats"])
