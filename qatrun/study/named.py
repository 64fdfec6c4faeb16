"""Verbs on a study that is there already, by name or folder."""

from __future__ import annotations

from pathlib import Path

from qatrun.layout import StudyFolder, newest_study, no_such_study
from qatrun.records.diagnosis import StudyDiagnosis
from qatrun.study.card import write_cards
from qatrun.study.claim import locked
from qatrun.study.diagnose import diagnose
from qatrun.study.display import ScoringDisplay
from qatrun.study.page import write_page
from qatrun.study.results import read_result, write_text


def named_study(study: str | None, output_dir: Path) -> StudyFolder:
    """A study by its folder, by its name in `output_dir`, or the newest one there.

    Raises:
        InputError: there is none.
    """
    found = newest_study(output_dir) if study is None else None
    places = [found.path] if found else [Path(study), output_dir / study] if study is not None else []
    folder = next((StudyFolder(place) for place in places if StudyFolder(place).recipe.is_file()), None)
    if folder is None:
        raise no_such_study(study, output_dir)
    return folder


def diagnose_study(study: str | None, output_dir: Path, display: ScoringDisplay) -> dict[str, StudyDiagnosis]:
    """Folder -> its diagnosis: of the study, or of each of its seeds. Pages are written anew."""
    folder = named_study(study, output_dir)
    studies = folder.replicas or (folder,)
    found: dict[str, StudyDiagnosis] = {}
    with locked(folder):
        for one in studies:
            try:
                found[str(one.path)] = diagnose(one, display)
            except KeyboardInterrupt:
                display.on_warning(
                    f"stopped by Ctrl-C: models scored for {one.path} are saved; qatrun diagnose goes on from there"
                )
                raise
        for one in studies:
            write_cards(one)
            if one.comparison.is_file():
                write_text(one, read_result(one))
        for one in {*studies, folder}:
            write_page(one)
    return found


def report_study(study: str | None, output_dir: Path) -> Path:
    """Write the page of a study, and of its seeds; returns it."""
    folder = named_study(study, output_dir)
    for replica in folder.replicas:
        write_page(replica)
    return write_page(folder)
