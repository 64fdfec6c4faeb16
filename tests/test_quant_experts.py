"""Experts held in 3-D parameters: each a linear of its own, held against a loop of 2-D fake-quantized products."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import logits, quantized_steps, token_ids, word_tokenizer
from studies import read
from tiny_world import run_qatrun, write_world
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, MixtralConfig, Qwen3MoeConfig

from qatrun import QatConfig, fake_quantize
from qatrun.errors import DamagedFileError, InputError
from qatrun.export import EXPORTS, artifact
from qatrun.export.weights import StoredTensors
from qatrun.quant import Mode, QuantPlan, attach, coverage, detach, freeze, make_plan
from qatrun.quant.expert_weights import named_experts
from qatrun.scheme import Slot

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "llama-4": Llama4TextConfig(
        **SMALL, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
    ),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:  # some models leave them uninitialized
                parameter.normal_(std=0.2)
    model.config.use_cache = False
    return model.train()


def experts_only(**qat: Any) -> QatConfig:
    return QatConfig.model_validate({"targets": ["*.experts.*"], **qat})


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_planned_by_their_parameter_and_counted_one_by_one(kind: str) -> None:
    model = model_of(kind)
    plan = make_plan(model, experts_only())
    first, second, *_ = named_experts(model)
    assert plan.linears[:5] == (*(f"{first}.{index}" for index in range(4)), f"{second}.0")
    assert len(plan.linears) == 2 * 2 * 4
    covered = coverage(model, plan)
    held = sum(p.numel() for name, p in model.named_parameters() if name in named_experts(model))
    assert (covered.quantized_weights, covered.uncovered_experts) == (held, ())
    assert "of linear weights quantized" in str(covered)
    # A slot for the input of each parameter's experts, one for the weight of each expert.
    assert sum(slot.role == "input" for slot in plan.slots()) == 4
    assert len(plan.slots()) == 4 + 16
    everything = coverage(model, make_plan(model, QatConfig(targets=("*",))))
    assert everything.num_quantized == everything.num_linears - len(everything.unfit)  # routers that are linears


# --- the arithmetic


def product(x: Tensor, weight: Tensor, bias: Tensor | None, schemes: Any) -> Tensor:
    """One expert's, in 2-D: both fake-quantized with the scale that fits them."""
    rounded = []
    for tensor, scheme in ((x, schemes["input"]), (weight, schemes["weight"])):
        amax = tensor.detach().abs().amax(-1, keepdim=True) if scheme.per_row else tensor.detach().abs().max()
        rounded.append(fake_quantize(tensor, amax / scheme.target_amax, scheme.format))
    return nn.functional.linear(*rounded, bias)


def loop(module: Any, schemes: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts one by one, as the papers have it."""
    y = torch.zeros_like(x)
    biases = [getattr(module, f"{leaf}_bias", [None] * 4) for leaf in ("gate_up_proj", "down_proj")]
    matrices = [getattr(module, leaf) for leaf in ("gate_up_proj", "down_proj")]
    if getattr(module, "is_transposed", True):
        matrices = [matrix.transpose(1, 2) for matrix in matrices]
    for expert in range(4):
        token, position = torch.where(index == expert)
        if not len(token):
            continue
        up = product(x[token], matrices[0][expert], biases[0][expert], schemes)
        if biases[0][0] is not None:  # gpt-oss
            gate, up = up[:, ::2].clamp(max=module.limit), up[:, 1::2].clamp(-module.limit, module.limit)
            hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        else:
            gate, up = up.chunk(2, dim=-1)
            hidden = module.act_fn(gate) * up
        out = product(hidden, matrices[1][expert], biases[1][expert], schemes)
        y = y.index_add(0, token, out * weights[token, position, None])
    return y


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "qat",
    [{}, {"format": "int8", "weight": {"granularity": "per_channel"}, "input": {"granularity": "per_token"}}],
    ids=["hif8", "int8 rows"],
)
def test_forward_and_gradients_are_those_of_a_loop_of_fake_quantized_products(kind: str, qat: dict[str, Any]) -> None:
    model = model_of(kind)
    reference = copy.deepcopy(model)
    plan = make_plan(model, experts_only(scaling={"type": "dynamic"}, ste="identity", **qat))
    attach(model, plan).enter(Mode.QUANTIZE)
    owner = next(iter(named_experts(reference).values())).owner
    ours, theirs = (each.get_submodule(owner) for each in (model, reference))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 32, generator=generator)
    if kind == "llama-4":  # each expert has a quarter of the rows
        routing: tuple[Tensor, ...] = ()
        as_routed = torch.arange(4).repeat_interleave(6).unsqueeze(1), torch.ones(24, 1)
    else:
        chosen = torch.rand(24, 3, generator=generator).argsort(dim=1)[:, :2]  # never the fourth
        routing = as_routed = chosen, torch.rand(24, 2, generator=generator)
    results = []
    for module, forward in (
        (ours, ours),
        (theirs, lambda x, *_: loop(theirs, plan.schemes[plan.linears[0]], x, *as_routed)),
    ):
        given = x.clone().requires_grad_()
        y = forward(given, *routing)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, given.grad, *(p.grad for p in module.parameters())])
    assert len(results[0]) == len(results[1]) >= 4
    for mine, expected in zip(*results, strict=True):
        assert torch.allclose(mine, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)
    if routing:
        assert not results[0][2][3].any()  # no gradient for an expert without a token


@pytest.mark.parametrize("kind", CONFIGS)
def test_attached_experts_compute_as_before_until_they_quantize(kind: str) -> None:
    model = model_of(kind)
    before, keys, kinds = logits(model), list(model.state_dict()), [type(m) for m in model.modules()]
    state = attach(model, make_plan(model, QatConfig()))
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    model.train()
    state.enter(Mode.OBSERVE)
    assert torch.allclose(model(input_ids=token_ids()).logits, before, atol=1e-4)
    assert (state.scales.amax > 0).all()  # the second product's inputs too, and experts that no token came to
    copied = copy.deepcopy(model)
    state.push()
    state.enter(Mode.QUANTIZE)
    assert not torch.equal(logits(model), before)
    detach(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(copied), before)


def test_the_scale_of_an_expert_that_no_token_comes_to_follows_its_weight() -> None:
    model = model_of("mixtral")
    plan = make_plan(model, experts_only())
    state = attach(model, plan)
    state.enter(Mode.QUANTIZE)
    experts = model.model.layers[0].mlp.experts
    index = torch.zeros(5, 2, dtype=torch.int64)
    index[:, 1] = 1
    for factor in (1.0, 3.0):
        with torch.no_grad():
            experts.gate_up_proj *= factor
        experts(torch.randn(5, 32), index, torch.ones(5, 2))
        state.push()
    for expert in range(4):
        slot = state.scales.index[Slot(f"model.layers.0.mlp.experts.gate_up_proj.{expert}", "weight")]
        assert state.scales.scale[slot] == experts.gate_up_proj[expert].abs().max() / 15


# --- the folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_folder_gives_back_what_was_frozen(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(kind)
    plan = make_plan(model, QatConfig(targets=("*.experts.*", "*.o_proj"), format="int8"))
    quantized_steps(model, attach(model, plan), num_steps=2, learning_rate=0.01)
    trained = logits(model)
    freeze(model, dtype)
    if dtype is torch.float32:
        assert torch.equal(logits(model), trained)
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    loaded, _ = artifact.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))
    one = token_ids()[
        :1, :1
    ]  # which most experts never see, and whose products depend on where weights begin in memory
    assert torch.allclose(logits(loaded, one).float(), logits(model, one).float(), atol=0.02)
    codes = [name for name in StoredTensors(tmp_path) if name.endswith(".codes")]
    assert len(codes) == len(plan.linears) == 2 * 2 * 4 + 2
    for export in EXPORTS.values():
        problems = list(export.problems(plan, model_of(kind)))
        assert "holds experts in one tensor" in problems[0]


def test_one_parameter_of_experts_may_be_left_in_bf16(tmp_path: Path) -> None:
    model = model_of("gpt-oss")
    plan = make_plan(model, experts_only(modules=[{"match": "*.down_proj", "format": None}]))
    assert {name.split(".")[-2] for name in plan.linears} == {"gate_up_proj"}
    quantized_steps(model, attach(model, plan), num_steps=1, learning_rate=0.01)
    freeze(model, torch.float32)
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    assert torch.equal(logits(artifact.load(tmp_path)[0]), logits(model))
    # A plan that names a part of a parameter is none.
    part = QuantPlan({plan.linears[0]: plan.schemes[plan.linears[0]]}, {plan.linears[0]: plan.linears[0]})
    artifact.save(model, word_tokenizer(), part, tmp_path)
    with pytest.raises(DamagedFileError, match="but not all experts of that parameter"):
        artifact.load(tmp_path)


def test_single_experts_cannot_be_chosen() -> None:
    with pytest.raises(InputError, match=r"did you mean 'model\.layers\.0\.mlp\.experts\.down_proj'"):
        make_plan(model_of("mixtral"), QatConfig(targets=("model.layers.0.mlp.experts.down_proj.0",)))


def test_a_study_of_a_mixture_trains_scores_and_watches_its_experts(tmp_path: Path) -> None:
    write_world(tmp_path)
    shutil.rmtree(tmp_path / "model")
    model_of("mixtral").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    settings = ("train.steps=6", "warmup.steps=3", "train.learning_rate=1e-3", "diagnose.at_end=false", "eval.limit=5")
    ran = run_qatrun("train", "tiny.yaml", *(part for each in settings for part in ("--set", each)), cwd=tmp_path)
    assert ran.code == 0, ran.err
    arm = tmp_path / "runs" / "tiny" / "hif8"
    assert read(arm / "result.json")["coverage"].startswith("24 of 25 linears, ")
    watched = {
        str(name) for file in (arm / "tensors").glob("*.parquet") for name in pq.read_table(file)["tensor"].to_pylist()
    }
    experts = "model.layers.1.mlp.experts"
    assert {f"{experts}.gate_up_proj.3:weight", f"{experts}.down_proj.0:input"} <= watched
    ran = run_qatrun("eval", str(arm), "--tasks", "likes.yaml", "--limit", "5", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
