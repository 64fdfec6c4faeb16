"""The ONNX graph: codes and scales that were scored, integer products in ONNX Runtime, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import logits, tiny_llama, token_ids
from exports import CHANNEL, POWERS, TOKEN, frozen_arm, mixed
from tiny_world import run_qatrun

from qatrun import QatConfig
from qatrun.evaluate.engines import ENGINES
from qatrun.export import onnx
from qatrun.quant import make_plan
from qatrun.recipe import ModuleConfig, RoleConfig
from qatrun.recipe.qat import RoleOverrides
from qatrun.study import export_arm

onnxruntime = pytest.importorskip("onnxruntime")
library = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        (QatConfig(format="int8", weight=CHANNEL, ignore=("*.o_proj",)), {"attention_bias": True}),
        (
            QatConfig(
                format="int8",
                input=TOKEN,
                clip="target",
                weight=CHANNEL,
                modules=(
                    ModuleConfig(match=("*.down_proj",), input=RoleOverrides(granularity="per_tensor")),
                    ModuleConfig(match=("model.layers.0.*",), format=None),
                ),
            ),
            {},
        ),
        (QatConfig(format="int8", input=RoleConfig(symmetric=False), weight=CHANNEL), {"attention_bias": True}),
    ],
    ids=["channels, some with a bias, some in bf16", "schemes per module", "asymmetric"],
)
def test_a_graph_of_integer_products_gives_what_was_scored(
    tmp_path: Path, wanted: QatConfig, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qatrun.evaluate.engines.TRACED_BYTES", 100_000)  # in several parts
    arm, frozen, plan = frozen_arm(tmp_path, wanted, torch.bfloat16, **settings)
    written, record = export_arm(arm, "onnx", None)
    graph = library.load(written / "model.onnx")
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MatMulInteger") == len(plan.linears) == record.linears
    assert b"/site-packages/" not in (written / "model.onnx").read_bytes()  # nothing of this machine
    proof, text = record.linears_proof, record.text_proof
    assert proof is not None and text is not None  # noqa: PT018 -- for mypy
    assert record.codes.differing == 0
    assert proof.rows_tied == proof.rows_clipped == 0
    assert proof.worst < 2e-7
    assert proof.rows_equal == proof.rows or any(scheme["input"].per_row for scheme in plan.schemes.values())
    assert text.same_top1 == 1.0
    assert not text.must_be_equal
    session = onnxruntime.InferenceSession(written / "model.onnx")
    for shape in ((1, 1), (3, 7), (2, 40)):
        ids = torch.randint(101, shape)
        (got,) = session.run(["logits"], {"input_ids": ids.numpy()})
        assert torch.allclose(torch.from_numpy(got), logits(frozen.float(), ids), atol=1e-3)
    model = ENGINES["onnxruntime"].open(written, "auto", attn_implementation="sdpa", trust_remote_code=False)
    assert torch.equal(
        model(token_ids()).logits, torch.from_numpy(session.run(None, {"input_ids": token_ids().numpy()})[0])
    )


REFUSED = {
    "hif8": (QatConfig(), "onnx is INT8 here, which runs as integers, and this is hif8 (--to hif8, or train int8)"),
    "mixed": (mixed(), "and this is fp8_e4m3 (--to compressed-tensors, or train int8)"),
    "asymmetric tokens": (
        QatConfig(format="int8", input=RoleConfig(symmetric=False, granularity="per_token")),
        "asymmetric token scales are not written (qat.input.symmetric: true, or per_tensor)",
    ),
    "tokens": (
        QatConfig(format="int8", input=TOKEN, scaling=POWERS),
        "no operator rounds a token scale to a power of two",
    ),
}


@pytest.mark.parametrize(("wanted", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_int8_is_refused(wanted: Any, message: str) -> None:
    model = tiny_llama()
    (problem,) = onnx.problems(make_plan(model, wanted), model)
    assert message in problem


def test_an_arm_is_scored_in_onnxruntime_beside_its_own_scores(world: Path) -> None:
    ran = run_qatrun("export", "runs/ruined/ruined", "--to", "onnx", cwd=world)
    assert ran.code == 0, ran.err
    assert "linears: all" in ran.out
    ran = run_qatrun("eval", "runs/ruined/ruined/onnx", "--engine", "onnxruntime", "--json", cwd=world)
    assert ran.code == 0, ran.err
    tasks = json.loads(ran.out)["match"]["tasks"]
    assert [task["task"] for task in tasks] == ["likes.yaml", "demo_facts"]
    assert sum(task["flips_to_wrong"] + task["flips_to_right"] for task in tasks) <= 1
    assert all(task["max_abs_delta_loglikelihood"] < 0.01 for task in tasks)
    ran = run_qatrun("eval", "runs/ruined/ruined/onnx", "--engine", "transformers", cwd=world)
    assert (ran.code, ran.err) == (
        2,
        "runs/ruined/ruined/onnx: engine transformers opens no onnx (onnxruntime does)\n",
    )
