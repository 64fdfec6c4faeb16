"""The folder that a verb writes what it found into: claimed, gone on with, and never anybody else's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qatrun.errors import DamagedFileError, InputError
from qatrun.files import read_json, write_json, writing
from qatrun.layout import CSV_FOLDER, LOCK_FILE, PAGE_FILE, PARTIAL, StudyFolder
from qatrun.study.claim import locked
from qatrun.text import flat, listed

SETTINGS_FILE = "settings.json"
OF_ALL = (SETTINGS_FILE, LOCK_FILE, PAGE_FILE, CSV_FOLDER, PARTIAL)


@contextmanager
def claimed_output(
    folder: Path, settings: Mapping[str, Any], own: tuple[str, ...], *, overwrite: bool
) -> Iterator[None]:
    """Make a folder this process's for as long as the block lasts. What it holds is gone on with where it was found by the
    same settings.

    Args:
        settings: plain data, all that decides what is found.
        own: names of what the verb writes beside page and CSV files.
        overwrite: throw away what was found by other settings.
    Raises:
        InputError: it is no folder of this verb's, or holds what other settings found, or another process works there.
    """
    _refuse(folder, settings, own, overwrite=overwrite)  # before even a lock is put into a stranger's folder
    with locked(StudyFolder(folder)):
        if _changes(folder, settings):
            with writing(folder):
                for name in (*own, PAGE_FILE, f"{CSV_FOLDER}/*.csv"):
                    for file in folder.glob(name):
                        file.unlink()
        write_json(folder / SETTINGS_FILE, dict(settings))
        yield


def _refuse(folder: Path, settings: Mapping[str, Any], own: tuple[str, ...], *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give another --output")
    strangers = [path.name for path in folder.iterdir() if not any(path.match(name) for name in (*OF_ALL, *own))]
    if strangers:
        raise InputError(f"{folder} holds something else ({listed(sorted(strangers)[:3])}); give another --output")
    if not overwrite and (changed := _changes(folder, settings)):
        what = ", ".join(changed[:3])
        raise InputError(
            f"{folder} holds what was found with other settings: {what}; --overwrite it or give another --output"
        )


def _changes(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    file, after = folder / SETTINGS_FILE, flat(settings)
    if not file.is_file():
        return []
    try:
        before = flat(read_json(file, dict))
    except DamagedFileError:
        return [f"{SETTINGS_FILE} (damaged)"]
    return [
        f"{key} ({before.get(key, 'not given')} -> {after.get(key, 'not given')})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
