"""What chips run: the table's facts, and what is said of a recipe before it trains."""

from __future__ import annotations

from typing import Any

import pytest

from qatrun.formats import FORMATS
from qatrun.hardware import CHIPS, answer
from qatrun.recipe import QatConfig, parse_recipe
from qatrun.study.checking import preflight
from qatrun.study.dryrun import dry_run_of

FP8, INT8 = {"format": "fp8_e4m3"}, {"format": "int8", "weight": {"granularity": "per_channel"}}
TOKENS = {"input": {"granularity": "per_token"}}


def asked(chip: str, **qat: Any) -> Any:
    schemes = QatConfig.model_validate(qat).schemes
    return answer(chip, schemes["weight"], schemes["input"])


@pytest.mark.parametrize(
    ("chip", "qat", "runs", "said"),
    [
        ("h100", FP8, "natively", "vLLM's FP8"),
        ("h100", INT8 | TOKENS, "natively", "vLLM's INT8"),
        ("l4", FP8 | TOKENS, "natively", ""),
        ("a100", FP8, "as weight-only", "inputs in 16 bits, so what was trained for inputs is not what runs"),
        ("a100", FP8, "as weight-only", "the nearest that it runs natively: int8"),
        ("a100", INT8, "natively", ""),
        ("t4", FP8, "as weight-only", ""),
        ("b200", FP8, "natively", ""),
        ("b200", INT8, "not at all", "from compute capability 10.0 on; the nearest that it runs natively: fp8"),
        ("rtx-5090", INT8, "not at all", ""),
        ("mi300x", FP8, "natively", "FNUZ variant"),
        ("mi300x", INT8, "not at all", ""),
        ("ascend-950", {"format": "hif8"}, "natively", ""),
        ("ascend-950", {"format": "fp8_e5m2"}, "natively", ""),
        ("ascend-910b", {"format": "hif8"}, "not at all", "the nearest that it runs natively: int8"),
        ("cpu-amx", INT8, "natively", ""),
        ("cpu-avx2", INT8, "natively", "saturate in 16 bits and are wrong"),
        ("cpu-vnni", FP8, "not at all", ""),
        ("h100", {"format": "hif8"}, "not at all", "by Ascend 950 alone"),
        ("h100", {"format": "fp8_e5m2"}, "not at all", ""),
        ("h100", {"format": "int8", "weight": {"format": "fp8_e4m3"}}, "not known", "fp8_e4m3 by int8"),
        ("h100", {"format": "int8", "input": {"symmetric": False}}, "natively", ""),
        ("ascend-950", {"format": "int8", "input": {"symmetric": False}}, "not known", "per_tensor, asymmetric"),
    ],
)  # fmt: skip
def test_what_a_scheme_runs_as(chip: str, qat: dict[str, Any], runs: str, said: str) -> None:
    found = asked(chip, **qat)
    assert found.runs == runs
    assert said in found.why


def test_every_fact_has_a_source_and_every_format_an_answer() -> None:
    for name, chip in CHIPS.items():
        for fact in (*chip.kernels, *chip.instead.values()):
            assert fact.source.startswith("https://")
        for known in FORMATS:
            found = asked(name, format=known)
            assert found.runs in ("natively", "as weight-only", "not at all")
            assert found.is_native == (known in {kernel.format for kernel in chip.kernels})


def checked_on(chip: str | None, by: str = "recipe", **qat: Any) -> Any:
    demo = {"model": {"path": "builtin:demo"}, "data": {"train": {"path": "builtin:demo", "split": "finetune"}}}
    rest = {"name": "study", "train": {"steps": 600}, "eval": {"tasks": {"demo_facts": 0}}, "qat": qat}
    target = {"target": {"hardware": chip}} if by == "recipe" else {}
    return dry_run_of(preflight(parse_recipe({**demo, **rest, **target}), hardware=chip if by == "option" else None))


@pytest.mark.parametrize("by", ["recipe", "option"])
def test_a_fallback_is_said_before_training_a_line_a_scheme(by: str) -> None:
    modules = [{"match": "*.down_proj", "format": "hif8"}]
    shown = checked_on("h100", by, format="fp8_e4m3", modules=modules)
    (runs,) = (arm.runs for arm in shown.arms if arm.runs)
    (native,) = runs
    assert native.startswith("on h100, model.layers.*.self_attn.q_proj, ")
    assert (
        ": fp8_e4m3 weights per_tensor, fp8_e4m3 inputs per_tensor: run natively (vLLM's FP8 W8A8) [https://" in native
    )
    (warning,) = shown.warnings
    assert warning.startswith("target.hardware -- arm 'fp8_e4m3' on h100, model.layers.*.mlp.down_proj: hif8 weights")
    assert (
        "run not at all (HiFloat8 is computed by Ascend 950 alone; the nearest that it runs natively: fp8_e4m3"
        in warning
    )


def test_nothing_is_said_of_hardware_that_nobody_asked_about() -> None:
    shown = checked_on(None, format="hif8")
    assert not shown.warnings
    assert not any(arm.runs for arm in shown.arms)
    assert "target" not in parse_recipe(
        {"name": "s", "model": {"path": "m"}, "data": {"train": {"path": "d"}}, "train": {"steps": 900},
         "eval": {"tasks": {"mmlu": 5}}}
    ).model_dump()  # studies made before there was the key  # fmt: skip
