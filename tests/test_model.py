"""Models from folders and back: nothing random, nothing lost, no remote code."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, with_parameters_in, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaModel

from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.model import architecture, from_tensors, load_config, load_model, save_model
from qatrun.quant import attach, make_plan
from qatrun.recipe import ModelConfig
from qatrun.tokenizer import load_tokenizer

MODELS = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tie_word_embeddings=False),
    "conv1d": tiny_gpt2,
}


def source(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), **settings)


@contextmanager
def no_complaints() -> Iterator[None]:
    """Fails where transformers logs or Python raises a warning."""
    seen: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    collector, logger = Collector(logging.WARNING), logging.getLogger("transformers")
    verbosity = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(collector)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    logger.removeHandler(collector)
    logger.setLevel(verbosity)
    assert seen + [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_plain_transformers_opens_a_saved_model_in_bfloat16_without_a_warning(
    tmp_path: Path, build: Callable[[], Any], quantized: bool
) -> None:
    model = build()
    if quantized:
        quantized_steps(model, attach(model, make_plan(model, QatConfig())))
    masters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with no_complaints():
        save_model(model, word_tokenizer(), tmp_path, torch.bfloat16)
        opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert not any(info.values())
    assert opened.dtype == torch.bfloat16
    assert opened.config.use_cache
    expected = build()
    expected.load_state_dict(masters)
    assert torch.equal(logits(opened), logits(with_parameters_in(expected, torch.bfloat16)))
    assert tokenizer("w1 w2").input_ids == word_tokenizer()("w1 w2").input_ids


def test_saving_leaves_the_master_weights_and_the_config_as_they_were(tmp_path: Path) -> None:
    model = tiny_llama()
    parameters = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    save_model(model, word_tokenizer(), tmp_path, torch.bfloat16)
    assert (model.dtype, model.config.dtype, model.config.use_cache) == (torch.float32, None, False)
    for name, parameter in model.named_parameters():
        same, address, value = parameters[name]
        assert parameter is same
        assert parameter.data_ptr() == address
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)


def test_tied_weights_are_stored_once_and_untied_ones_both(tmp_path: Path) -> None:
    for tied in (True, False):
        save_model(tiny_llama(tie_word_embeddings=tied), word_tokenizer(), tmp_path / str(tied), torch.bfloat16)
        tensors = load_file(tmp_path / str(tied) / "model.safetensors")
        assert ("lm_head.weight" in tensors) is not tied
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_loads_in_the_dtype_asked_for_ready_to_score(tmp_path: Path, build: Callable[[], Any]) -> None:
    model = build()
    save_model(model, word_tokenizer(), tmp_path, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(source(tmp_path), dtype)
        assert (loaded.dtype, loaded.training, loaded.config.use_cache) == (dtype, False, False)
        assert torch.equal(logits(loaded), logits(with_parameters_in(model, dtype)))
    assert load_model(source(tmp_path), "auto").dtype == torch.float32
    assert load_model(source(tmp_path, attn_implementation="eager"), "auto").config._attn_implementation == "eager"


def test_sampling_settings_without_do_sample_do_not_stop_the_export(tmp_path: Path) -> None:
    save_model(tiny_llama(), word_tokenizer(), tmp_path, torch.float32)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 7}')
    loaded = load_model(source(tmp_path), torch.float32)
    save_model(loaded, word_tokenizer(), tmp_path / "saved", torch.float32)
    generation = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (generation.temperature, generation.do_sample, generation.eos_token_id) == (0.6, True, 7)


def test_the_architecture_has_shapes_and_no_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    save_model(model, word_tokenizer(), tmp_path, torch.float32)
    empty = architecture(source(tmp_path))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    filled = from_tensors(empty, model.state_dict(), torch.float32)
    assert torch.equal(logits(filled), logits(model))


def test_missing_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    save_model(tiny_llama(), word_tokenizer(), tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 2 weights, such as model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(source(tmp_path), torch.float32)
    assert caught.value.problems[0].key == "model.path"
    with pytest.raises(InputError, match="lack 2 tensors"):
        from_tensors(architecture(source(tmp_path)), tensors, torch.float32)


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    save_model(tiny_llama(), word_tokenizer(), tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.path"):
        load_model(source(tmp_path), torch.float32)


def test_what_is_made_of_tensors_holds_those_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_first_token(_model: Any, module: torch.nn.Module) -> None:
        """What Youtu does to an embedding that was loaded already."""
        if isinstance(module, torch.nn.Embedding):
            module.weight.data[0] = 0

    model, expected, tensors = tiny_llama(), tiny_llama().state_dict(), tiny_llama().state_dict()
    assert expected["model.embed_tokens.weight"][0].any()
    monkeypatch.setattr(LlamaModel, "_init_weights", forget_the_first_token)
    filled = from_tensors(model, tensors, torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in filled.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{not json", "is no JSON"),
        ('{"model_type": "unheard_of"}', "unheard_of"),
        ('{"model_type": "llama"}', "neither model.safetensors nor pytorch_model.bin is there"),
    ],
)
def test_a_folder_that_is_no_model_is_one_problem(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_model(source(tmp_path), torch.float32)
    assert [problem.key for problem in caught.value.problems] == ["model.path"]


def test_a_folder_that_is_not_there_or_has_no_tokenizer_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder") as caught:
        load_config(source(tmp_path / "nowhere"))
    assert [problem.key for problem in caught.value.problems] == ["model.path"]
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(source(tmp_path))


@pytest.fixture
def openpangu(tmp_path: Path) -> Path:
    """A folder as OpenPangu-Embedded is published: a Llama under names that only its own code knows."""
    model = tiny_llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.1, 0.2)
    save_model(model, word_tokenizer(), tmp_path, torch.bfloat16)
    config = {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
            "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
            "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
        },
        "model_type": "PanguEmbedded",
        "attention_dropout": 0.0,
        "bias": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 4000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2",
        "use_cache": True,
        "vocab_size": 101,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PanguTokenizer"
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("configuration_openpangu_dense", "modeling_openpangu_dense", "tokenization_openpangu"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('remote code ran')\n")
    return tmp_path


def test_openpangu_loads_as_the_llama_it_is_without_remote_code(openpangu: Path, tmp_path: Path) -> None:
    with no_complaints():
        loaded, tokenizer = load_model(source(openpangu), "auto"), load_tokenizer(source(openpangu))
    assert loaded.dtype == torch.bfloat16
    rope = {"rope_type": "default", "rope_theta": 4e6}
    llama = tiny_llama(attention_bias=True, rms_norm_eps=1e-5, rope_parameters=rope)
    llama.load_state_dict(loaded.state_dict())
    with_parameters_in(llama, torch.bfloat16)
    assert loaded.model.layers[1].self_attn.q_proj.bias.abs().min() > 0
    assert loaded.model.layers[0].self_attn.o_proj.bias is not None
    assert loaded.model.layers[0].mlp.up_proj.bias is None
    assert torch.equal(logits(loaded), logits(llama))
    other_theta = tiny_llama(attention_bias=True, rms_norm_eps=1e-5)
    other_theta.load_state_dict(loaded.state_dict())
    assert not torch.equal(logits(loaded), logits(with_parameters_in(other_theta, torch.bfloat16)))
    assert tokenizer("w3 w1").input_ids == word_tokenizer()("w3 w1").input_ids
    assert not any("openpangu" in name for name in sys.modules)
    save_model(loaded, tokenizer, tmp_path / "saved", torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.model_type == "llama"
    assert torch.equal(logits(again), logits(loaded))


def test_openpangu_has_its_architecture_too(openpangu: Path) -> None:
    config = load_config(source(openpangu))
    assert isinstance(config, transformers.LlamaConfig)
    assert config.attention_bias
    assert not config.mlp_bias
    assert config.rope_parameters["rope_theta"] == 4e6
    assert len(make_plan(architecture(source(openpangu)), QatConfig()).linears) == 14
