"""What a user gets wrong, and the exact lines that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty_recipe import RECIPE, lines_of

from qatrun.recipe import load_recipe

# Each case: the lines put in place of lines of RECIPE (old -> new), and every line of the error.
REPLACED: dict[str, tuple[str, str, list[str]]] = {
    "unknown key": ("  steps: 1000", "  steps: 1000\n  lr_shedule: cosine", [
        "r.yaml:6: train.lr_shedule -- unknown key (did you mean 'lr_schedule'?)",
    ]),
    "unknown key, nothing near": ("model: {path: m}", "model: {path: m, zzz: 1}", [
        "r.yaml:2: model.zzz -- unknown key (one of path, revision, param_dtype, compute_dtype, trust_remote_code, "
        "attn_implementation)",
    ]),
    "unknown section": ("qat:\n", "quant:\n", [
        "r.yaml:6: quant -- unknown key (did you mean 'qat'?)",
    ]),
    "key of another section": ("name: study", "name: study\nlearning_rate: 1e-5", [
        "r.yaml:2: learning_rate -- unknown key here (did you mean 'train.learning_rate'?)",
    ]),
    "key of a nested section": ("  format: hif8", "  window: 16", [
        "r.yaml:7: qat.window -- unknown key here (did you mean 'qat.scaling.window'?)",
    ]),
    "unknown choice": ("  format: hif8", "  format: hif9", [
        "r.yaml:7: qat.format -- unknown format 'hif9' (did you mean 'hif8'?)",
    ]),
    "unknown choice, nothing near": ("  format: hif8", "  clip: 8", [
        "r.yaml:7: qat.clip -- unknown clip 8 (one of format, target)",
    ]),
    "unknown choice in a role": ("  format: hif8", "  weight: {scaling: {type: delay}}", [
        "r.yaml:7: qat.weight.scaling.type -- unknown type 'delay' (did you mean 'delayed'?)",
    ]),
    "required key": ("  steps: 1000", "  seed: 1", [
        "r.yaml:4: train.steps -- required, but missing",
    ]),
    "required section": ("model: {path: m}", "", [
        "r.yaml:1: model -- required, but missing",
    ]),
    "a mapping left empty": ("data: {train: {path: d}}", "data:", [
        "r.yaml:3: data -- must be a mapping (got null)",
    ]),
    "a word for a whole number": ("  steps: 1000", "  steps: many", [
        "r.yaml:5: train.steps -- must be a whole number (got 'many')",
    ]),
    "a fraction for a whole number": ("  steps: 1000", "  steps: 1e3", [
        "r.yaml:5: train.steps -- must be a whole number (got 1000.0)",
    ]),
    "a quoted number": ("  steps: 1000", "  steps: 1000\n  learning_rate: '1e-5'", [
        "r.yaml:6: train.learning_rate -- must be a number (got '1e-5')",
    ]),
    "NaN": ("  steps: 1000", "  steps: 1000\n  learning_rate: .nan", [
        "r.yaml:6: train.learning_rate -- must be a finite number (got nan)",
    ]),
    "Inf": ("  steps: 1000", "  steps: 1000\n  max_grad_norm: .inf", [
        "r.yaml:6: train.max_grad_norm -- must be a finite number (got inf)",
    ]),
    "yes is text in YAML 1.2": ("model: {path: m}", "model: {path: m, trust_remote_code: yes}", [
        "r.yaml:2: model.trust_remote_code -- must be true or false (got 'yes')",
    ]),
    "a number for text": ("model: {path: m}", "model: {path: 5}", [
        "r.yaml:2: model.path -- must be text (got 5)",
    ]),
    "empty text": ("model: {path: m}", "model: {path: ''}", [
        "r.yaml:2: model.path -- must not be empty",
    ]),
    "window of 0": ("  format: hif8", "  scaling: {window: 0}", [
        "r.yaml:7: qat.scaling.window -- must be at least 1 (got 0)",
    ]),
    "interval of 0": ("  format: hif8", "  scaling: {update_interval: 0}", [
        "r.yaml:7: qat.scaling.update_interval -- must be at least 1 (got 0)",
    ]),
    "learning rate of 0": ("  steps: 1000", "  steps: 1000\n  learning_rate: 0", [
        "r.yaml:6: train.learning_rate -- must be greater than 0 (got 0)",
    ]),
    "seed too large": ("  steps: 1000", "  steps: 1000\n  seed: 4294967296", [
        "r.yaml:6: train.seed -- must be at most 4294967295 (got 4294967296)",
    ]),
    "one beta out of range, in a list of lines": ("  steps: 1000", "  steps: 1000\n  betas:\n  - 0.9\n  - 1.5", [
        "r.yaml:8: train.betas[1] -- must be less than 1 (got 1.5)",
    ]),
    "one beta missing": ("  steps: 1000", "  steps: 1000\n  betas: [0.9]", [
        "r.yaml:6: train.betas[1] -- required, but missing",
    ]),
    "batch that does not divide": ("  steps: 1000", "  steps: 1000\n  micro_batch_size: 4\n  global_batch_size: 10", [
        "r.yaml:7: train.global_batch_size -- global_batch_size 10 is no multiple of micro_batch_size 4 "
        "(nearest: 8 or 12)",
    ]),
    "batch that does not divide the default": ("  steps: 1000", "  steps: 1000\n  micro_batch_size: 64", [
        "r.yaml:6: train.micro_batch_size -- global_batch_size 32 is no multiple of micro_batch_size 64 (nearest: 64)",
    ]),
    "lr warmup too long": ("  steps: 1000", "  steps: 1000\n  lr_warmup_steps: 1001", [
        "r.yaml:6: train.lr_warmup_steps -- lr_warmup_steps 1001 is more than train.steps 1000",
    ]),
    "warmup too long": ("qat:\n", "warmup: {steps: 1001}\nqat:\n", [
        "r.yaml:6: warmup.steps -- warmup.steps 1001 is more than train.steps 1000",
    ]),
    "default warmup too long": ("  steps: 1000", "  steps: 400", [
        "r.yaml:5: train.steps -- warmup.steps 500 (the default) is more than train.steps 400",
    ]),
    "warmup to the very end": ("qat:\n", "warmup: {steps: 1000}\nqat:\n", [
        "r.yaml:6: warmup.steps -- warmup.steps 1000 leaves no step for QAT (at most 999 of train.steps 1000)",
    ]),
    "switch inside the warmup": ("  format: hif8", "  start_step: 300", [
        "r.yaml:7: qat.start_step -- start_step 300 is before the end of the BF16 warmup (at least 500, warmup.steps)",
    ]),
    "switch past the last step": ("  format: hif8", "  start_step: 1000", [
        "r.yaml:7: qat.start_step -- start_step 1000 is past the last step (at most 999, with train.steps 1000)",
    ]),
    "name with a slash": ("name: study", "name: runs/study", [
        "r.yaml:1: name -- must be a plain folder name of letters, digits, '.', '_' and '-' (got 'runs/study')",
    ]),
    "name that climbs": ("name: study", "name: a..b", [
        "r.yaml:1: name -- must be a plain folder name of letters, digits, '.', '_' and '-' (got 'a..b')",
    ]),
    "arm name with a slash": ("  hif8: {}", "  hif/8: {}", [
        "r.yaml:10: arms.hif/8 -- must be a plain folder name of letters, digits, '.', '_' and '-' (got 'hif/8')",
    ]),
    "reserved arm names": ("  hif8: {}", "  trunk-2: {}\n  eval: {}", [
        "r.yaml:10: arms.trunk-2 -- 'trunk-2' is reserved for a folder of the study; choose another name",
        "r.yaml:11: arms.eval -- 'eval' is reserved for a folder of the study; choose another name",
    ]),
    "no arms": ("  bf16: {qat: null}\n  hif8: {}", "  {}", [
        "r.yaml:8: arms -- must not be empty",
    ]),
    "a list of arms": ("  bf16: {qat: null}\n  hif8: {}", "- bf16\n- hif8", [
        "r.yaml:8: arms -- must be a mapping (got a list)",
    ]),
    "an arm that is a word": ("  hif8: {}", "  hif8: int8", [
        "r.yaml:10: arms.hif8 -- must be a mapping (got 'int8')",
    ]),
    "an arm that changes what all share": ("  hif8: {}", "  hif8: {name: x, eval: {limit: 5}, outputs: y}", [
        "r.yaml:10: arms.hif8.name -- is shared by all arms; no arm may change it",
        "r.yaml:10: arms.hif8.eval -- is shared by all arms; no arm may change it",
        "r.yaml:10: arms.hif8.outputs -- unknown key (one of model, data, train, warmup, qat, export, method, twin)",
    ]),
    "a mistake in an arm": ("  hif8: {}", "  hif8:\n    qat:\n      formt: int8", [
        "r.yaml:12: arms.hif8.qat.formt -- unknown key (did you mean 'format'?)",
    ]),
    "an arm that breaks a rule with a shared key": ("  hif8: {}", "  hif8:\n    train: {steps: 300}", [
        "r.yaml:11: arms.hif8.train.steps -- warmup.steps 500 (the default) is more than train.steps 300",
    ]),
    "twin that is no arm": ("  hif8: {}", "  hif8: {twin: bf17}", [
        "r.yaml:10: arms.hif8.twin -- no such arm 'bf17' (did you mean 'bf16'?)",
    ]),
    "twin that is no name": ("  hif8: {}", "  hif8: {twin: 7}", [
        "r.yaml:10: arms.hif8.twin -- must be text (got 7)",
    ]),
    "twin that is quantized": ("  hif8: {}", "  hif8: {}\n  int8: {twin: hif8}", [
        "r.yaml:11: arms.int8.twin -- arm 'hif8' is quantized itself (one of bf16)",
    ]),
    "twin of a BF16 arm": ("  bf16: {qat: null}", "  bf16: {qat: null, twin: bf16}", [
        "r.yaml:9: arms.bf16.twin -- a BF16 arm has no twin",
    ]),
    "which of two twins": ("  hif8: {}", "  hif8: {}\n  bf16-b: {qat: null, train: {learning_rate: 1e-4}}", [
        "r.yaml:10: arms.hif8.twin -- required: which BF16 arm to compare with (one of bf16, bf16-b)",
    ]),
    "computing finer than the parameters": (
        "model: {path: m}", "model: {path: m, param_dtype: bfloat16, compute_dtype: float32}", [
        "r.yaml:2: model.compute_dtype -- float32 makes no sense over bfloat16 parameters "
        "(did you mean param_dtype: float32?)",
    ]),
    "per_channel inputs": ("  format: hif8", "  input: {granularity: per_channel}", [
        "r.yaml:7: qat.input.granularity -- per_channel makes no sense for input (did you mean 'per_token'?)",
    ]),
    "per_token weights": ("  format: hif8", "  weight: {granularity: per_token}", [
        "r.yaml:7: qat.weight.granularity -- per_token makes no sense for weight (did you mean 'per_channel'?)",
    ]),
    "per_token gradients": ("  format: hif8", "  grad_output: {granularity: per_token}", [
        "r.yaml:7: qat.grad_output.granularity -- per_token makes no sense for grad_output "
        "(did you mean 'per_tensor'?)",
    ]),
    "a role with a unit of its own": ("  format: hif8", "  weight: {scaling: {unit: microbatch}}", [
        "r.yaml:7: qat.weight.scaling.unit -- one unit for all roles: set qat.scaling.unit (here optimizer_step)",
    ]),
    "delayed per-token scales": ("  format: hif8", "  input: {granularity: per_token, scaling: {type: delayed}}", [
        "r.yaml:7: qat.input.scaling.type -- delayed scaling keeps one scale per tensor; "
        "per_token takes only 'dynamic'",
    ]),
    "an asymmetric weight": ("  format: hif8", "  format: int8\n  weight: {symmetric: false}", [
        "r.yaml:8: qat.weight.symmetric -- a weight is spread evenly about zero: only inputs have a zero-point",
    ]),
    "an asymmetric gradient": ("  format: hif8", "  grad_output: {symmetric: false}", [
        "r.yaml:7: qat.grad_output.symmetric -- a grad_output is spread evenly about zero: only inputs have a zero-point",
    ]),
    "an asymmetric input in a floating-point format": ("  format: hif8", "  input: {symmetric: false}", [
        "r.yaml:7: qat.input.symmetric -- hif8 is finest about zero, so a zero-point makes no sense: "
        "only int8 inputs have one",
    ]),
    "an asymmetric input without a scale": (
        "  format: hif8", "  format: int8\n  input: {symmetric: false, scaling: {type: none}}", [
        "r.yaml:8: qat.input.symmetric -- scaling 'none' finds no range to map (one of delayed, dynamic, static)",
    ]),
    "an asymmetric input with a target": (
        "  format: hif8", "  format: int8\n  input:\n    target_amax: 100\n    symmetric: false", [
        "r.yaml:10: qat.input.symmetric -- a range is mapped to all 255 steps: leave target_amax out",
    ]),
    "an asymmetric input of one arm": ("  hif8: {}", "  hif8: {qat: {input: {symmetric: false}}}", [
        "r.yaml:10: arms.hif8.qat.input.symmetric -- hif8 is finest about zero, so a zero-point makes no sense: "
        "only int8 inputs have one",
    ]),
    "symmetric in words": ("  format: hif8", "  input: {symmetric: none}", [
        "r.yaml:7: qat.input.symmetric -- must be true or false (got 'none')",
    ]),
    "INT8 gradients": ("  format: hif8", "  grad_output: {format: int8}", [
        "r.yaml:7: qat.grad_output.format -- int8 makes no sense for grad_output: its range is too narrow "
        "(did you mean 'fp8_e5m2'?)",
    ]),
    "INT8 gradients by inheritance": ("  format: hif8", "  format: int8\n  grad_output: {}", [
        "r.yaml:7: qat.format -- int8 makes no sense for grad_output: its range is too narrow "
        "(did you mean 'fp8_e5m2'?)",
    ]),
    "target outside the format": ("  format: hif8", "  weight: {format: fp8_e4m3, target_amax: 500}", [
        "r.yaml:7: qat.weight.target_amax -- target_amax 500 is above the largest fp8_e4m3 value (at most 448)",
    ]),
    "target of one arm's format": ("  hif8: {}", "  hif8: {qat: {format: int8, weight: {target_amax: 128}}}", [
        "r.yaml:10: arms.hif8.qat.weight.target_amax -- target_amax 128 is above the largest int8 value (at most 127)",
    ]),
    "shared target, an arm's format": ("  format: hif8\narms:",
                                       "  weight: {target_amax: 200}\narms:\n  i: {qat: {format: int8}}", [
        "r.yaml:9: arms.i.qat.format -- target_amax 200 is above the largest int8 value (at most 127)",
    ]),
    "regular expression that does not compile": ("  format: hif8", "  targets:\n  - up_proj\n  - 're:mlp.('", [
        "r.yaml:9: qat.targets[1] -- invalid regular expression 're:mlp.(': missing ) at position 5",
    ]),
    "pattern twice": ("  format: hif8", "  targets: [up_proj, down_proj, up_proj]", [
        "r.yaml:7: qat.targets -- duplicate pattern 'up_proj'",
    ]),
    "text and conversations": ("data: {train: {path: d}}",
                               "data: {train: {path: d, text_column: t, messages_column: m}}", [
        "r.yaml:3: data.train.messages_column -- text_column and messages_column exclude each other: give one",
    ]),
    "budget for no task": ("name: study", "name: study\nbudget: {helaswag: 1.0}", [
        "r.yaml:2: budget.helaswag -- no such task in eval.tasks (did you mean 'hellaswag'?)",
    ]),
    "budget of 0": ("name: study", "name: study\nbudget: {mmlu: 0}", [
        "r.yaml:2: budget.mmlu -- must be greater than 0 (got 0)",
    ]),
    "no tasks": ("eval: {tasks: {mmlu: 5, hellaswag: 10}}", "eval: {tasks: {}}", [
        "r.yaml:11: eval.tasks -- must not be empty",
    ]),
    "fewer than no examples": ("eval: {tasks: {mmlu: 5, hellaswag: 10}}", "eval:\n  tasks:\n    mmlu: -1", [
        "r.yaml:13: eval.tasks.mmlu -- must be at least 0 (got -1)",
    ]),
    "duplicate key": ("  steps: 1000", "  steps: 1000\n  steps: 2000", [
        "r.yaml:6: train.steps -- duplicate key (first on line 5)",
    ]),
    "YAML that does not parse": ("  steps: 1000", "  steps: [1", [
        "r.yaml:6: not valid YAML: expected ',' or ']', but got ':'",
    ]),
    "a tab": ("  steps: 1000", "\tsteps: 1", [
        "r.yaml:5: not valid YAML: found character '\\t' that cannot start any token",
    ]),
    "an alias inside its anchor": ("name: study", "name: &a {b: *a}", [
        "r.yaml:1: not valid YAML: nested without end (an alias inside its own anchor?)",
    ]),
    "a parent that is missing": ("name: study", "name: study\nextends: base.yaml", [
        "r.yaml:2: extends -- no such file: 'base.yaml'",
    ]),
    "a shipped parent that is not": ("name: study", "extends: dmeo", [
        "r.yaml:1: extends -- no file or shipped recipe named 'dmeo' (did you mean 'demo'?)",
        "r.yaml:1: name -- required, but missing",
    ]),
    "a parent that is itself": ("name: study", "name: study\nextends: ./r.yaml", [
        "r.yaml:2: extends -- './r.yaml' extends this recipe in turn",
    ]),
    "several at once, sorted by line": ("  format: hif8", "  format: hif9\n  start_step: 2000\n  scaling: {window: 0}\n"
                                        "  grad_output: {granularity: per_token}\nname: x", [
        "r.yaml:7: qat.format -- unknown format 'hif9' (did you mean 'hif8'?)",
        "r.yaml:8: qat.start_step -- start_step 2000 is past the last step (at most 999, with train.steps 1000)",
        "r.yaml:9: qat.scaling.window -- must be at least 1 (got 0)",
        "r.yaml:10: qat.grad_output.granularity -- per_token makes no sense for grad_output "
        "(did you mean 'per_tensor'?)",
        "r.yaml:11: name -- duplicate key (first on line 1)",
    ]),
    "a broken rule with a wrong key is left out": ("  steps: 1000", "  steps: -5\n  lr_warmup_steps: 1200", [
        "r.yaml:5: train.steps -- must be at least 0 (got -5)",
    ]),
}  # fmt: skip

OVERRIDDEN: dict[str, tuple[list[str], list[str]]] = {
    "unknown choice": (["qat.format=hif9"], [
        "--set qat.format=hif9: qat.format -- unknown format 'hif9' (did you mean 'hif8'?)",
    ]),
    "unknown key": (["train.stepz=5"], [
        "--set train.stepz=5: train.stepz -- unknown key (did you mean 'steps'?)",
    ]),
    "no value": (["train.steps"], [
        "--set train.steps: must be key.path=value",
    ]),
    "no key": (["=5"], [
        "--set =5: must be key.path=value",
    ]),
    "empty value": (["train.steps="], [
        "--set train.steps=: train.steps -- must be a whole number (got null)",
    ]),
    "value that is not YAML": (["eval.limit=[1"], [
        "--set eval.limit=[1: eval.limit -- not valid YAML: expected ',' or ']', but got '<stream end>'",
    ]),
    "inside a number": (["train.steps.x=1"], [
        "--set train.steps.x=1: train.steps -- must be a whole number (got a mapping)",
    ]),
    "into an arm": (["arms.hif8.qat.format=int9"], [
        "--set arms.hif8.qat.format=int9: arms.hif8.qat.format -- unknown format 'int9' (did you mean 'int8'?)",
    ]),
    "an arm that breaks a rule": (["arms.hif8.qat.start_step=5"], [
        "--set arms.hif8.qat.start_step=5: arms.hif8.qat.start_step -- start_step 5 is before the end of the "
        "BF16 warmup (at least 500, warmup.steps)",
    ]),
    "an entry of a list": (["qat.modules=[{match: x, input: {target_amax: 0}}]"], [
        "--set qat.modules=[{match: x, input: {target_amax: 0}}]: qat.modules[0].input.target_amax -- must be greater "
        "than 0 (got 0)",
    ]),
    "several, in the order given": (["train.seed=a", "qat.ste=clip", "oops"], [
        "--set train.seed=a: train.seed -- must be a whole number (got 'a')",
        "--set qat.ste=clip: qat.ste -- unknown ste 'clip' (did you mean 'clipped'?)",
        "--set oops: must be key.path=value",
    ]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_recipe_without_mistakes_loads() -> None:
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    assert load_recipe("r.yaml").arm_names == ("bf16", "hif8")


@pytest.mark.parametrize("case", REPLACED)
def test_mistake_in_a_file(case: str) -> None:
    old, new, expected = REPLACED[case]
    assert RECIPE.count(old) == 1
    assert lines_of(RECIPE.replace(old, new)) == expected


@pytest.mark.parametrize("case", OVERRIDDEN)
def test_mistake_in_a_set(case: str) -> None:
    overrides, expected = OVERRIDDEN[case]
    assert lines_of(RECIPE, overrides) == expected
