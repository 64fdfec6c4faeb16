"""Exported folders: the codes and scales that were scored, in the layout that the format's own library writes, and the same
numbers out of the engine that opens them."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import logits, tiny_gpt2, tiny_llama, word_tokenizer
from exports import ARMS, EXACT, POWERS, TOKEN, frozen_arm
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qatrun import QatConfig
from qatrun.errors import InputError, RunError, WriteError
from qatrun.export import EXPORTS, artifact, compressed_tensors, weights
from qatrun.export.folder import Stored, stored_linears
from qatrun.files import whole_folder
from qatrun.model import save_model
from qatrun.quant import make_plan
from qatrun.recipe import RoleConfig
from qatrun.serving import EXPORT_NAMES
from qatrun.study import export_arm
from qatrun.study.engine import is_export

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def library() -> Any:
    """compressed-tensors; tests that need it skip where the extra is not installed."""
    return pytest.importorskip("compressed_tensors")


def opened(path: Path, dtype: torch.dtype) -> Any:
    """As a user of transformers opens it; nothing missing, nothing unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_names_are_those_that_recipes_and_the_command_line_know() -> None:
    assert tuple(EXPORTS) == EXPORT_NAMES


@pytest.mark.parametrize("wanted", ARMS.values(), ids=ARMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_arm_is_exported_and_proven(tmp_path: Path, library: Any, wanted: Any, dtype: torch.dtype) -> None:
    arm, frozen, plan = frozen_arm(tmp_path, wanted, dtype)
    written, record = export_arm(arm, None, None)
    assert written == arm / "compressed-tensors"
    assert record.codes.differing == 0
    assert record.codes.codes == sum(linear.codes.numel() for linear in stored_linears(frozen).values())
    proof, text = record.linears_proof, record.text_proof
    assert proof is not None and text is not None  # noqa: PT018 -- for mypy
    assert proof.linears == len(plan.linears)
    assert 0 < proof.worst < 1e-6
    assert (proof.rows_tied + proof.rows_clipped > 0) == (proof.worst_otherwise > 0)
    assert (text.dtype, text.must_be_equal) == (str(dtype).removeprefix("torch."), False)
    assert text.same_top1 > 0.98
    opened(written, dtype)


@pytest.mark.parametrize("wanted", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_powers_of_two_transformers_computes_the_very_same(
    tmp_path: Path, library: Any, wanted: Any, dtype: torch.dtype
) -> None:
    arm, frozen, _ = frozen_arm(tmp_path, wanted, dtype)
    written, record = export_arm(arm, None, None)
    assert record.text_proof is not None
    assert record.linears_proof is not None
    assert record.text_proof.must_be_equal
    assert record.text_proof.equal
    assert record.linears_proof.rows_equal == record.linears_proof.rows
    assert torch.equal(logits(opened(written, dtype)), logits(frozen))


@pytest.mark.parametrize("wanted", ARMS.values(), ids=ARMS)
def test_every_tensor_is_what_the_library_itself_writes(tmp_path: Path, library: Any, wanted: Any) -> None:
    """Its writer is given the scales and the rounded weights, and makes codes of its own."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    arm, frozen, _ = frozen_arm(tmp_path, wanted)
    written, _ = export_arm(arm, None, None)
    ours = load_file(written / "model.safetensors")
    described = json.loads((written / "config.json").read_text())["quantization_config"]
    model = tiny_llama()
    apply_quantization_config(model, QuantizationConfig.model_validate(described | {"quantization_status": "frozen"}))
    for name, linear in stored_linears(frozen).items():
        module, shape = model.get_submodule(name), model.get_submodule(name).weight_scale.shape
        module.weight.data = frozen.get_submodule(name).weight.dequantized()
        module.weight_scale.data = linear.weight_scale[: shape.numel()].reshape(shape).contiguous()
        if linear.input_scale is not None:
            module.input_scale.data = linear.input_scale.reshape(1)
        if linear.input_zero_point is not None:
            module.input_zero_point.data = linear.input_zero_point.reshape(1)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    theirs = model.state_dict()
    quantized = {name for name in ours if name.rpartition(".")[0] in stored_linears(frozen)}
    assert quantized
    for name in quantized:
        assert theirs[name].dtype == ours[name].dtype, name
        assert theirs[name].shape == ours[name].shape, name
        both = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (theirs[name], ours[name]))
        assert torch.equal(*both), name
    for kind in ("scale", "input_zero_point"):
        assert {name for name in theirs if kind in name} == {name for name in ours if kind in name}


def test_merged_linears_of_different_scales_are_written_as_channels(tmp_path: Path) -> None:
    """vLLM would round their codes anew to the largest scale; a channel keeps its own."""
    model, plan = frozen_arm(tmp_path, QatConfig(format="fp8_e4m3"))[1:]
    compressed_tensors.save(model, word_tokenizer(), plan, tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    shapes = {name: list(t.shape) for name, t in tensors.items() if name.endswith("weight_scale") and ".0." in name}
    assert shapes == {
        f"model.layers.0.{name}.weight_scale": shape
        for name, shape in {
            "self_attn.q_proj": [32, 1],
            "self_attn.k_proj": [16, 1],
            "self_attn.v_proj": [16, 1],
            "self_attn.o_proj": [1],
            "mlp.gate_proj": [64, 1],
            "mlp.up_proj": [64, 1],
            "mlp.down_proj": [1],
        }.items()
    }
    groups = config["quantization_config"]["config_groups"].values()
    strategies = {
        group["weights"]["strategy"]: {name.rpartition(".")[2] for name in group["targets"]} for group in groups
    }
    assert strategies == {
        "channel": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
        "tensor": {"o_proj", "down_proj"},
    }
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["use_cache"]


CONV = "transformer.h.0.attn.c_attn is a Conv1D, and compressed-tensors knows nn.Linear alone (8 such)"
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "hif8": (tiny_llama, QatConfig(), "compressed-tensors has no hif8, its 8-bit float is E4M3 (--to hif8 keeps it"),
    "e5m2": (tiny_llama, QatConfig(format="fp8_e5m2"), "has no fp8_e5m2, its 8-bit float is E4M3 (train fp8_e4m3)"),
    "two formats": (
        tiny_llama,
        QatConfig(format="int8", input=RoleConfig(format="fp8_e4m3")),
        "no engine multiplies weights in int8 with inputs in fp8_e4m3",
    ),
    "conv1d": (tiny_gpt2, QatConfig(format="int8"), CONV),
    "head": (
        lambda: tiny_llama(tie_word_embeddings=False),
        QatConfig(format="int8", targets=("lm_head",)),
        "lm_head is the output head, which engines keep in BF16",
    ),
    "clipped at the target": (
        tiny_llama,
        QatConfig(format="fp8_e4m3", clip="target", input=RoleConfig(target_amax=240.0)),
        "inputs are clipped at 240 of fp8_e4m3, and engines clip at 448 alone (qat.clip: format)",
    ),
    "tokens to a target": (
        tiny_llama,
        QatConfig(format="fp8_e4m3", input=RoleConfig(granularity="per_token", target_amax=240.0)),
        "engines map a token's amax to 448, not to 240",
    ),
    "asymmetric tokens": (
        tiny_llama,
        QatConfig(format="int8", input=RoleConfig(granularity="per_token", symmetric=False)),
        "asymmetric token scales are not written (qat.input.symmetric: true, or per_tensor)",
    ),
    "tokens in powers of two": (
        tiny_llama,
        QatConfig(format="int8", input=TOKEN, scaling=POWERS),
        "engines round no token scale to a power of two (qat.input.scaling.rounding: none)",
    ),
    "half a merged group": (
        tiny_llama,
        QatConfig(format="int8", ignore=("*.0.*.k_proj",)),
        "vLLM merges model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj into "
        "one matrix, which needs one scheme for all (model.layers.0.self_attn.q_proj: int8, inputs int8 per_tensor; "
        "model.layers.0.self_attn.k_proj: BF16;",
    ),
}


@pytest.mark.parametrize(("build", "wanted", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_format_cannot_say_is_refused_with_what_is_nearest(build: Any, wanted: Any, message: str) -> None:
    model = build()
    problems = list(compressed_tensors.problems(make_plan(model, wanted), model))
    assert len(problems) == 1
    assert message in problems[0]


def test_a_refused_arm_leaves_nothing(tmp_path: Path) -> None:
    arm, *_ = frozen_arm(tmp_path, QatConfig())
    with pytest.raises(InputError, match="--to compressed-tensors -- compressed-tensors has no hif8"):
        export_arm(arm, "compressed-tensors", None)
    assert [path.name for path in arm.iterdir()] == ["quantized"]


def _tampered(read: Any) -> Any:
    def reading(path: Path) -> Mapping[str, Stored]:
        found = read(path)
        name, linear = next(iter(found.items()))
        return found | {name: linear._replace(codes=linear.codes ^ 1)}

    return reading


def test_a_folder_that_is_not_what_was_scored_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm, *_ = frozen_arm(tmp_path, ARMS["int8, channels"])
    monkeypatch.setattr(compressed_tensors, "read", _tampered(compressed_tensors.read))
    with pytest.raises(RunError, match=r"\d+ codes and scales read back otherwise than they were scored"):
        export_arm(arm, None, None)
    assert [path.name for path in arm.iterdir()] == ["quantized"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm, *_ = frozen_arm(tmp_path, ARMS["int8, channels"])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "save_torch_state_dict", full)
    with pytest.raises(WriteError, match=r"^cannot write .*compressed-tensors: .*No space left on device$"):
        export_arm(arm, None, None)
    assert [path.name for path in arm.iterdir()] == ["quantized"]


def test_an_arm_that_was_half_written_is_named(tmp_path: Path) -> None:
    arm, *_ = frozen_arm(tmp_path, ARMS["int8, channels"])
    (arm / "quantized" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"quantized/model\.safetensors cannot be read: No such file"):
        export_arm(arm, None, None)
    assert [path.name for path in arm.iterdir()] == ["quantized"]


def test_an_engine_that_computes_otherwise_fails_the_export(
    tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, *_ = frozen_arm(tmp_path, ARMS["int8, channels"])
    save = compressed_tensors.write_model

    def halved(model: Any, tokenizer: Any, tensors: Mapping[str, Tensor], *rest: Any) -> None:
        changed = {name: t / 2 if name.endswith("layernorm.weight") else t for name, t in tensors.items()}
        save(model, tokenizer, changed, *rest)

    monkeypatch.setattr(compressed_tensors, "write_model", halved)
    record = export_arm(arm, None, None)[1]
    assert record.text_proof is not None
    assert record.text_proof.max_difference > 0.01  # the linears are equal, the model is not
    monkeypatch.setattr(compressed_tensors, "read", lambda _: stored_linears(artifact.load(arm)[0]))

    def shifted(model: Any, tokenizer: Any, tensors: Mapping[str, Tensor], *rest: Any) -> None:
        changed = {name: t * 1.001 if name.endswith("weight_scale") else t for name, t in tensors.items()}
        save(model, tokenizer, changed, *rest)

    monkeypatch.setattr(compressed_tensors, "write_model", shifted)
    with pytest.raises(RunError, match=r"a linear computes otherwise in transformers .* \(off by 1\.0e-03 of max"):
        export_arm(arm, None, None)
    assert is_export(arm / "compressed-tensors")  # the earlier one, as it was


def test_where_the_engine_is_not_installed_the_proof_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatrun.evaluate.engines.find_spec", lambda _: None)
    arm, *_ = frozen_arm(tmp_path, ARMS["int8, channels"])
    record = export_arm(arm, None, None)[1]
    why = "compressed_tensors is not installed (pip install 'qatrun[export]')"
    assert record.not_checked == {"linears": why, "text": why}
    assert record.linears_proof is None


def test_weights_are_sharded_and_read_back(tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_SHARD", "12KB")
    arm, frozen, _ = frozen_arm(tmp_path, EXACT["fp8"])
    written, record = export_arm(arm, None, None)
    shards = sorted(path.name for path in written.glob("model*"))
    assert shards == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert record.codes.differing == 0
    assert torch.equal(logits(opened(written, torch.float32)), logits(frozen))


# --- folders


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    for content in ("first", "second"):
        with whole_folder(target) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "file").write_text(content)
        assert (target / "sub" / "file").read_text() == content
    with pytest.raises(WriteError, match="No such file"), whole_folder(target) as partial:
        (partial / "half").write_text((partial / "lacking").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert [path.name for path in target.iterdir()] == ["sub"]


@pytest.fixture
def loose_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_files_have_the_mode_of_any_new_file(tmp_path: Path, loose_umask: None) -> None:
    arm, *_ = frozen_arm(tmp_path, ARMS["int8, channels"])
    written, _ = export_arm(arm, None, None)
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()} == {0o664}


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    arm, *_ = frozen_arm(tmp_path / "arm", ARMS["int8, channels"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="holds something that qatrun did not export"):
        export_arm(arm, None, mine)
    plain = tmp_path / "plain"
    save_model(tiny_llama(), word_tokenizer(), plain, torch.float32)
    with pytest.raises(InputError, match="is no quantized arm"):
        export_arm(plain, None, None)
