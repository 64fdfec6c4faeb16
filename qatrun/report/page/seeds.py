"""Arms over several seeds: every seed visible, the drop beside what the loss showed, and the contrasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from qatrun.records.seeds import ArmOfSeeds, Contrast, Seeds, TaskOfSeeds
from qatrun.report.page.curves import logarithmic
from qatrun.report.page.figure import Figure, Layout, Plot, arm_keys, canvas, draw
from qatrun.report.page.forest import Group, Mark, forest_figure
from qatrun.report.page.table import Table, bounds, difference, percent, printable, signed, signed_range, table, written
from qatrun.report.page.theme import MUTED, arm_color, arm_marker

ALL = "all_tasks"


def accuracy_figure(arms: Mapping[str, ArmOfSeeds], seeds: Sequence[int]) -> Figure:
    """Accuracy of every arm on every task: mean and standard deviation over the seeds, every seed as a dot."""
    indices = {name: index for index, name in enumerate(arms)}
    tasks = list(dict.fromkeys(task for arm in arms.values() for task in arm.tasks))
    groups = [
        Group(
            printable(task),
            [_accuracy_mark(name, arm.tasks[task], indices[name]) for name, arm in arms.items() if task in arm.tasks],
        )
        for task in tasks
    ]
    title = f"Accuracy of {len(arms)} arms on {len(tasks)} tasks, seed by seed"
    rows = [
        (name, task, arm.tasks[task].mean, arm.tasks[task].sd, *arm.tasks[task].accuracy)
        for task in tasks
        for name, arm in arms.items()
        if task in arm.tasks
    ]
    return forest_figure(
        "accuracy",
        title,
        "Large marks are means over the seeds, small dots the seeds; bars are one standard deviation of a seed either side "
        "of the mean.",
        groups,
        "accuracy, %",
        table(("arm", "task", "mean", "sd", *(f"seed {seed}" for seed in seeds)), rows),
        legend=arm_keys(indices),
    )


def drop_figure(arms: Mapping[str, ArmOfSeeds], seeds: Sequence[int]) -> Figure | None:
    """Drop from each arm's twin, with its interval over seeds and items; None where no arm has a twin."""
    indices = {name: index for index, name in enumerate(arms)}
    dropped = {name: _tasks_and_all(arm) for name, arm in arms.items() if arm.all_tasks.drop_pp}
    if not dropped:
        return None
    keys = list(dict.fromkeys(task for tasks in dropped.values() for task in tasks))
    groups = [
        Group(
            "all tasks" if task == ALL else printable(task),
            [_drop_mark(name, tasks[task], indices[name]) for name, tasks in dropped.items() if task in tasks],
        )
        for task in keys
    ]
    means = {name: mean for name, tasks in dropped.items() if (mean := tasks[ALL].drop_mean_pp) is not None}
    worst = max(means, key=means.__getitem__)
    title = (
        f"Largest drop against the BF16 twin: {printable(worst)}, {signed(means[worst])} pp over all "
        f"tasks, {'mean of ' if len(seeds) > 1 else ''}{count_seeds(seeds)}"
    )
    rows = [
        (
            *(name, task, found.drop_mean_pp, found.drop_sd_pp),
            *(*(found.drop_ci95_pp or (None, None)), *(found.drop_pp or ())),
        )
        for task in keys
        for name, tasks in dropped.items()
        if task in tasks
        for found in [tasks[task]]
    ]
    columns = ("arm", "task", "mean pp", "sd pp", "low pp", "high pp", *(f"seed {seed} pp" for seed in seeds))
    return forest_figure(
        "drop",
        title,
        "Drop from the BF16 twin of the same seed to the arm with quantizers on. Large marks are means with 95% intervals, "
        "small dots the seeds.",
        groups,
        "drop, percentage points",
        table(columns, rows),
        legend=arm_keys({name: indices[name] for name in dropped}),
        zero="right of 0: worse",
    )


def damage_figure(arms: Mapping[str, ArmOfSeeds], seeds: Sequence[int]) -> Figure | None:
    """What the loss showed beside what was lost: loss APE against the drop, a dot a seed."""
    indices = {name: index for index, name in enumerate(arms)}
    points = [
        (name, seed, ape, drop)
        for name, arm in arms.items()
        for seed, ape, drop in zip(seeds, arm.loss_apes, arm.all_tasks.drop_pp or (), strict=False)
    ]
    if not points:
        return None
    title = "Did the loss show it? Loss error against the drop in accuracy, a dot for each arm and seed"

    def plot(layout: Layout) -> Plot:
        figure = canvas(layout, 300)
        axes = figure.subplots()
        titles = {}
        for number, (name, seed, ape, drop) in enumerate(points):
            index, gid = indices[name], f"point-{number}"
            axes.plot(ape, drop, arm_marker(index), color=arm_color(index), markersize=8, alpha=0.85, gid=gid)
            titles[gid] = printable(f"{name}, seed {seed}: APE {ape:.3g}%, drop {signed(drop)} pp")
        axes.axhline(0.0, color=MUTED, linewidth=0.8)
        values = np.array([ape for _, _, ape, _ in points])
        if values.min() > 0 and values.max() > 10 * values.min():
            logarithmic(axes.xaxis, values)
        axes.set_xlabel("loss APE after the switch, %")
        axes.set_ylabel("drop over all tasks, pp")
        return Plot(figure, titles=titles)

    return Figure(
        key="damage",
        title=title,
        caption="Were the loss a good witness, the dots would rise from left to right.",
        drawings=draw("damage", title, plot),
        tables=(table(("arm", "seed", "loss APE %", "drop pp"), points),),
        legend=arm_keys({name: indices[name] for name in dict.fromkeys(point[0] for point in points)}),
    )


def contrasts_figure(summary: Seeds) -> Figure | None:
    """Differences between pairs of arms; None where the study asks for none."""
    contrasts, seeds = summary.contrasts, summary.seeds
    if not contrasts:
        return None
    groups = [Group(printable(each.name), [_contrast_mark(each)]) for each in contrasts]
    most = max(contrasts, key=lambda each: abs(each.difference_pp))
    title = (
        f"Largest contrast: {printable(most.a)} is {signed(most.difference_pp)} pp against {printable(most.b)}, "
        f"of {len(contrasts)} asked"
    )
    columns = (
        *("contrast", "a", "b", "difference pp", "low pp", "high pp", *(f"seed {seed} pp" for seed in seeds)),
        *("loss APE %", "answer"),
    )
    rows = [
        (
            *(each.name, each.a, each.b, each.difference_pp, *each.ci95_pp, *each.per_seed_pp),
            float(np.mean(each.loss_ape_percent)) if each.loss_ape_percent else None,
            each.answer,
        )
        for each in contrasts
    ]
    return forest_figure(
        "contrasts",
        title,
        "Accuracy of the first arm (a) minus that of the second (b), paired by item and seed: right of 0 the first is "
        "better. Bars are 95% intervals, small dots the seeds.",
        groups,
        "difference a − b, percentage points",
        table(columns, rows),
        zero="0: equal",
    )


def arms_table(arms: Mapping[str, ArmOfSeeds], seeds: Sequence[int]) -> Table:
    """A row an arm, pooled over tasks."""
    columns = (
        *("arm", "twin", "accuracy % mean", "sd", "drop pp", "95% interval", "loss APE %", "perplexity"),
        "findings",
    )
    rows = []
    for name, arm in arms.items():
        pooled, apes = arm.all_tasks, arm.loss_apes
        interval, drop = pooled.drop_ci95_pp, pooled.drop_mean_pp
        rows.append(
            (
                *(name, arm.twin, percent(pooled.mean), percent(pooled.sd), difference(drop)),
                bounds(interval) if interval else None,
                written(float(np.mean(apes)), ".3g") if apes else None,
                written(float(np.mean(arm.perplexity)), ".4g") if arm.perplexity else None,
                _findings_text(arm, len(seeds)),
            )
        )
    return table(columns, rows, "Pooled over the items of all tasks; means over the seeds", "arms")


def count_seeds(seeds: Sequence[int]) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}"


def finding_counts(arm: ArmOfSeeds) -> Mapping[str, int]:
    """Finding -> number of seeds that have it."""
    return Counter(name for names in arm.findings or () for name in names)


def _findings_text(arm: ArmOfSeeds, num_seeds: int) -> str | None:
    """How many seeds found what, `forgetting 2 of 3`; None where no seed was diagnosed."""
    counts = finding_counts(arm)
    if not counts:
        return "none" if arm.findings else None
    return ", ".join(f"{name} {count} of {num_seeds}" for name, count in counts.items())


def _tasks_and_all(arm: ArmOfSeeds) -> Mapping[str, TaskOfSeeds]:
    return {**arm.tasks, ALL: arm.all_tasks} if len(arm.tasks) > 1 else {ALL: arm.all_tasks}


def _accuracy_mark(name: str, found: TaskOfSeeds, index: int) -> Mark:
    mean, sd = 100 * found.mean, 100 * (found.sd or 0.0)
    text = f"{mean:.2f} ± {sd:.2f} {printable(name)}"
    dots = [100 * value for value in found.accuracy]
    return Mark(mean, index, (mean - sd, mean + sd), dots, text=text, title=text)


def _drop_mark(name: str, found: TaskOfSeeds, index: int) -> Mark:
    assert found.drop_mean_pp is not None  # it has a twin
    assert found.drop_pp is not None
    interval = found.drop_ci95_pp
    bounds = f" [{signed_range(interval)}]" if interval else ""
    text = f"{signed(found.drop_mean_pp)}{bounds} {printable(name)}"
    return Mark(found.drop_mean_pp, index, interval, found.drop_pp, text=text, title=text)


def _contrast_mark(each: Contrast) -> Mark:
    text = f"{signed(each.difference_pp)} [{signed_range(each.ci95_pp)}]"
    title = printable(f"{each.a} − {each.b}: {text} pp")
    return Mark(each.difference_pp, None, each.ci95_pp, each.per_seed_pp, text=text, title=title)
