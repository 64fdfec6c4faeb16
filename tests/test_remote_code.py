"""A model whose code comes with it: run only where the recipe trusts it, and then through to the arm that is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import logits, quantized_steps, tiny_llama, word_tokenizer
from tiny_world import run_qatrun, write_world

from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.export import artifact
from qatrun.model import architecture, check_model, load_model, save_model
from qatrun.quant import attach, freeze, make_plan
from qatrun.recipe import ModelConfig
from qatrun.tokenizer import load_tokenizer

CONFIGURATION = """
from transformers import LlamaConfig

class TwinConfig(LlamaConfig):
    model_type = "twin"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_twin import TwinConfig

class TwinForCausalLM(LlamaForCausalLM):
    config_class = TwinConfig

    def forward(self, *args, **settings):
        output = super().forward(*args, **settings)
        output.logits = 2 * output.logits
        return output
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama that doubles its logits, with the code for that."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another folder
    folder = tmp_path / "twin"
    save_model(tiny_llama(), word_tokenizer(), folder, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    kinds = {"AutoConfig": "configuration_twin.TwinConfig", "AutoModelForCausalLM": "modeling_twin.TwinForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "twin", "auto_map": kinds}))
    (folder / "configuration_twin.py").write_text(CONFIGURATION)
    (folder / "modeling_twin.py").write_text(MODELING)
    return folder


def test_code_that_is_not_trusted_is_not_run(folder: Path) -> None:
    (folder / "configuration_twin.py").write_text("raise AssertionError('remote code ran')\n")
    with pytest.raises(InputError, match="trust_remote_code"):
        architecture(ModelConfig(path=str(folder)))


def test_trusted_code_is_trusted_when_the_arm_is_read_back(folder: Path, tmp_path: Path) -> None:
    source = ModelConfig(path=str(folder), trust_remote_code=True)
    check_model(source, architecture(source))
    model = load_model(source, torch.float32)
    assert torch.equal(logits(model), 2 * logits(tiny_llama()))
    plan = make_plan(model, QatConfig())
    assert plan.linears == make_plan(tiny_llama(), QatConfig()).linears
    quantized_steps(model, attach(model, plan))
    save_model(model, word_tokenizer(), tmp_path / "arm", torch.float32)
    freeze(model, torch.float32)
    artifact.save(model, word_tokenizer(), plan, tmp_path / "arm" / artifact.FOLDER)
    loaded, _ = artifact.load(tmp_path / "arm", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(model))
    load_model(source.model_copy(update={"path": str(tmp_path / "arm")}), torch.float32)
    with pytest.raises(InputError, match="trust_remote_code"):
        artifact.load(tmp_path / "arm")
    # In a process that has never seen the first folder, too.
    read = f"from qatrun.export import artifact; artifact.load({str(tmp_path / 'arm')!r}, trust_remote_code=True)"
    folder.rename(tmp_path / "gone")
    subprocess.run([sys.executable, "-c", read], check=True, capture_output=True)


def test_what_is_scored_or_diagnosed_runs_no_code_unasked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe in a study is trusted by the verbs that go on with the study; a model alone by the option alone."""
    write_world(tmp_path)
    recipe = (tmp_path / "tiny.yaml").read_text().replace("path: model", "path: twin\n  trust_remote_code: true")
    (tmp_path / "tiny.yaml").write_text(recipe)
    ran = run_qatrun("train", "tiny.yaml", "--set", "diagnose.at_end=false", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert run_qatrun("diagnose", cwd=tmp_path).code == 0
    loaded: list[str] = []
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.get_class_in_module", lambda name, *_, **__: loaded.append(name)
    )
    for path in ("twin", "runs/tiny/bf16", "runs/tiny/hif8", "runs/tiny/hif8/quantized"):
        ran = run_qatrun("eval", path, "--tasks", "likes.yaml", "--limit", "2", cwd=tmp_path)
        shown = "runs/tiny/hif8/quantized" if "hif8" in path else path
        assert (ran.code, ran.err) == (
            2,
            f"{shown}: its code comes with it, and is run only with --trust-remote-code\n",
        )
    assert loaded == []
    monkeypatch.undo()
    for path in ("twin", "runs/tiny/bf16", "runs/tiny/hif8"):
        ran = run_qatrun("eval", path, "--tasks", "likes.yaml", "--limit", "2", "--trust-remote-code", cwd=tmp_path)
        assert ran.code == 0, ran.err


def test_a_tokenizer_that_is_code_is_not_run_either(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoTokenizer": ["tokenization_twin.TwinTokenizer", None]}
        content |= {"model_type": "llama"} if name == "config.json" else {"tokenizer_class": "TwinTokenizer"}
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenization_twin.py").write_text("raise AssertionError('remote code ran')\n")
    with pytest.raises(InputError, match="its code comes with it, and is run only with trust_remote_code: true"):
        load_tokenizer(ModelConfig(path=str(folder)))
