"""HiF8 and the layouts of Ascend: every tensor by its formula, codes read by an independent library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_llama
from exports import CHANNEL, POWERS, TOKEN, frozen_arm, mixed
from safetensors.torch import load_file
from tiny_world import run_qatrun
from torch import Tensor
from transformers import AutoModelForCausalLM

from qatrun import QatConfig
from qatrun.export import EXPORTS
from qatrun.export.folder import stored_linears
from qatrun.quant import make_plan, quantized_linears
from qatrun.recipe import RoleConfig, RoleScaling
from qatrun.study import export_arm

UNSCALED = RoleConfig(scaling=RoleScaling(type="none"))
UP = "model.layers.0.mlp.up_proj"


def test_hif8_codes_say_by_themselves_what_they_mean(tmp_path: Path) -> None:
    arm, frozen, plan = frozen_arm(tmp_path, QatConfig(weight=CHANNEL), torch.bfloat16)
    written, record = export_arm(arm, None, None)
    assert written.name == record.format == "hif8"
    assert record.decoded_by == "en-dtypes"
    assert record.not_checked == dict.fromkeys(("linears", "text"), "no engine for it runs here")
    tensors, described = load_file(written / "hif8_model.safetensors"), json.loads((written / "hif8.json").read_text())
    decode = torch.tensor([float(value) for value in described["decode"]])
    for name in described["linears"]:
        linear = quantized_linears(frozen)[name]
        assert torch.equal(decode[tensors[f"{name}.weight"].int()], linear.q_weight.float())
        assert torch.equal(tensors[f"{name}.weight_scale"], linear.weight_scale)
        assert torch.equal(tensors[f"{name}.input_scale"], linear.input_scale.reshape(1))
    assert tuple(described["linears"]) == plan.linears
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # no engine takes codes for numbers
        AutoModelForCausalLM.from_pretrained(written)


def test_codes_that_another_library_reads_otherwise_are_an_error(tmp_path: Path) -> None:
    _, frozen, _ = frozen_arm(tmp_path, QatConfig())
    linears = stored_linears(frozen)
    assert EXPORTS["hif8"].decoded_by(linears) == "en-dtypes"
    wrong = linears[UP]._replace(codes=torch.tensor([[0x80]], dtype=torch.uint8))  # NaN equals nothing
    with pytest.raises(ValueError, match=f"en-dtypes reads other numbers from the codes of {UP}"):
        EXPORTS["hif8"].decoded_by({UP: wrong})


def test_the_ascend_layout_is_that_of_the_inference_recipes(tmp_path: Path) -> None:
    arm, *_ = frozen_arm(tmp_path, QatConfig(input=UNSCALED, scaling=POWERS), torch.bfloat16)
    ran = run_qatrun("export", str(arm), "--to", "hif8", "--layout", "ascend", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "nothing was run on an Ascend NPU" in ran.out
    written = arm / "hif8-ascend"
    tensors = load_file(written / "model.safetensors")
    scale = tensors[f"{UP}.weight_scale"]
    assert (scale.dtype, list(scale.shape)) == (torch.float32, [64, 1])
    assert torch.equal(scale.bfloat16().float(), scale)
    assert tensors[f"{UP}.weight"].dtype == torch.uint8
    assert not [name for name in tensors if "input_scale" in name]
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": True,
    }
    assert config["ignore"] == ["lm_head"]
    assert json.loads((written / "hif8.json").read_text())["format"] == "hifloat8"


ASYMMETRIC = RoleConfig(symmetric=False)


@pytest.mark.parametrize("of_input", [RoleConfig(), ASYMMETRIC, TOKEN], ids=["static", "asymmetric", "tokens"])
def test_ascend_v1_is_what_msmodelslim_writes(tmp_path: Path, of_input: RoleConfig) -> None:
    wanted = QatConfig(format="int8", weight=CHANNEL, input=of_input, ignore=("*.o_proj",))
    arm, frozen, plan = frozen_arm(tmp_path, wanted, torch.bfloat16, mlp_bias=True)
    written, record = export_arm(arm, "ascend-v1", None)
    assert record.codes.differing == 0
    tensors = load_file(written / "quant_model_weights.safetensors")
    described = json.loads((written / "quant_model_description.json").read_text())
    kind = "W8A8_DYNAMIC" if of_input == TOKEN else "W8A8"
    assert (described.pop("model_quant_type"), described.pop("version"), described.pop("group_size")) == (
        kind,
        "1.0.0",
        0,
    )
    assert described.keys() == tensors.keys()
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    assert described["model.layers.0.self_attn.o_proj.weight"] == described["model.norm.weight"] == "FLOAT"
    for name in plan.linears:
        linear = quantized_linears(frozen)[name]
        own: dict[str, Tensor] = {
            key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name
        }
        assert torch.equal(own["weight"].float(), linear.q_weight.float())
        assert torch.equal(own["weight_scale"], linear.weight_scale)
        assert not own["weight_offset"].any()
        assert described[f"{name}.weight"] == kind
        if kind == "W8A8":
            assert torch.equal(own["deq_scale"], linear.input_scale * linear.weight_scale.flatten())
            assert own["quant_bias"].dtype == torch.int32
            q = torch.randint(-127, 128, (5, own["weight"].shape[1]))
            x = (q - own["input_offset"]) * own["input_scale"]  # which Ascend's kernel rounds to q
            y = (q.double() @ own["weight"].double().t() + own["quant_bias"]) * own["deq_scale"]
            assert ((y - linear.float()(x)).abs() <= own["deq_scale"] * 0.51 + 1e-5 * y.abs().max()).all()
            assert bool(own["input_offset"].any()) == (of_input == ASYMMETRIC)
        else:
            assert own.keys() <= {"weight", "weight_scale", "weight_offset", "bias"}


REFUSED: dict[str, tuple[str, Any, str]] = {
    "hif8 of int8": ("hif8", QatConfig(format="int8"), "hif8 holds HiF8 alone, and this is int8"),
    "ascend with scaled inputs": (
        "hif8-ascend",
        QatConfig(scaling=POWERS),
        "Ascend casts inputs to HiF8 without a scale (train with qat.input.scaling.type: none; --to hif8 keeps scales)",
    ),
    "ascend with free scales": (
        "hif8-ascend",
        QatConfig(input=UNSCALED),
        "Ascend rounds weight scales to bfloat16 (train with qat.weight.scaling.rounding: power_of_two)",
    ),
    "ascend-v1 of fp8": (
        "ascend-v1",
        QatConfig(format="fp8_e4m3"),
        "ascend-v1 is INT8 here, and this is fp8_e4m3 (--to compressed-tensors, or train int8)",
    ),
    "ascend-v1 of a mixed arm": ("ascend-v1", mixed(), "ascend-v1 is INT8 here, and this is fp8_e4m3"),
    "ascend-v1 of a part": (
        "ascend-v1",
        QatConfig(format="int8", ignore=("*.1.mlp.up_proj",)),
        "vLLM merges model.layers.1.mlp",
    ),
}


@pytest.mark.parametrize(("name", "wanted", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_layout_cannot_say_is_refused(name: str, wanted: Any, message: str) -> None:
    model = tiny_llama()
    (problem,) = EXPORTS[name].problems(make_plan(model, wanted), model)
    assert message in problem
