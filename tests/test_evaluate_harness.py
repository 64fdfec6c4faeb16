"""lm-eval around a model in memory: its numbers are lm-eval's, and the model comes back as it went in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qatrun import demo
from qatrun.data import IGNORE_INDEX
from qatrun.errors import InputError, NonFiniteError
from qatrun.evaluate.engines import OwnModel
from qatrun.evaluate.harness import score
from qatrun.evaluate.registry import find_task
from qatrun.evaluate.scores import ItemScores, Scores
from qatrun.evaluate.sources import local_folder
from qatrun.evaluate.text import mean_nll
from qatrun.layout import SAMPLES, SCORES_OF_LM_EVAL
from qatrun.recipe import EvalConfig

DEMO = EvalConfig(tasks=dict.fromkeys(demo.TASKS, 0), limit=8, batch_size=4)
FACTS = EvalConfig(tasks={"demo_facts": 0}, limit=8, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for task in demo.TASKS for item in demo.items(task)[:8] for text in (item["query"], *item["choices"])]
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocab = {word: index for index, word in enumerate(["<eos>", "<unk>", *words])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_loglikelihoods_are_those_of_the_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    items = score(model, tokenizer, DEMO).tasks["demo_inference"].items
    for row, item in enumerate(demo.items("demo_inference")[:8]):
        expected = []
        for choice in item["choices"]:
            prompt, answer = (tokenizer(text, return_tensors="pt").input_ids for text in (item["query"], choice))
            with torch.no_grad():
                logprobs = F.log_softmax(model(torch.cat([prompt, answer], dim=1)).logits[0].float(), dim=-1)
            at_answer = logprobs[prompt.shape[1] - 1 : -1].gather(1, answer[0, :, None])
            expected.append(float(at_answer.sum()))
        np.testing.assert_allclose(items.choice_loglikelihoods[row], expected, rtol=1e-5)
        assert items.loglikelihood[row] == items.choice_loglikelihoods[row, item["answer"]]
        assert items.correct[row] == (int(np.argmax(expected)) == item["answer"])


def test_the_tokens_of_right_answers_are_counted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for task, scored in score(model, tokenizer, DEMO).tasks.items():
        answers = [item["choices"][item["answer"]] for item in demo.items(task)[:8]]
        assert scored.num_answer_tokens == sum(len(tokenizer(answer).input_ids) for answer in answers)


def test_a_sample_is_spread_evenly_and_its_items_are_the_very_same(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = score(model, tokenizer, DEMO).tasks["demo_facts"].items
    sample = score(model, tokenizer, DEMO, at_most=3)
    found = sample.tasks["demo_facts"].items
    chosen = [0, 2, 5]  # of 8
    assert found.item_id.tolist() == whole.item_id[chosen].tolist()
    np.testing.assert_allclose(found.loglikelihood, whole.loglikelihood[chosen], rtol=1e-5)
    assert sample.settings["at_most"] == 3


def test_everything_is_put_back(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    score(model, tokenizer, FACTS)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert model.tie_weights.__func__ is LlamaForCausalLM.tie_weights


def test_embeddings_are_not_tied_again(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tied = score(model, tokenizer, FACTS)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    untied = score(model, tokenizer, FACTS)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not np.allclose(untied.tasks["demo_facts"].items.loglikelihood, tied.tasks["demo_facts"].items.loglikelihood)


def test_a_patched_forward_is_what_is_scored(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = score(model, tokenizer, FACTS)
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    hooked = score(model, tokenizer, FACTS)
    handle.remove()
    again = score(model, tokenizer, FACTS)
    ours = [scores.tasks["demo_facts"].items.loglikelihood for scores in (plain, hooked, again)]
    assert not np.allclose(ours[0], ours[1])
    np.testing.assert_array_equal(ours[0], ours[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_no_score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, bad: float
) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or infinite \(scoring demo_facts\)"):
        score(model, tokenizer, FACTS)
    with pytest.raises(NonFiniteError, match="on the held-out text"):
        mean_nll(model, torch.zeros(1, 4, dtype=torch.int64), batch_size=1)


def test_progress_counts_every_choice(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[str, int, int]] = []
    score(model, tokenizer, DEMO, on_progress=lambda *event: seen.append(event))
    assert seen == [(task, done, 32) for task in demo.TASKS for done in range(1, 33)]


def test_nothing_is_printed(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    score(model, tokenizer, FACTS)
    assert capfd.readouterr() == ("", "")


def test_prompts_cut_at_the_context_are_counted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert score(model, tokenizer, FACTS).tasks["demo_facts"].num_truncated == 0
    model.config.max_position_embeddings = 4
    assert score(model, tokenizer, FACTS).tasks["demo_facts"].num_truncated == 32


def test_what_is_written(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    scores = score(model, tokenizer, DEMO, output_dir=tmp_path)
    results = json.loads((tmp_path / SCORES_OF_LM_EVAL).read_text())
    assert results["config"]["sources"] == dict.fromkeys(demo.TASKS, "builtin")
    for name, task in scores.tasks.items():
        assert results["results"][name]["acc,none"] == task.accuracy
        samples = [json.loads(line) for line in (tmp_path / SAMPLES / f"{name}.jsonl").read_text().splitlines()]
        assert [sample["acc"] for sample in samples] == task.items.correct.tolist()
    loaded = Scores.load(tmp_path)
    assert loaded.settings == scores.settings
    for array in ItemScores.__dataclass_fields__:
        np.testing.assert_array_equal(
            getattr(loaded.tasks["demo_facts"].items, array), getattr(scores.tasks["demo_facts"].items, array)
        )


def test_a_task_that_cannot_be_scored_stops_before_the_first(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[Any] = []
    config = EvalConfig(tasks={"demo_facts": 0, "demo_routines": 2}, limit=4)
    with pytest.raises(InputError, match=r"eval\.tasks\.demo_routines"):
        score(model, tokenizer, config, on_progress=lambda *event: seen.append(event))
    assert seen == []


def test_nll_counts_each_predicted_token_once(model: LlamaForCausalLM) -> None:
    sequences = torch.randint(0, model.config.vocab_size, (5, 12))
    labels = sequences.clone()
    labels[0, :6] = IGNORE_INDEX
    labels[3] = IGNORE_INDEX
    ours = mean_nll(model, sequences, batch_size=2, labels=labels)
    with torch.no_grad():
        logits = model(sequences).logits.double()
    nll = -F.log_softmax(logits[:, :-1], dim=-1).gather(2, sequences[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != IGNORE_INDEX
    assert int(counted.sum()) == 3 * 11 + 6
    assert ours == pytest.approx(float(nll[counted].mean()), rel=1e-5)


REAL = {"mmlu": 1, "hellaswag": 0, "arc_challenge": 5}
LIMITS = {"mmlu": 1, "hellaswag": 20, "arc_challenge": 8}  # mmlu has 57 leaves
# lm-eval's own entry point, once per command line; they share one process and one index of tasks, which takes seconds.
COMMAND_LINES = """
import json, sys
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks.manager import TaskIndex
build, index = TaskIndex.build, {}
TaskIndex.build = staticmethod(lambda paths: index or index.update(build(paths)) or index)
for sys.argv in json.loads(sys.argv[1]):
    cli_evaluate()
"""


def lm_eval_command_line(model: Path, task: str, limit: int, include_path: Path, output_path: Path) -> list[str]:
    return [
        *("lm_eval", "--model", "hf", "--model_args", f"pretrained={model},softmax_dtype=float32,dtype=float32"),
        *("--tasks", task, "--include_path", str(include_path), "--limit", str(limit), "--batch_size", "16"),
        *("--device", "cpu", "--output_path", str(output_path), "--log_samples"),
    ]


def write_task_files(folder: Path, tasks: dict[str, int], data_dir: Path) -> list[str]:
    """A file for each task with which lm-eval's command line reads it from `data_dir`; the names by which it knows them."""
    folder.mkdir(parents=True)
    for name, num_fewshot in tasks.items():
        registered = find_task(name)
        [path] = {local_folder(leaf.config["dataset_path"], data_dir) for leaf in registered.leaves}
        overrides = {"dataset_path": str(path), "num_fewshot": num_fewshot}
        group = {"group": f"{name}_local", "task": [{**member, **overrides} for member in registered.members]}
        (folder / f"{name}_local.yaml").write_text(json.dumps(group), encoding="utf-8")  # JSON is YAML
    return [f"{name}_local" for name in tasks]


def test_scores_equal_those_of_the_lm_eval_command_line(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "stories260K"
    names = write_task_files(tmp_path / "tasks", REAL, shared / "data")
    runs = [
        lm_eval_command_line(folder, name, LIMITS[task], tmp_path / "tasks", tmp_path / task)
        for task, name in zip(REAL, names, strict=True)
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums are taken in the same order only with as many threads
    }
    subprocess.run(
        [sys.executable, "-c", COMMAND_LINES, json.dumps(runs)], env=environment, check=True, capture_output=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task, num_fewshot in REAL.items():
        config = EvalConfig(tasks={task: num_fewshot}, data_dir=str(shared / "data"), limit=LIMITS[task], batch_size=16)
        ours = score(model, tokenizer, config).tasks[task]
        [results] = (tmp_path / task).rglob("results_*.json")
        theirs = json.loads(results.read_text())["results"][task]
        assert ours.accuracy == theirs[f"{ours.metric},none"]
        expected: dict[str, list[float]] = {}
        for samples in (tmp_path / task).rglob("samples_*.jsonl"):
            leaf = samples.name.removeprefix("samples_").rsplit("_", 1)[0]
            for sample in map(json.loads, samples.read_text().splitlines()):
                expected[f"{leaf}:{sample['doc_id']}"] = [float(response[0][0]) for response in sample["resps"]]
        found = {
            item_id.rsplit(":", 1)[0]: [value for value in row if not np.isnan(value)]
            for item_id, row in zip(ours.items.item_id.tolist(), ours.items.choice_loglikelihoods.tolist(), strict=True)
        }
        assert found == expected


def test_an_engine_with_a_class_of_lm_evals_is_asked_through_it(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here lm-eval's class for transformers stands for vLLM's."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {
        "pretrained": str(tmp_path),
        "dtype": "float32",
        "batch_size": 4,
        "softmax_dtype": "float32",
        "device": "cpu",
    }
    monkeypatch.setattr(OwnModel, "lm_eval_model", lambda _: (HFLM, options))
    progress: list[tuple[str, int, int]] = []
    opened = OwnModel(tmp_path, "auto", trust_remote_code=False)
    theirs = score(opened, tokenizer, DEMO, on_progress=lambda *done: progress.append(done))
    ours = score(model, tokenizer, DEMO)
    assert theirs.settings == ours.settings
    for name, task in ours.tasks.items():
        same = theirs.tasks[name]
        np.testing.assert_array_equal(same.items.choice_loglikelihoods, task.items.choice_loglikelihoods)
        assert (same.num_truncated, same.num_answer_tokens) == (task.num_truncated, task.num_answer_tokens)
    assert progress[-1][1] == progress[-1][2]
