"""What the tasks of a recipe would score, and why one cannot be scored here and now: no model, no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatrun import demo
from qatrun.evaluate.leaves import LeafTask, demo_leaf, metric_of
from qatrun.evaluate.sources import Source, TaskError, find_source, num_shared_rows

# Official splits may share a stray row, and published scores live with it; a few-shot split made of scored items is
# another matter.
STRAY_SHARE = 0.01

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskPlan:
    """What a task would score.

    Attributes:
        metric: lm-eval's name of what counts as right.
        num_items: within the limit; None where only a download would tell.
        source: where the questions come from; for a group, of its first leaf.
        missing: why it cannot be scored here and now; None where it can, and then the other fields hold.
    """

    name: str
    num_fewshot: int
    metric: str
    num_items: int | None
    source: str
    missing: str | None


def plan_tasks(tasks: Mapping[str, int], *, data_dir: Path | None = None, limit: int | None = None) -> list[TaskPlan]:
    """Say what each task would score; loads no model and downloads no data.

    Args:
        tasks: task -> number of few-shot examples.
        data_dir: folder laid out like the hub (`org/name`), tried before the hub.
        limit: items per leaf task; None for all.
    """
    return [_plan(name, num_fewshot, data_dir, limit) for name, num_fewshot in tasks.items()]


def check_fewshot(leaf: LeafTask, num_fewshot: int, rows: Callable[[str], Rows | None]) -> None:
    """Refuse few-shot examples that are also scored: they show the model answers that it is then asked for."""
    split = leaf.fewshot_split
    if num_fewshot == 0 or split is None:
        return
    pool, scored = rows(split), rows(leaf.scored_split)
    if pool is None or scored is None:
        return
    num_shared = num_shared_rows(pool, scored)
    if num_shared > STRAY_SHARE * len(pool):
        raise TaskError(
            f"{num_shared} of the {len(pool)} few-shot examples in split '{split}' are also scored items of "
            f"'{leaf.name}'; score it with 0 few-shot examples, or from data with a split of its own for them"
        )
    if num_fewshot > len(pool):
        raise TaskError(f"{num_fewshot} few-shot examples wanted, '{leaf.name}' has {len(pool)} in split '{split}'")


def _plan(name: str, num_fewshot: int, data_dir: Path | None, limit: int | None) -> TaskPlan:
    try:
        leaves, is_file = _leaves(name)
        sources = [find_source(leaf.config, data_dir) for leaf in leaves]
        for leaf, source in zip(leaves, sources, strict=True):
            check_fewshot(leaf, num_fewshot, source.rows)
            if is_file:
                _check_first_row(leaf, source)
        sizes = [_num_items(leaf, source, limit) for leaf, source in zip(leaves, sources, strict=True)]
        known = [size for size in sizes if size is not None]
        num_items = sum(known) if len(known) == len(sizes) else None
        return TaskPlan(name, num_fewshot, metric_of(leaves), num_items, sources[0].name, missing=None)
    except TaskError as error:
        return TaskPlan(name, num_fewshot, metric="", num_items=None, source="", missing=str(error))


def _leaves(name: str) -> tuple[tuple[LeafTask, ...], bool]:
    """The leaves, and whether they are from a file of the user's."""
    if name in demo.TASKS:
        return (demo_leaf(name),), False
    from qatrun.evaluate.registry import find_task  # lm-eval brings `datasets` along, which the demo need not wait for

    found = find_task(name)
    return found.leaves, found.file is not None


def _check_first_row(leaf: LeafTask, source: Source) -> None:
    from qatrun.evaluate.templates import check_templates

    rows = source.rows(leaf.scored_split)
    if rows:
        check_templates(leaf, rows[0])


def _num_items(leaf: LeafTask, source: Source, limit: int | None) -> int | None:
    size = source.num_rows(leaf.scored_split)
    return size if size is None or limit is None else min(size, limit)
