"""Which linears a plan takes, and how much of a model that is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, word_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.export import artifact
from qatrun.quant import Mode, QuantPlan, ResumableState, attach, coverage, freeze, make_plan, named_linears
from qatrun.recipe import RoleConfig, RoleScaling, ScalingConfig, SkipBlocks, load_recipe
from qatrun.scheme import Slot

BLOCK = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def linears(**qat: object) -> tuple[str, ...]:
    return make_plan(tiny_llama(), QatConfig(**qat)).linears


def in_blocks(*names: str, blocks: tuple[int, ...] = (0, 1)) -> tuple[str, ...]:
    return tuple(f"model.layers.{block}.{name}" for block in blocks for name in names)


def test_the_default_is_every_linear_but_the_output_head() -> None:
    assert linears() == in_blocks(*BLOCK)
    assert "lm_head" in named_linears(tiny_llama())
    gpt2 = make_plan(tiny_gpt2(), QatConfig()).linears
    assert gpt2 == tuple(
        f"transformer.h.{block}.{name}"
        for block in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["model.layers.1.mlp.up_proj"], in_blocks("mlp.up_proj", blocks=(1,))),
        (["*.down_proj"], in_blocks("mlp.down_proj")),
        (["*.down_proj", "*.up_proj"], in_blocks("mlp.up_proj", "mlp.down_proj")),  # in the model's order
        (["model.layers.[0]*_proj"], in_blocks(*BLOCK, blocks=(0,))),
        (["re:.*mlp\\.(gate|up)_proj"], in_blocks("mlp.gate_proj", "mlp.up_proj")),
        (["re:.*up_proj|lm_head"], (*in_blocks("mlp.up_proj"), "lm_head")),
    ],
)
def test_patterns_are_names_globs_or_regular_expressions(targets: list[str], expected: tuple[str, ...]) -> None:
    assert linears(targets=targets) == expected


def test_ignore_wins_over_targets() -> None:
    assert linears(targets=["*.mlp.*"], ignore=["re:.*(gate|up)_proj"]) == in_blocks("mlp.down_proj")


def test_skipped_blocks_stay_as_they_are() -> None:
    def blocks_left(first: int, last: int) -> set[str]:
        model = tiny_llama(num_hidden_layers=12)  # 9 and 10 sort wrongly as text
        plan = make_plan(model, QatConfig(skip_blocks=SkipBlocks(first=first, last=last)))
        return {name.split(".")[2] for name in plan.linears}

    assert blocks_left(3, 2) == {str(block) for block in range(3, 10)}
    assert blocks_left(0, 0) == {str(block) for block in range(12)}
    with pytest.raises(InputError, match="nothing is left to quantize"):
        blocks_left(6, 6)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("model.layers.0.mlp.upproj", "did you mean 'model.layers.0.mlp.up_proj'?"),
        ("re:mlp\\.up_proj", "mlp.up_proj'?"),  # a regular expression must match in full
        ("mlp.up_proj", "mlp.up_proj'?"),  # and a name too
        ("zzz", "names look like 'model.layers.0.self_attn.q_proj'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_nearest(pattern: str, nearest: str) -> None:
    for key in ("targets", "ignore"):
        with pytest.raises(InputError) as caught:
            linears(**{key: [pattern]})
        (problem,) = caught.value.problems
        assert problem.key == f"qat.{key}"
        assert f"pattern '{pattern}' matches no linear" in problem.message
        assert nearest in problem.message


def test_all_unmatched_patterns_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        linears(targets=["*.down_proj", "nothing", "re:none"], ignore=["neither"])
    assert [problem.key for problem in caught.value.problems] == ["qat.targets", "qat.targets", "qat.ignore"]


def openpangu_1b() -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=26,
        hidden_size=1536,
        intermediate_size=6144,
        num_attention_heads=12,
        num_key_value_heads=6,
        vocab_size=153376,
        tie_word_embeddings=True,
        attention_bias=True,
    )


def test_the_published_configuration_quantizes_63_of_183_linears() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(openpangu_1b())
    arm = load_recipe("openpangu-1b-hif8").arm_by_name["hif8"]
    plan = make_plan(model, arm.qat)
    covered = coverage(model, plan)
    assert (covered.num_quantized, covered.num_linears) == (63, 183)
    per_block = 2 * 1536 * 1536 + 2 * 1536 * 768 + 3 * 1536 * 6144
    assert covered.flops_share == 63 * 1536 * 6144 / (26 * per_block + 153376 * 1536)
    assert str(covered) == "63 of 183 linears, 51% of linear FLOPs quantized"
    assert plan.linears == tuple(
        f"model.layers.{block}.mlp.{name}_proj" for block in range(3, 24) for name in ("gate", "up", "down")
    )
    assert {role: scheme.target_amax for role, scheme in plan.schemes[plan.linears[0]].items()} == {
        "weight": 15,
        "input": 15,
        "grad_output": 224,
    }
    assert len(plan.slots()) == 21 * 2 + 63 + 63


class OddExperts(nn.Module):
    """Experts in a parameter that is none of those that transformers deals tokens to."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.gate = nn.Linear(4, 4)
        self.experts_in_one = nn.Parameter(torch.zeros(2, 4, 4))


def test_experts_that_no_plan_can_quantize_are_named_as_not_covered() -> None:
    model = OddExperts()
    covered = coverage(model, make_plan(model, QatConfig()))
    assert covered.uncovered_experts == ("experts_in_one",)
    assert "not covered: 1 expert tensors such as experts_in_one" in str(covered)


def test_embeddings_stay_as_they_are_and_a_pattern_for_them_is_told_why() -> None:
    with pytest.raises(
        InputError, match="matches no linear: embeddings are looked up, not multiplied, and stay in BF16"
    ):
        linears(targets=["model.embed_tokens"])


def test_a_plan_made_on_the_meta_device_is_the_plan_of_the_model() -> None:
    model = tiny_llama()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert make_plan(empty, QatConfig()) == make_plan(model, QatConfig())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_plan_reads_back_from_json() -> None:
    qat = QatConfig(
        format="fp8_e4m3",
        scaling=ScalingConfig(window=7, algorithm="most_recent"),
        weight=RoleConfig(granularity="per_channel"),
        input=RoleConfig(target_amax=100.0, scaling=RoleScaling(window=3)),
        grad_output=RoleConfig(format="fp8_e5m2"),
        clip="target",
        ste="identity",
    )
    plan = make_plan(tiny_llama(), qat)
    assert QuantPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


class Bespoke(nn.Module):
    """No transformers model, though it calls something `config`."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.config = {"width": width}
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_that_cannot_run_on_the_meta_device_gets_a_quantizer_a_linear() -> None:
    model = Bespoke(width=4, depth=2)
    plan = make_plan(model, QatConfig())
    assert dict(plan.input_group) == {"layers.0": "layers.0", "layers.1": "layers.1"}
    state = attach(model, plan)
    state.enter(Mode.QUANTIZE)
    model(torch.ones(2, 4)).sum().backward()
    assert (state.scales.amax > 0).all()


def test_readers_of_one_tensor_share_its_slot_as_far_as_their_schemes_agree(tmp_path: Path) -> None:
    """Plans may give each linear schemes of its own; a trunk that splits nothing serves such an arm, too."""
    plan = make_plan(tiny_llama(), QatConfig(format="hif8"))
    attention = "model.layers.0.self_attn."
    per_token = QatConfig(format="int8", input=RoleConfig(granularity="per_token")).schemes
    mixed = replace(plan, schemes={**plan.schemes, f"{attention}k_proj": per_token})
    names = {name: mixed.slot(f"{attention}{name}_proj", "input").linear for name in "qkv"}
    assert names == {name: f"{attention}{of}_proj" for name, of in zip("qkv", "qkq", strict=True)}
    assert set(mixed.slots()) == {*plan.slots(), Slot(f"{attention}k_proj", "input")}
    assert QuantPlan.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed

    model = tiny_llama()
    trunk, arm = attach(tiny_llama(), plan), attach(model, mixed)
    trunk.scales.observe(trunk.scales.index[Slot(f"{attention}q_proj", "input")], torch.tensor(6.0))
    trunk.push()
    ResumableState(arm).adopt(ResumableState(trunk).state_dict())
    of_qkv = [arm.scales.index[mixed.slot(f"{attention}{name}_proj", "input")] for name in "qkv"]
    assert arm.scales.history[0, of_qkv].tolist() == [6.0] * 3

    quantized_steps(model, arm)
    attached = logits(model)
    freeze(model, torch.float32)
    assert torch.equal(logits(model), attached)
    artifact.save(model, word_tokenizer(), mixed, tmp_path)
    assert artifact.read_plan(tmp_path) == mixed
    assert torch.equal(logits(artifact.load(tmp_path)[0]), attached)
