"""Training: one loop for trunk and arms, its checkpoints and its metrics."""

from qatrun.train.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from qatrun.train.loop import train
from qatrun.train.metrics import read_metrics
from qatrun.train.schedule import learning_rate_at, mode_at
from qatrun.train.segment import Listener, Outcome, Segment

__all__ = [
    "Checkpoint",
    "Listener",
    "Outcome",
    "Segment",
    "latest_checkpoint",
    "learning_rate_at",
    "mode_at",
    "read_checkpoint",
    "read_metrics",
    "train",
]
