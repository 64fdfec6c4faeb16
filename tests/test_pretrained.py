"""A quantized folder in transformers: the model that was scored, or a sentence, and never weights that were made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import qatrun
from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.export import artifact
from qatrun.layout import WEIGHTS_FILE
from qatrun.quant import attach, freeze, make_plan, quantized_linears
from qatrun.recipe import RoleConfig

FINE = {"weight": RoleConfig(granularity="per_channel"), "input": RoleConfig(granularity="per_token")}
STUDIES: dict[str, tuple[Any, QatConfig]] = {
    "hif8, tied": (tiny_llama, QatConfig()),
    "int8, bias, per token": (lambda: tiny_llama(attention_bias=True, mlp_bias=True), QatConfig(format="int8", **FINE)),
    "a quantized head": (tiny_llama, QatConfig(format="int8", targets=("lm_head", "*.down_proj"))),
    "its own head": (lambda: tiny_llama(tie_word_embeddings=False), QatConfig(format="fp8_e4m3")),
    "conv1d": (tiny_gpt2, QatConfig()),
    "eager": (lambda: tiny_llama(attn_implementation="eager"), QatConfig()),
}


def saved(folder: Path, study: str = "hif8, tied") -> Any:
    """The frozen model that the folder now holds."""
    build, qat = STUDIES[study]
    model = build()
    plan = make_plan(model, qat)
    quantized_steps(model, attach(model, plan))
    freeze(model, torch.bfloat16)
    artifact.save(model, word_tokenizer(), plan, folder)
    return model


@pytest.mark.parametrize("study", STUDIES)
def test_from_pretrained_gives_the_model_that_was_saved(tmp_path: Path, study: str) -> None:
    model = saved(tmp_path, study)
    for options in ({}, {"dtype": torch.float32}):  # its own dtype, whatever is asked for
        opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert torch.equal(logits(opened), logits(model))
        assert not any(info.values())
        assert list(quantized_linears(opened)) == list(quantized_linears(model))
        assert opened.config._attn_implementation == model.config._attn_implementation
        assert opened.dtype == torch.bfloat16


def test_it_writes_text_in_a_pipeline_and_is_loaded_by_qatrun(tmp_path: Path) -> None:
    saved(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path))
    assert quantized_linears(writer.model)
    ids = AutoTokenizer.from_pretrained(tmp_path)("w1 w2", return_tensors="pt")
    ours = qatrun.load(tmp_path)[0]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(writer.model.generate(**ids, **settings), ours.generate(**ids, **settings))


@pytest.mark.parametrize("imported", ["", "import qatrun", "import transformers.quantizers; import qatrun"])
def test_who_has_not_imported_qatrun_gets_a_sentence_and_no_model(tmp_path: Path, imported: str) -> None:
    saved(tmp_path)
    code = "from transformers import AutoModelForCausalLM as A; A.from_pretrained(r'{}'); print('opened')"
    code = f"{imported}\n{code.format(tmp_path)}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if imported:
        assert ran.stdout == "opened\n", ran.stderr
    else:
        assert ran.returncode == 1
        assert "ValueError" in ran.stderr
        assert "import qatrun (pip install qatrun) before from_pretrained" in ran.stderr


def test_importing_qatrun_imports_no_torch() -> None:
    code = "import qatrun, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_folder_that_lacks_or_spoils_a_tensor_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / WEIGHTS_FILE
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, file)
    with pytest.raises(InputError, match=r"it lacks model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(tensors | {scale: -tensors[scale]}, file)
    with pytest.raises(InputError, match=r"up_proj\.weight_scale must be float32"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_folder_and_a_map_over_devices_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match="opens on one device"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="format version 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("opened", ["frozen", "qatrun.load", "from_pretrained"])
def test_save_pretrained_of_a_quantized_model_is_refused(tmp_path: Path, opened: str) -> None:
    model = saved(tmp_path / "saved")
    if opened != "frozen":
        load = AutoModelForCausalLM.from_pretrained if opened == "from_pretrained" else qatrun.load
        found = load(tmp_path / "saved")
        model = found[0] if isinstance(found, tuple) else found
    with pytest.raises(InputError, match=r"qatrun\.save\(model, tokenizer, plan, folder\) does"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_of_an_earlier_version_opens_in_qatrun(tmp_path: Path) -> None:
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"], config["transformers_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(qatrun.load(tmp_path)[0]), logits(model))
