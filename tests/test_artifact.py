"""The quantized folder: what is read back is what was written, bit for bit, and it is smaller."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file

import qatrun
from qatrun import QatConfig, artifact
from qatrun.errors import InputError
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
    codes = {name: t for name, t in load_file(tmp_path / artifact.WEIGHTS_FILE).items() if name.endswith(".codes")}
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
    assert "lm_head.weight" not in load_file(tmp_path / artifact.FOLDER / artifact.WEIGHTS_FILE)


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
    first, second = (load_file(folder / artifact.WEIGHTS_FILE) for folder in (saved, tmp_path / "again"))
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
    tensors = load_file(saved / artifact.WEIGHTS_FILE)
    del tensors["model.norm.weight"]
    save_file(tensors, saved / artifact.WEIGHTS_FILE)
    with pytest.raises(InputError, match=r"lack 1 tensors, such as model\.norm\.weight"):
        qatrun.load(saved)


@pytest.mark.parametrize("leaf", ["codes", "weight_scale", "input_scale"])
def test_a_missing_part_of_a_quantized_linear_is_an_error(saved: Path, leaf: str) -> None:
    tensors = load_file(saved / artifact.WEIGHTS_FILE)
    del tensors[f"model.layers.0.mlp.up_proj.{leaf}"]
    save_file(tensors, saved / artifact.WEIGHTS_FILE)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj"):
        qatrun.load(saved)


def test_folders_that_are_no_quantized_model_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantized model"):
        qatrun.load(tmp_path / "nowhere")
    description = json.loads((saved / artifact.PLAN_FILE).read_text())
    description["format_version"] += 1
    (saved / artifact.PLAN_FILE).write_text(json.dumps(description))
    with pytest.raises(InputError, match="format version 2"):
        qatrun.load(saved)
