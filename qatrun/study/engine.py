"""A folder scored in an engine, and compared item by item with the scores of the arm that it was exported from."""

from __future__ import annotations

from pathlib import Path

from qatrun.errors import DamagedFileError, InputError, MismatchError
from qatrun.evaluate.comparison import match_items
from qatrun.evaluate.engines import engine, open_tokenizer
from qatrun.evaluate.harness import score
from qatrun.evaluate.scores import Scores
from qatrun.export import EXPORTS
from qatrun.files import read_json, write_json
from qatrun.layout import EXPORT_FILE, ArmFolder, StudyFolder
from qatrun.model import DTYPES, on_device
from qatrun.recipe import EvalConfig, load_recipe
from qatrun.records.export import EngineMatch, Exported
from qatrun.study.card import write_card
from qatrun.study.display import ScoringDisplay


def is_export(folder: Path) -> bool:
    """Whether qatrun exported this folder."""
    return (folder / EXPORT_FILE).is_file()


def exported_from(folder: Path) -> ArmFolder | None:
    """The arm that a folder was exported from; None where it is no export, or lies elsewhere by now.

    Raises:
        DamagedFileError: its export.json is torn.
    """
    if not is_export(folder):
        return None
    arm = (folder / read_json(folder / EXPORT_FILE, Exported).source).resolve().parent
    return ArmFolder(arm) if arm.is_dir() else None


def engine_of(folder: Path, asked: str | None) -> str | None:
    """Which engine scores a folder: the one asked for, else the one that opens it where it is an export, else None.

    Raises:
        InputError: an export that no engine opens, or not the one that was asked for, or that is not installed.
    """
    if is_export(folder):
        record = read_json(folder / EXPORT_FILE, Exported)
        opens = EXPORTS[record.format].ENGINES
        if not opens:
            raise InputError(f"{folder}: no engine opens {record.format} here; its arm can be scored")
        if asked is not None and asked not in opens:
            raise InputError(f"{folder}: engine {asked} opens no {record.format} ({' or '.join(opens)} does)")
        asked = asked or opens[0]
    if asked is not None:
        engine(asked)  # installed
    return asked


def score_in_engine(
    folder: Path,
    config: EvalConfig,
    name: str,
    display: ScoringDisplay,
    output: Path | None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Scores, EngineMatch | None]:
    """Score a folder in an engine. What an export's arm scored is compared with, and kept in its export.json.

    Returns:
        the scores, and how they compare; None where the arm's are not there, or of other items.
    Raises:
        InputError: the engine is not installed, or cannot open the folder.
    """
    found = engine(name)
    record = read_json(folder / EXPORT_FILE, Exported) if is_export(folder) else None
    display.begin_scoring(f"{folder.name} in {name}")
    model = found.open(
        folder,
        DTYPES[record.compute_dtype] if record else "auto",
        attn_implementation=record.attn_implementation if record else "sdpa",
        trust_remote_code=trust_remote_code,
    )
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    if found.is_torch:
        model = on_device(model)
    scores = score(model, tokenizer, config, output_dir=output, on_progress=display.on_scored)
    match = _match(folder, name, scores)
    if record is not None and match is not None:
        others = [other for other in record.scored if other.engine != name]
        write_json(folder / EXPORT_FILE, record.model_copy(update={"scored": [*others, match]}))
        if (arm := exported_from(folder)) is not None:
            write_card(arm, folder)
    return scores, match


def _match(folder: Path, engine_name: str, scores: Scores) -> EngineMatch | None:
    arm = exported_from(folder)
    if arm is None:
        return None
    try:
        recipe = StudyFolder(arm.path.parent).recipe
        budgets = load_recipe(recipe).budget if recipe.is_file() else {}
        return match_items(engine_name, Scores.load(arm.eval), scores, budgets)
    except (DamagedFileError, MismatchError, InputError):
        return None
