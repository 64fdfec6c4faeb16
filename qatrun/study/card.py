"""README.md of an arm's folders, as the hub shows it: what the model is, what it scores, what was proven, how to serve it.

It says only what lies in files, and is written anew whenever one of them changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qatrun.errors import DamagedFileError
from qatrun.evaluate.scores import Scores
from qatrun.export import EXPORTS
from qatrun.files import read_json, replace_file
from qatrun.layout import CARD_FILE, EXPORT_FILE, QUANTIZED, START, ArmFolder, StudyFolder
from qatrun.recipe import Arm, Recipe, load_recipe
from qatrun.records.comparison import StudyComparison, TaskComparison
from qatrun.records.diagnosis import StudyDiagnosis
from qatrun.records.environment import Environment
from qatrun.records.export import Exported
from qatrun.records.training import ArmResult
from qatrun.report.exported import contents, proofs, serving
from qatrun.text import interval

T = TypeVar("T")

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ about }}
{% if scores %}
## Scores

{{ scores }}
{% endif %}{% if diagnosis %}
## Diagnosis

{{ diagnosis }}
{% endif %}{% if proven %}
## What was proven

{% for line in proven %}- {{ line }}
{% endfor %}{% endif %}
## Serve it

{{ serve }}

## How it was made

{{ made }}
"""
OPEN_PLAIN = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")"""


def write_cards(study: StudyFolder) -> None:
    """Write the cards of every arm that is finished, of its plain folder and of those that it was exported as."""
    for name, arm in load_recipe(study.recipe).arm_by_name.items():
        folder = study.arm(name)
        if folder.result.is_file():
            for place in (folder.path, *(folder.path / export for export in EXPORTS)):
                if place == folder.path or (place / EXPORT_FILE).is_file():
                    replace_file(place / CARD_FILE, card(study, arm, place).encode())


def write_card(arm: ArmFolder, place: Path, *, shown_as: Path | None = None) -> None:
    """Write the card of a folder that an arm was exported as, where the arm is one of a study and finished."""
    arm = ArmFolder(arm.path.resolve())
    study = StudyFolder(arm.path.parent)
    settings = load_recipe(study.recipe).arm_by_name.get(arm.path.name) if study.recipe.is_file() else None
    if settings is not None and arm.result.is_file():
        replace_file(place / CARD_FILE, card(study, settings, place, shown_as=shown_as).encode())


def card(study: StudyFolder, arm: Arm, place: Path, *, shown_as: Path | None = None) -> str:
    """The card of one folder of a finished arm.

    Args:
        place: the arm's own folder, which is plain, or one that it was exported as.
        shown_as: what commands call it; None: `place`.
    """
    folder, recipe = study.arm(arm.name), load_recipe(study.recipe)
    exported = read_json(place / EXPORT_FILE, Exported) if (place / EXPORT_FILE).is_file() else None
    off = arm.qat is not None and exported is None
    plain = folder.eval_off if arm.trains else study.arm(str(arm.twin)).eval  # calibration leaves it as it was
    scores = _optional_scores(plain if off else folder.eval)
    title = f"{study.name}/{arm.name}" + (f" as {exported.format}" if exported else "")
    text = ModelCard.from_template(
        _metadata(title, arm, exported, scores),
        template_str=TEMPLATE,
        title=title,
        about=_about(arm, folder, exported),
        scores=_scores(study, arm, scores, off=off),
        diagnosis=_diagnosis(study, arm),
        proven=[*proofs(exported), *exported.notes] if exported else [],
        serve=_serve(shown_as or place, exported),
        made=_made(study, recipe, arm, folder),
    )
    return str(text)


def _metadata(title: str, arm: Arm, exported: Exported | None, scores: Scores | None) -> ModelCardData:
    base = None if Path(arm.model.path).exists() or ":" in arm.model.path else arm.model.path
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=task.metric,
            metric_name=f"{task.metric}, {task.num_fewshot}-shot",
            metric_value=round(task.accuracy, 6),
        )
        for name, task in (scores.tasks if scores else {}).items()
    ]
    tags = ["qatrun", *([exported.format] if exported else []), *(arm.qat.formats if arm.qat else [])]
    relation: dict[str, Any] = {} if base is None else {"base_model_relation": "quantized" if exported else "finetune"}
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        model_name=title,
        eval_results=results or None,
        **relation,
    )


def _about(arm: Arm, folder: ArmFolder, exported: Exported | None) -> str:
    coverage = read_json(folder.result, ArmResult).coverage
    if not arm.trains:
        assert arm.qat is not None
        of = f"arm `{arm.twin}` of this study" if arm.twin != START else f"{arm.model.path}"
        how = arm.qat.calibrating
        made = f"{of}, quantized after training ({coverage}): calibrated on {how.sequences} sequences"
        made += "" if how.smooth is None else f", smoothed by {how.smooth:g}"
        return _in_folder(made, exported)
    trained = f"{arm.model.path}, trained for {arm.train.steps:,} steps on {arm.data.train.path}"
    if arm.qat is None:
        return f"{trained} in BF16: the twin that quantized arms are compared with."
    aware = f"{trained}, the last {arm.train.steps - (arm.switch_step or 0):,} of them quantization-aware"
    return _in_folder(f"{aware} ({coverage})", exported)


def _in_folder(made: str, exported: Exported | None) -> str:
    if exported is None:
        return (
            f"{made}. This folder holds the plain weights, quantizers off; `{QUANTIZED}/` holds the quantized model that "
            "was scored."
        )
    return f"{made}. {contents(exported)}. These are the codes and scales that were scored."


def _scores(study: StudyFolder, arm: Arm, scores: Scores | None, *, off: bool) -> str:
    if scores is None:
        return ""
    compared = _compared(study, arm)
    columns = ["task", "shots", "metric", "items", "accuracy"]
    if compared:
        columns += ["BF16 twin", "drop, pp", "95 % interval", "verdict"]
    rows = [columns, ["---"] * len(columns)]
    for name, task in scores.tasks.items():
        error = "" if task.stderr is None else f" ± {100 * task.stderr:.2f}"
        row = [name, str(task.num_fewshot), task.metric, f"{task.num_items:,}", f"{100 * task.accuracy:.2f}{error}"]
        if compared:
            pair = compared[name]
            row += [f"{100 * pair.twin:.2f}", f"{pair.drop_pp:+.2f}", interval(pair.ci95_pp), pair.verdict]
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if compared:
        which = "the quantized model" if off else "this model"
        lines += ["", f"Drop: BF16 twin minus {which}, with its two-sided interval over the items that both answered."]
    return "\n".join(lines)


def _compared(study: StudyFolder, arm: Arm) -> dict[str, TaskComparison]:
    comparison = _optional(study.comparison, StudyComparison)
    pair = next((pair for pair in comparison.pairs if pair.arm == arm.name), None) if comparison else None
    return {task.task: task for task in pair.comparison.tasks} if pair else {}


def _diagnosis(study: StudyFolder, arm: Arm) -> str:
    diagnosis = _optional(study.diagnosis, StudyDiagnosis)
    return diagnosis.arms[arm.name].sentence if diagnosis and arm.name in diagnosis.arms else ""


def _serve(place: Path, exported: Exported | None) -> str:
    if exported is None:
        return OPEN_PLAIN.format(folder=place)
    command, ran = serving(place, exported), bool(exported.scored) and exported.format == "onnx"
    if command is not None:
        return f"    {command}" + ("" if ran else "\n\nThat is the engine's own command; it was not run here.")
    return "No engine that opens this layout is known to be public."


def _made(study: StudyFolder, recipe: Recipe, arm: Arm, folder: ArmFolder) -> str:
    return "\n".join(_facts(study, arm, folder)) + "\n\n```yaml\n" + recipe.to_yaml() + "```"


def _facts(study: StudyFolder, arm: Arm, folder: ArmFolder) -> Iterator[str]:
    record = read_json(folder.result, ArmResult)
    if record.match["steps"]:
        yield f"- data that was consumed: SHA-256 {record.match['data_hash']}, seed {arm.train.seed}"
    for name, checksum in record.weights.items():
        yield f"- {name}: SHA-256 {checksum}"
    environment: Any = _optional(study.environment, Environment)
    packages = environment.packages if environment else {}
    shown = ", ".join(f"{name} {packages[name]}" for name in ("qatrun", "torch", "transformers") if name in packages)
    yield f"- with {shown or 'qatrun'}, by this recipe (arm `{arm.name}`):"


def _optional(file: Path, kind: type[T]) -> T | None:
    try:
        return read_json(file, kind)
    except DamagedFileError:
        return None


def _optional_scores(folder: Path) -> Scores | None:
    try:
        return Scores.load(folder)
    except DamagedFileError:
        return None
