"""Model folders that are not what they should be: one sentence each that calls it what it is, before weights are loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB_SIZE, tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, XLNetConfig, XLNetLMHeadModel

from qatrun.errors import InputError
from qatrun.model import architecture, check_model, load_model, save_model
from qatrun.recipe import ModelConfig

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder, to be damaged."""
    save_model(tiny_llama(), word_tokenizer(), tmp_path / "m", torch.float32)
    return tmp_path / "m"


def check(folder: Path, **settings: Any) -> str:
    """What a preflight says of the folder; empty where it is fine."""
    model = ModelConfig(path=str(folder), **settings)
    try:
        check_model(model, architecture(model))
    except InputError as error:
        problems = error.problems
    else:
        return ""
    assert {problem.key for problem in problems} == {"model.path"}
    assert all(problem.message.startswith(str(folder)) for problem in problems)
    return "; ".join(problem.message.removeprefix(f"{folder}: ") for problem in problems)


def said_by_loading(folder: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_model(ModelConfig(path=str(folder), **settings), torch.float32)
    return str(caught.value)


def test_a_whole_folder_is_fine(folder: Path) -> None:
    assert check(folder) == ""


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, 'config.json says "num_attention_heads": 0'),
    "text": ({"hidden_size": "32"}, 'config.json says "hidden_size": "32"'),
    "null": ({"hidden_size": None}, 'config.json says "hidden_size": null'),
    "a list": ({"vocab_size": [101]}, 'config.json says "vocab_size": [101]'),
    "a fraction": ({"intermediate_size": 63.5}, 'config.json says "intermediate_size": 63.5'),
    "negative": ({"vocab_size": -5}, 'config.json says "vocab_size": -5'),
    "no layers": ({"num_hidden_layers": 0}, 'config.json says "num_hidden_layers": 0: a model without layers'),
    "absurdly many layers": ({"num_hidden_layers": 10**12}, '"num_hidden_layers": 1000000000000, which no model has'),
    "too many layers": ({"num_hidden_layers": 60_000}, "asks for more than 200,000 weight tensors"),
    "in a nested config": (
        {"text_config": {"num_hidden_layers": 10**12}},
        '"text_config.num_hidden_layers": 1000000000000',
    ),
    "activation": ({"hidden_act": "superglu"}, 'config.json says "hidden_act": "superglu"'),
    "rope": ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, 'config.json says "rope_parameters"'),
    "padding": ({"pad_token_id": 99999}, 'config.json says "pad_token_id": 99999'),
    "a module as dtype": ({"dtype": "os"}, '"dtype": "os", which is no dtype'),
    "a prefix": ({"torch_dtype": "torch.float16"}, '"torch_dtype": "torch.float16", which is no dtype'),
    "a number as dtype": ({"dtype": 16}, '"dtype": 16, which is no dtype'),
    "no model type": ({"model_type": None}, "names no architecture"),
    "a number as model type": ({"model_type": 7}, "names no architecture"),
    "an unknown model type": ({"model_type": "llamma"}, "model type `llamma`"),
    "another kind of model": ({"model_type": "clip"}, "no causal language model of the type 'clip'"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already (gptq"),
    "old bitsandbytes": ({"quantization_config": {"load_in_8bit": True}}, "quantized already (bitsandbytes"),
    "nested": ({"quantization_config": "fp8"}, "quantized already"),
    "old compressed-tensors": ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors"),
    "wider": ({"vocab_size": 150}, "embed_tokens.weight is 101x32 in the checkpoint, 150x32 by config.json"),
    "fewer layers": ({"num_hidden_layers": 1}, "holds 9 weights that the architecture by config.json has no place for"),
    "more layers": ({"num_hidden_layers": 3}, "the checkpoint lacks 9 weights, such as model.layers.2"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_no_model_can_have(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert message in check(folder)
    assert message in said_by_loading(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no mapping"),
        ("3", "is no mapping"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("", "is empty"),
        ("<!DOCTYPE html><html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
    ],
)
def test_a_config_that_is_something_else(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        architecture(ModelConfig(path=str(folder)))


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def pickled(contents: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        torch.save(contents(load_file(folder / WEIGHTS)), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:50_000])


def index(shards: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))

    return damage


UP = "model.layers.0.mlp.up_proj"
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor pytorch_model.bin is there"),
    "empty": (write(WEIGHTS, b""), "model.safetensors is empty"),
    "truncated": (cut, "model.safetensors is truncated: 50,000 of "),
    "header cut": (write(WEIGHTS, b"\xff\x00\x00\x00\x00\x00\x00\x00{"), "model.safetensors is truncated"),
    "noise": (write(WEIGHTS, bytes(range(256)) * 9), "model.safetensors is truncated, or no safetensors file"),
    "header is no JSON": (write(WEIGHTS, (5).to_bytes(8, "little") + b"hello"), "is no whole safetensors file"),
    "pointer": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "page": (write(WEIGHTS, b"\n<!doctype html><title>404</title>"), "is a web page"),
    "code": (
        pickled(lambda t: {**t, "args": argparse.Namespace(x=1)}),
        "(argparse.Namespace), and to read those is to run",
    ),
    "nested": (pickled(lambda t: {"model": t, "step": 3}), "'model' is no tensor"),
    "a list": (pickled(lambda t: list(t.values())), "no mapping of names to tensors"),
    "damaged archive": (
        lambda folder: (pickled(dict)(folder), write("pytorch_model.bin", b"PK\x03\x04" + b"\0" * 99)(folder))[0],
        "pytorch_model.bin cannot be read as weights",
    ),
    "lost shard": (index({"a": "model-00001-of-00002.safetensors"}), "model-00001-of-00002.safetensors is missing"),
    "index leads out": (index({"a": "../other.safetensors"}), "is no index of weight files"),
    "index of nothing": (index([]), "is no index of weight files"),
    "one lost": (rewrite(lambda t: t.pop(f"{UP}.weight")), f"the checkpoint lacks 1 weights, such as {UP}.weight"),
    "a bias too many": (
        rewrite(lambda t: t.update({f"{UP}.bias": torch.ones(64)})),
        f"no place for, such as {UP}.bias",
    ),
    "transposed": (
        rewrite(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].t().contiguous()})),
        f"{UP}.weight is 32x64 in the checkpoint, 64x32 by config.json",
    ),
    "packed": (rewrite(lambda t: t.update({f"{UP}.qweight": torch.ones(4, 64, dtype=torch.int32)})), "(GPTQ or AWQ"),
    "fp8": (
        rewrite(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.float8_e4m3fn)})),
        f"quantized already (F8_E4M3, by the dtype of {UP}.weight)",
    ),
    "modelopt": (write("hf_quant_config.json", b"{}"), "quantized already (ModelOpt, by hf_quant_config.json)"),
    "generation": (write("generation_config.json", b'{"max_new_tokens": 0}'), "generation_config.json"),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_a_weight_file_that_is_not_what_it_should_be(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    assert message in check(folder)


def test_pickled_weights_alone_are_read_without_running_anything(folder: Path) -> None:
    pickled(dict)(folder)
    assert check(folder) == ""
    assert load_model(ModelConfig(path=str(folder)), torch.float32).dtype == torch.float32


def test_what_other_tools_add_beside_the_weights_is_none_of_ours(folder: Path) -> None:
    extra = {"v_head.summary.weight": torch.ones(1, 32), "model.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(lambda tensors: tensors.update(extra))(folder)
    assert check(folder) == ""
    load_model(ModelConfig(path=str(folder)), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(folder: Path, value: float) -> None:
    rewrite(lambda tensors: tensors[f"{UP}.weight"].__setitem__((3, 3), value))(folder)
    assert f"{UP}.weight holds NaN or infinite values" in said_by_loading(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: BertLMHeadModel(
                BertConfig(
                    vocab_size=VOCAB_SIZE,
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=32,
                )
            ),
            "an encoder (is_decoder is false)",
        ),
        (
            lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=1, n_head=2, d_inner=32)),
            "changes with the tokens after it",
        ),
    ],
    ids=["bert", "xlnet"],
)
def test_a_model_that_sees_the_answer_is_refused(tmp_path: Path, model: Callable[[], Any], message: str) -> None:
    torch.manual_seed(0)
    model().save_pretrained(tmp_path)
    assert message in check(tmp_path, attn_implementation="eager")
    assert message in said_by_loading(tmp_path, attn_implementation="eager")


def test_an_attention_kernel_that_an_architecture_lacks_is_the_fault_of_its_key(tmp_path: Path) -> None:
    XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=1, n_head=2)).config.save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match=r"XLNetLMHeadModel does not support .*; try eager") as caught:
        architecture(ModelConfig(path=str(tmp_path)))
    assert [problem.key for problem in caught.value.problems] == ["model.attn_implementation"]


def test_the_same_encoder_trained_as_a_decoder_is_fine(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(**sizes, intermediate_size=32, is_decoder=True)).save_pretrained(tmp_path)
    assert check(tmp_path) == ""


@pytest.mark.parametrize("settings", [{"early_stopping": True}, {"output_scores": True}, {"pad_token_id": -1}])
def test_generation_settings_that_are_only_odd_are_saved_as_they_are(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert check(folder) == ""
    save_model(
        load_model(ModelConfig(path=str(folder)), torch.float32), word_tokenizer(), folder / "again", torch.float32
    )
    saved = json.loads((folder / "again" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
