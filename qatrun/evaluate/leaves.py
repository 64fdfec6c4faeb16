"""One task as lm-eval is told of it: its splits, its metrics, whether it can be compared. Needs no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qatrun import demo
from qatrun.evaluate.sources import TaskError

_COMPARABLE = frozenset({"multiple_choice", "loglikelihood"})


@dataclass(frozen=True)
class LeafTask:
    """One task that lm-eval scores by itself; a group such as mmlu has many.

    Attributes:
        config: lm-eval's keys for it, includes and overrides resolved.
    """

    name: str
    config: Mapping[str, Any]

    @property
    def scored_split(self) -> str:
        return str(self.config.get("test_split") or self.config["validation_split"])

    @property
    def fewshot_split(self) -> str | None:
        """Split that few-shot examples are drawn from; None where the task brings its own examples."""
        fewshot = self.config.get("fewshot_config") or {}
        if split := fewshot.get("split") or self.config.get("fewshot_split"):
            return str(split)
        if fewshot.get("samples"):
            return None
        return str(self.config.get("training_split") or self.config.get("validation_split") or self.scored_split)

    @property
    def metrics(self) -> tuple[str, ...]:
        listed = self.config.get("metric_list")
        return tuple(entry["metric"] for entry in listed) if listed else ("acc", "acc_norm")

    def check_comparable(self) -> None:
        """Raises TaskError where right and wrong cannot be compared item by item."""
        if "class" in self.config:
            raise TaskError(f"'{self.name}' is defined by a Python class; only tasks defined in YAML can be scored")
        kind = self.config.get("output_type", "generate_until")
        if kind not in _COMPARABLE:
            raise TaskError(
                f"'{self.name}' has output_type {kind}; only {' and '.join(sorted(_COMPARABLE))} can be compared"
            )


def metric_of(leaves: Sequence[LeafTask]) -> str:
    """What counts as right in a task of these leaves: `acc_norm` where all have it, else `acc`.

    Raises:
        TaskError: they have neither.
    """
    for metric in ("acc_norm", "acc"):
        if all(metric in leaf.metrics for leaf in leaves):
            return metric
    raise TaskError(f"it has neither acc_norm nor acc (it has {', '.join(leaves[0].metrics)})")


def demo_leaf(name: str) -> LeafTask:
    """One of `qatrun.demo`'s tasks as lm-eval is told of it."""
    config = {
        "task": name,
        "dataset_path": demo.BUILTIN,
        "dataset_name": name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return LeafTask(name, config)
