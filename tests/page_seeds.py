"""A study over three seeds as a finished run leaves it, made up like `page_study`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from page_study import NUM_ITEMS, Shape, environment, recipe_text, write_json, write_study


def write_seeds(folder: Path, arms: Sequence[str] = ("bf16-high", "bf16-low", "recent", "ema", "max64")) -> Path:
    """A study over three seeds; seed 0 has its own folder, too."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    (folder / "recipe.yaml").write_text(recipe_text(folder.name, shape), encoding="utf-8")
    write_json(folder / "environment.json", environment())
    rng = np.random.default_rng(1)
    found = {name: _seeds_arm(name, index, rng) for index, name in enumerate(arms)}
    contrast = {
        "name": "the max window against the latest amax",
        "a": arms[-1],
        "b": arms[2],
        "num_items": sum(NUM_ITEMS),
        "difference_pp": 0.42,
        "sd_pp": 0.26,
        "ci95_pp": [-0.31, 1.15],
        "ci95_items_pp": [-0.2, 1.04],
        "ci95_seeds_pp": [-0.23, 1.07],
        "per_seed_pp": [0.61, 0.12, 0.53],
        "loss_ape_percent": [0.2, 0.25, 0.22],
        "effect": "no effect shown",
        "answer": "No effect shown: the max window could help by up to 1.15 pp against the latest amax.",
    }
    second = contrast | {
        "name": "the low learning rate against the high one",
        "a": "bf16-low",
        "b": "bf16-high",
        "difference_pp": 24.1,
        "ci95_pp": [20.2, 28.0],
        "per_seed_pp": [23.0, 25.6, 23.7],
        "effect": "helps",
        "answer": "The low learning rate helps: 24.1 pp (20.2 to 28.0), and the loss says the opposite.",
    }
    write_json(
        folder / "seeds.json",
        {
            "study": folder.name,
            "verdict": "exceeds",
            "seeds": [0, 1, 2],
            "start": {"tasks": {}, "all_tasks": {"accuracy": 0.84}, "perplexity": 4.81},
            "arms": found,
            "contrasts": [contrast, second],
        },
    )
    write_study(folder / "seed-0", Shape(steps=60, warmup=10, blocks=1))
    return folder


def _seeds_arm(name: str, index: int, rng: Any) -> dict[str, Any]:
    base = 0.55 if "high" in name or name in ("recent", "ema") else 0.84
    tasks = {task: _seeds_task(base + 0.01 * place, index, rng) for place, task in enumerate(Shape().tasks)}
    return {
        "twin": None if "bf16" in name else "bf16-low" if name == "max64" else "bf16-high",
        "label": None,
        "tasks": tasks,
        "all_tasks": _seeds_task(base, index, rng),
        "perplexity": [2.28, 2.3, 2.27],
        "loss_ape_percent": None
        if "bf16" in name
        else {"after_switch": (0.07 * np.array([1, 1.2, 0.8]) * 3**index).tolist()},
        "findings": [[], [], []] if base > 0.8 else [["forgetting"], ["forgetting"], ["forgetting", "saturation"]],
    }


def _seeds_task(base: float, index: int, rng: Any) -> dict[str, Any]:
    accuracy = (base + rng.normal(0, 0.008, 3)).tolist()
    drops = None if index < 2 else (0.3 * index + rng.normal(0, 0.4, 3)).tolist()
    mean = None if drops is None else float(np.mean(drops))
    interval = None if mean is None else [mean - 0.9, mean + 0.9]
    return {
        "num_items": 2000,
        "accuracy": accuracy,
        "mean": float(np.mean(accuracy)),
        "sd": float(np.std(accuracy, ddof=1)),
        "drop_pp": drops,
        "drop_mean_pp": mean,
        "drop_sd_pp": None if drops is None else float(np.std(drops, ddof=1)),
        **dict.fromkeys(("drop_ci95_pp", "drop_ci95_items_pp", "drop_ci95_seeds_pp"), interval),
        "budget_pp": 1.5,
        "verdict": None if mean is None else "inconclusive",
    }
