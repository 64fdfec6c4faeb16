"""The quantized folder: what is read back is what was written, bit for bit, and it is smaller."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file

import qatrun
from qatrun import QatConfig
from qatrun.errors import DamagedFileError, InputError
from qatrun.export import artifact, weights
from qatrun.layout import WEIGHTS_FILE
from qatrun.model import save_model
from qatrun.quant import attach, freeze, make_plan, quantized_linears
from qatrun.recipe import RoleConfig

CODE_DTYPE = {"hif8": torch.uint8, "fp8_e4m3": torch.uint8, "fp8_e5m2": torch.uint8, "int8": torch.int8}
MODELS = {
    "tied embeddings, grouped queries": tiny_llama,
    "bias, untied": lambda: tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "conv1d": tiny_gpt2,
}


def trained(build: Callable[[], Any], qat: QatConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(model after a few steps, attached and then frozen; its plan)."""
    model = build()
    plan = make_plan(model, qat)
    quantized_steps(model, attach(model, plan))
    freeze(model, dtype)
    return model, plan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a quantized Llama."""
    model, plan = trained(tiny_llama, QatConfig())
    artifact.save(model, word_tokenizer(), plan, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("granularities", [("per_tensor", "per_tensor"), ("per_channel", "per_token")], ids="-".join)
@pytest.mark.parametrize("format_name", CODE_DTYPE)
def test_what_is_read_back_computes_what_was_saved(
    tmp_path: Path, format_name: str, granularities: tuple[str, str], build: Callable[[], Any]
) -> None:
    of_weight, of_input = (RoleConfig(granularity=granularity) for granularity in granularities)
    model, plan = trained(build, QatConfig(format=format_name, weight=of_weight, input=of_input))
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    loaded, tokenizer = qatrun.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert tokenizer("w1 w2 nonsense").input_ids == word_tokenizer()("w1 w2 nonsense").input_ids
    codes = {name: t for name, t in load_file(tmp_path / WEIGHTS_FILE).items() if name.endswith(".codes")}
    assert set(codes) == {f"{name}.codes" for name in plan.linears}
    assert {t.dtype for t in codes.values()} == {CODE_DTYPE[format_name]}
    assert list(quantized_linears(loaded)) == list(plan.linears)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_output_head_leaves_the_embeddings_as_they_are(tmp_path: Path, tied: bool) -> None:
    qat = QatConfig(format="int8", targets=("lm_head", "*.down_proj"))
    model, plan = trained(lambda: tiny_llama(tie_word_embeddings=tied), qat)
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    loaded, _ = qatrun.load(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_float32_and_eager_attention_are_kept(tmp_path: Path) -> None:
    eager = lambda: tiny_llama(attn_implementation="eager")  # noqa: E731
    model, plan = trained(eager, QatConfig(), torch.float32)
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    loaded, _ = qatrun.load(tmp_path)
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(logits(loaded), logits(model))


def test_the_quantized_folder_is_smaller_and_holds_tied_weights_once(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    linear_weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    plan = make_plan(model, QatConfig())
    quantized_steps(model, attach(model, plan), num_steps=1)
    save_model(model, word_tokenizer(), tmp_path, torch.bfloat16)
    freeze(model, torch.bfloat16)
    artifact.save(model, word_tokenizer(), plan, tmp_path / artifact.FOLDER)
    plain, quantized = artifact.size_bytes(tmp_path), artifact.size_bytes(tmp_path / artifact.FOLDER)
    header = 8192
    assert plain - linear_weights - header < quantized < plain - linear_weights + header
    assert "lm_head.weight" not in load_file(tmp_path / artifact.FOLDER / WEIGHTS_FILE)


def test_a_large_quantized_folder_is_in_parts_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = trained(tiny_llama, QatConfig())
    monkeypatch.setattr(weights, "MAX_SHARD", "12KB")
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    parts = weights.weights_files(tmp_path)
    assert [part.name for part in parts] == [
        f"model-0000{n}-of-0000{len(parts)}.safetensors" for n in range(1, len(parts) + 1)
    ]
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) < 24_000
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(qatrun.load(tmp_path)[0]), logits(model))
    assert artifact.size_bytes(tmp_path) == sum(part.stat().st_size for part in parts)

    before, content = weights.weights_sha256(tmp_path), parts[1].read_bytes()
    parts[1].unlink()
    assert weights.weights_sha256(tmp_path) != before
    with pytest.raises(DamagedFileError, match=f"{tmp_path}: .*it is missing"):
        qatrun.load(tmp_path)
    parts[1].write_bytes(content[:100])
    with pytest.raises(DamagedFileError, match=f"{parts[1]} cannot be read"):
        qatrun.load(tmp_path)

    monkeypatch.setattr(weights, "MAX_SHARD", "5GB")
    artifact.save(model, word_tokenizer(), plan, tmp_path)  # leaves nothing of what was there
    assert [path.name for path in tmp_path.glob("model*")] == [WEIGHTS_FILE]
    assert torch.equal(logits(qatrun.load(tmp_path)[0]), logits(model))


def test_a_run_folder_opens_at_the_quantized_folder_that_it_holds(saved: Path) -> None:
    run = saved.parent / "run"
    run.mkdir()
    saved.rename(run / artifact.FOLDER)
    assert artifact.find(run) == artifact.find(run / artifact.FOLDER) == run / artifact.FOLDER
    loaded, _ = qatrun.load(run)
    assert torch.equal(logits(loaded), logits(trained(tiny_llama, QatConfig())[0]))


def test_saving_a_loaded_model_writes_the_same_tensors(saved: Path, tmp_path: Path) -> None:
    loaded, tokenizer = qatrun.load(saved)
    artifact.save(loaded, tokenizer, make_plan(tiny_llama(), QatConfig()), tmp_path / "again")
    first, second = (load_file(folder / WEIGHTS_FILE) for folder in (saved, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_generation_settings_come_back(tmp_path: Path) -> None:
    model, plan = trained(tiny_llama, QatConfig())
    model.generation_config.eos_token_id = 5
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    assert qatrun.load(tmp_path)[0].generation_config.eos_token_id == 5


def test_a_deep_copy_of_a_loaded_model_computes_the_same_on_its_own(saved: Path) -> None:
    loaded, _ = qatrun.load(saved)
    expected = logits(loaded)
    twin = copy.deepcopy(loaded)
    for frozen in quantized_linears(loaded).values():
        frozen.q_weight.zero_()
    assert torch.equal(logits(twin), expected)


def test_missing_weights_are_an_error_and_never_random(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    del tensors["model.norm.weight"]
    save_file(tensors, saved / WEIGHTS_FILE)
    with pytest.raises(InputError, match=r"lack 1 tensors, such as model\.norm\.weight"):
        qatrun.load(saved)


UP, NORM = "model.layers.0.mlp.up_proj", "model.norm.weight"
SCALE = r"must be float32 of shape \[\], positive and finite"
CODES = r"up_proj\.codes must be uint8 of shape \[\d+, \d+\], codes of hif8"
TENSORS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "codes missing": ("codes", lambda t: None, rf"{CODES} \(it is missing\)"),
    "codes of another dtype": ("codes", lambda t: t.view(torch.int8), rf"{CODES} \(got int8"),
    "codes as floats": ("codes", lambda t: t.float(), rf"{CODES} \(got float32"),
    "codes transposed": ("codes", lambda t: t.t().contiguous(), rf"{CODES} \(got uint8"),
    "codes of NaN": ("codes", lambda t: torch.full_like(t, 0x80), r"up_proj\.codes holds codes of hif8 that are NaN"),
    "weight scale missing": ("weight_scale", lambda t: None, rf"weight_scale {SCALE} \(it is missing\)"),
    "scale of float64": ("weight_scale", lambda t: t.double(), rf"weight_scale {SCALE} \(got float64"),
    "scale of int32": ("weight_scale", lambda t: t.int(), rf"weight_scale {SCALE} \(got int32"),
    "scale of another shape": (
        "weight_scale",
        lambda t: t.view(1),
        rf"weight_scale {SCALE} \(got float32 of shape \[1\]",
    ),
    "scale of zero": ("weight_scale", torch.zeros_like, rf"weight_scale {SCALE}"),
    "negative scale": ("input_scale", lambda t: -t, rf"input_scale {SCALE}"),
    "scale of NaN": ("input_scale", lambda t: t * torch.nan, rf"input_scale {SCALE}"),
    "scale of Inf": ("input_scale", lambda t: t * torch.inf, rf"input_scale {SCALE}"),
    "scale whose reciprocal overflows": ("input_scale", lambda t: t * 0 + 1e-40, rf"input_scale {SCALE}"),
    "empty scale": ("input_scale", lambda t: torch.ones(0), rf"input_scale {SCALE} \(got float32 of shape \[0\]\)"),
    "a stray tensor": ("zero_point", lambda t: torch.zeros(1), r"up_proj\.zero_point is no tensor of this model"),
    "both codes and weight": ("weight", lambda t: torch.zeros(1), r"up_proj\.weight is no tensor of this model"),
}


@pytest.mark.parametrize(("leaf", "change", "message"), TENSORS.values(), ids=TENSORS)
def test_no_tensor_reaches_a_kernel_unchecked(
    saved: Path, leaf: str, change: Callable[[Any], Any], message: str
) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    changed = change(tensors.pop(f"{UP}.{leaf}", torch.ones(())))
    save_file(tensors if changed is None else tensors | {f"{UP}.{leaf}": changed}, saved / WEIGHTS_FILE)
    with pytest.raises(InputError, match=message) as refused:
        qatrun.load(saved)
    (problem,) = refused.value.problems
    assert str(problem).startswith(f"{saved / WEIGHTS_FILE}: {UP}")


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.double(), lambda t: t * torch.nan])
def test_other_weights_are_checked_too(saved: Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    save_file(tensors | {NORM: change(tensors[NORM])}, saved / WEIGHTS_FILE)
    with pytest.raises(InputError, match=rf"model\.safetensors: {NORM} "):
        qatrun.load(saved)


def test_many_wrong_tensors_are_counted(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    wrong = {name: t.double() for name, t in tensors.items() if name.endswith("_scale")}
    save_file(tensors | wrong, saved / WEIGHTS_FILE)
    with pytest.raises(InputError, match=rf"\(and {len(wrong) - 1} more such\)$"):
        qatrun.load(saved)


def test_weights_that_are_no_safetensors_are_named(saved: Path) -> None:
    (saved / WEIGHTS_FILE).write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        qatrun.load(saved)


PLANS: dict[str, tuple[str, Any, str]] = {
    "no version": ("format_version", None, "format_version: Field required"),
    "no plan": ("plan", None, "plan: Field required"),
    "a dtype that is a function": ("compute_dtype", "load", "compute_dtype: Input should be 'float32' or 'bfloat16'"),
    "no linears": ("plan.linears", {}, "linears: must name one or more"),
    "linears lacking": ("plan.linears", None, "linears: Field required"),
    "a scheme that is not there": ("plan.linears.UP.input", 9, "linears: must give each role the number of a scheme"),
    "groups of others": ("plan.input_group", {UP: UP}, "input_group: must name a group"),
    "no input role": ("plan.linears.UP.input", None, "must have schemes of weight and input"),
    "an unknown format": ("plan.schemes.0.format", "hif9", "weight: format 'hif9'"),
    "a negative target": ("plan.schemes.0.target_amax", -15.0, "target_amax: -15 is no value of hif8"),
    "a granularity of activations": ("plan.schemes.0.granularity", "per_token", "no weight has a scale per_token"),
    "an unknown scaling": ("plan.schemes.0.scaling.type", "magic", r"schemes.0.scaling.type: Input should be"),
    "an unknown edge": ("plan.schemes.0.clip", "nowhere", "clip: Input should be"),
    "a scalar for a mapping": ("plan.linears", 7, "linears: Input should be a valid"),
}


@pytest.mark.parametrize(("key", "value", "message"), PLANS.values(), ids=PLANS)
def test_a_plan_that_is_none_is_refused(saved: Path, key: str, value: Any, message: str) -> None:
    description = json.loads((saved / artifact.PLAN_FILE).read_text())
    *parents, leaf = [int(part) if part.isdigit() else part.replace("UP", UP) for part in key.split(".")]
    place = description
    for part in parents:
        place = place[part]
    place[leaf] = value
    if value is None:
        del place[leaf]
    (saved / artifact.PLAN_FILE).write_text(json.dumps(description))
    with pytest.raises(InputError, match=message) as refused:
        qatrun.load(saved)
    assert str(saved / artifact.PLAN_FILE) in str(refused.value)


def test_a_plan_of_another_model_is_refused(saved: Path) -> None:
    file = saved / artifact.PLAN_FILE
    file.write_text(file.read_text().replace("layers.1.", "layers.7."))
    with pytest.raises(InputError, match=r"the plan names model\.layers\.7\.\S+, which is no linear of this model"):
        qatrun.load(saved)


def test_folders_that_are_no_quantized_model_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantized model"):
        qatrun.load(tmp_path / "nowhere")
    description = json.loads((saved / artifact.PLAN_FILE).read_text())
    description["format_version"] += 1
    (saved / artifact.PLAN_FILE).write_text(json.dumps(description))
    with pytest.raises(InputError, match="format version 3"):
        qatrun.load(saved)


def test_a_plan_of_format_version_1_is_read(saved: Path) -> None:
    """It had one scheme a role, for all linears."""
    file = saved / artifact.PLAN_FILE
    plan, description = artifact.read_plan(saved), json.loads(file.read_text())
    roles = {role: asdict(scheme) | {"role": role} for role, scheme in plan.schemes[plan.linears[0]].items()}
    clip, ste = ({spec.pop(key) for spec in roles.values()}.pop() for key in ("clip", "ste"))
    description["plan"] = {
        "linears": list(plan.linears),
        "input_group": dict(plan.input_group),
        "roles": roles,
        "clip": clip,
        "ste": ste,
        "saved_activations": "values",
    }
    before = logits(artifact.load(saved)[0])
    file.write_text(json.dumps(description | {"format_version": 1}))
    assert artifact.read_plan(saved) == plan
    assert torch.equal(logits(artifact.load(saved)[0]), before)
