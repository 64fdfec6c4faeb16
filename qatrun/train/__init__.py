"""Training: one loop for trunk and arms, its checkpoints and its metrics.

Loaded when first used: to plan segments, or to read metrics, takes no training loop.
"""

from typing import TYPE_CHECKING

from qatrun.lazy import lazy_names

if TYPE_CHECKING:
    from qatrun.train.checkpoint import Checkpoint, has_checkpoint, latest_checkpoint, read_checkpoint
    from qatrun.train.loop import train
    from qatrun.train.metrics import read_alarms, read_metrics
    from qatrun.train.schedule import learning_rate_at, mode_at
    from qatrun.train.segment import Listener, Outcome, Segment, Watched
    from qatrun.train.tensors import read_tensor_stats
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "qatrun.train.checkpoint": ("Checkpoint", "has_checkpoint", "latest_checkpoint", "read_checkpoint"),
            "qatrun.train.loop": ("train",),
            "qatrun.train.metrics": ("read_alarms", "read_metrics"),
            "qatrun.train.schedule": ("learning_rate_at", "mode_at"),
            "qatrun.train.segment": ("Listener", "Outcome", "Segment", "Watched"),
            "qatrun.train.tensors": ("read_tensor_stats",),
        },
    )

__all__ = [
    "Checkpoint",
    "Listener",
    "Outcome",
    "Segment",
    "Watched",
    "has_checkpoint",
    "latest_checkpoint",
    "learning_rate_at",
    "mode_at",
    "read_alarms",
    "read_checkpoint",
    "read_metrics",
    "read_tensor_stats",
    "train",
]
