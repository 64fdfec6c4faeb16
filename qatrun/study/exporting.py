"""`qatrun export`: from an arm that was scored to a folder that an engine reads, and the proof that it is the same model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qatrun.data import open_data
from qatrun.errors import DamagedFileError, InputError, Problem, QatrunError, RunError
from qatrun.evaluate import equality
from qatrun.evaluate.engines import ENGINES
from qatrun.export import EXPORTS, Export, artifact
from qatrun.export.folder import Stored, stored_linears
from qatrun.export.weights import weights_sha256
from qatrun.files import read_json, whole_folder, write_json
from qatrun.layout import EVAL, EXPORT_FILE, PLAN_FILE, QUANTIZED, ArmFolder, StudyFolder
from qatrun.model import architecture
from qatrun.quant import QuantPlan
from qatrun.recipe import Arm, EvalConfig, ModelConfig, load_recipe
from qatrun.records.export import CodesProof, Exported, LinearsProof, TextProof
from qatrun.report.exported import holds, proofs
from qatrun.study.card import write_card
from qatrun.study.claim import locked
from qatrun.study.display import Display
from qatrun.study.engine import is_export, score_in_engine

PACKAGES = ("qatrun", "torch", "transformers", "compressed-tensors", "onnx", "onnxruntime")
TOKENS_OF_LINEARS = 4096  # that the linears are compared on
UNTOLD_TOKENS = (8, 64)  # sequences of random tokens, where a folder belongs to no study


@dataclass(frozen=True)
class Scored:
    """A quantized folder, opened: what was scored, and what is exported.

    Attributes:
        folder: the quantized folder.
        text: that models are compared on, so many sequences a forward.
        no_text: why it is not the study's held-out text.
        settings: what engines open its exports with.
    """

    folder: Path
    model: Any
    tokenizer: Any
    plan: QuantPlan
    text: equality.Text
    no_text: str | None
    batch_size: int
    settings: Mapping[str, Any]


def export_arm(
    path: Path, to: str | None, output: Path | None, *, trust_remote_code: bool = False
) -> tuple[Path, Exported]:
    """Write a quantized arm as the folder of an engine, prove it equal, and keep the proof in it.

    Args:
        path: an arm's folder, or the quantized folder in it.
        to: name of one of `EXPORTS`; None: the one for the arm's formats.
        output: the folder to write; None: one named after `to` in the arm's.
    Returns:
        the folder, and what is in its export.json.
    Raises:
        InputError: no quantized arm there, a damaged one, one that the format cannot express, or another process runs its
            study.
        RunError: the folder's codes or linears are not what was scored; nothing is written then.
        WriteError: it cannot be written; nothing is then.
    """
    quantized = artifact.find(path)
    if quantized is None:
        raise InputError(Problem(f"'{path}' is no quantized arm (no {QUANTIZED}/{PLAN_FILE})"))
    study = StudyFolder(quantized.resolve().parent.parent)
    with locked(study) if study.recipe.is_file() else nullcontext():
        return _export(quantized, to, output, trust_remote_code=trust_remote_code)


def _export(quantized: Path, to: str | None, output: Path | None, *, trust_remote_code: bool) -> tuple[Path, Exported]:
    """`export_arm` from the quantized folder, where the study is locked."""
    plan = artifact.read_plan(quantized)
    export = EXPORTS[to or default_export(plan)]
    target = output or quantized.parent / export.NAME
    _refuse_strangers(target)
    empty = architecture(ModelConfig(path=str(quantized), trust_remote_code=trust_remote_code))
    if problems := [Problem(text, f"{quantized.parent} --to {export.NAME}") for text in export.problems(plan, empty)]:
        raise InputError(problems)
    model, tokenizer = artifact.load(quantized, trust_remote_code=trust_remote_code)
    settings = {
        "attn_implementation": model.config._attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    scored = Scored(quantized, model, tokenizer, plan, *_text_of(quantized.parent, tokenizer, model), settings)
    with whole_folder(target) as folder:
        export.save(model, tokenizer, plan, folder)
        record = _proven(scored, export, folder, target)
        write_json(folder / EXPORT_FILE, record)
        write_card(ArmFolder(quantized.parent), folder, shown_as=target)
    return target, record


def export_trained(arm: Arm, folder: ArmFolder, config: EvalConfig, display: Display) -> None:
    """Export a finished arm as its recipe says, and score what was exported in its engine, where that is installed; what is
    there already, of these weights, is left as it is."""
    for name in arm.export if arm.qat is not None else ():
        if not is_current(folder, name):
            display.note(f"{arm.name}: exporting as {name}")
            _export(folder.quantized, name, None, trust_remote_code=arm.model.trust_remote_code)
        target, opens = folder.path / name, EXPORTS[name].ENGINES
        if opens and ENGINES[opens[0]].missing() is None and not read_json(target / EXPORT_FILE, Exported).scored:
            place = folder.path / f"{EVAL}-{name}"
            score_in_engine(target, config, opens[0], display, place, trust_remote_code=arm.model.trust_remote_code)
        record = read_json(target / EXPORT_FILE, Exported)
        say = display.note if holds(record) else display.on_warning
        for line in proofs(record):
            say(f"{arm.name} as {name}: {line}")


def is_current(folder: ArmFolder, name: str) -> bool:
    """Whether an arm's weights as they are now were exported under this name."""
    try:
        record = read_json(folder.path / name / EXPORT_FILE, Exported)
    except DamagedFileError:
        return False
    return record.source_sha256 == weights_sha256(folder.quantized)


def default_export(plan: QuantPlan) -> str:
    """The name of the export for a plan's formats."""
    return "hif8" if any(scheme.format == "hif8" for scheme in plan.slots().values()) else "compressed-tensors"


def _proven(scored: Scored, export: Export, folder: Path, target: Path) -> Exported:
    stored = stored_linears(scored.model)
    codes = _compare_codes(stored, export.read(folder))
    if codes.differing:
        raise RunError(f"{target}: {codes.differing} codes and scales read back otherwise than they were scored")
    try:
        decoded_by = export.decoded_by(stored)
    except ValueError as error:
        raise RunError(f"{target}: {error}") from error
    record = Exported(
        format=export.NAME,
        source=os.path.relpath(scored.folder.resolve(), target.resolve()),
        source_sha256=weights_sha256(scored.folder),
        compute_dtype=str(scored.model.dtype).removeprefix("torch."),
        attn_implementation=scored.settings["attn_implementation"],
        linears=len(stored),
        schemes=dict(Counter(_scheme_text(scored.plan, name) for name in scored.plan.linears)),
        packages=_versions(),
        notes=list(export.notes(scored.plan)),
        codes=codes,
        decoded_by=decoded_by,
    )
    name = next(iter(export.ENGINES), None)
    missing = "no engine for it runs here" if name is None else ENGINES[name].missing()
    if name is None or missing is not None:
        return record.model_copy(update={"not_checked": {"linears": missing, "text": missing}})
    linears, text = _proofs_in(name, scored, folder, exact=all(linear.is_exact for linear in stored.values()))
    if linears.worst > equality.TOLERANCE:
        raise RunError(
            f"{target}: a linear computes otherwise in {name} than it was scored (off by {linears.worst:.1e} of max |y|)"
        )
    not_checked = {} if scored.no_text is None else {"perplexity": scored.no_text}
    return record.model_copy(update={"linears_proof": linears, "text_proof": text, "not_checked": not_checked})


def _proofs_in(name: str, scored: Scored, folder: Path, *, exact: bool) -> tuple[LinearsProof, TextProof]:
    """What an engine makes of the folder: its linears in float32, the whole model in the dtype that it is served in."""
    engine, ids = ENGINES[name], scored.text.input_ids
    model, exported = equality.in_float32(scored.model), engine.open(folder, torch.float32, **scored.settings)
    num_sequences = max(1, TOKENS_OF_LINEARS // ids.shape[1])
    linears = equality.compare_linears(name, model, exported, ids[:num_sequences])
    if engine.is_torch and scored.model.dtype != torch.float32:
        model, exported = scored.model, engine.open(folder, scored.model.dtype, **scored.settings)
    text = equality.compare_text(name, model, exported, scored.text, batch_size=scored.batch_size, exact=exact)
    return linears, text


def _compare_codes(scored: Mapping[str, Stored], written: Mapping[str, Stored]) -> CodesProof:
    """Codes and scales of both, bit for bit."""
    codes = scales = differing = 0
    for name, ours in scored.items():
        theirs = written.get(name)
        codes += ours.codes.numel()
        scales += len(ours.weight_scale) + (ours.input_scale is not None)
        if theirs is None or theirs.codes.shape != ours.codes.shape:
            differing += ours.codes.numel()
            continue
        differing += int((theirs.codes.view(torch.int8) != ours.codes.view(torch.int8)).sum())
        differing += int((theirs.weight_scale != ours.weight_scale).sum())
        differing += _differ(ours.input_scale, theirs.input_scale)
        differing += ours.zero != theirs.zero
    differing += len(written.keys() - scored.keys())
    return CodesProof(linears=len(scored), codes=codes, scales=scales, differing=differing)


def _differ(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is not theirs
    return not torch.equal(ours, theirs)


def _text_of(arm: Path, tokenizer: Any, model: Any) -> tuple[equality.Text, str | None, int]:
    """The held-out text of an arm's study, or random tokens and why; and how many sequences a forward."""
    study = StudyFolder(arm.resolve().parent)
    try:
        if not study.recipe.is_file():
            raise InputError("it lies in no study, so there is no held-out text")
        recipe = load_recipe(study.recipe)
        settings = recipe.arm_by_name[arm.resolve().name]
        valid = open_data(settings.data, tokenizer, settings.train.seed).valid
    except (QatrunError, KeyError) as error:
        why = str(error).partition("\n")[0] if isinstance(error, QatrunError) else f"no arm of {study.path}"
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(vocabulary, UNTOLD_TOKENS, generator=torch.Generator().manual_seed(0))
        return equality.Text("random tokens", ids, None), why, UNTOLD_TOKENS[0]
    labels = valid.input_ids if valid.labels is None else valid.labels
    return equality.Text("the study's held-out text", valid.input_ids, labels), None, recipe.eval.batch_size


def _refuse_strangers(target: Path) -> None:
    """Raises InputError where a folder holds something that is no export of ours."""
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or is_export(target))):
        raise InputError(f"{target} holds something that qatrun did not export; give another --output")


def _scheme_text(plan: QuantPlan, name: str) -> str:
    weight, of_input = plan.schemes[name]["weight"], plan.schemes[name]["input"]
    how = of_input.granularity if of_input.per_row else f"{of_input.granularity}, frozen"
    return f"{weight.format} weights {weight.granularity}, {of_input.format} inputs {how}"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
