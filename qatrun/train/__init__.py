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
            "Checkpoint": "qatrun.train.checkpoint",
            "Listener": "qatrun.train.segment",
            "Outcome": "qatrun.train.segment",
            "Segment": "qatrun.train.segment",
            "Watched": "qatrun.train.segment",
            "has_checkpoint": "qatrun.train.checkpoint",
            "latest_checkpoint": "qatrun.train.checkpoint",
            "learning_rate_at": "qatrun.train.schedule",
            "mode_at": "qatrun.train.schedule",
            "read_alarms": "qatrun.train.metrics",
            "read_checkpoint": "qatrun.train.checkpoint",
            "read_metrics": "qatrun.train.metrics",
            "read_tensor_stats": "qatrun.train.tensors",
            "train": "qatrun.train.loop",
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
