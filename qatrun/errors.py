"""Everything qatrun raises on purpose.

QatrunError              exit code 3
├── InputError           exit code 2: what the user gave is wrong; holds every problem found
│   ├── RecipeError      a recipe, or a --set
│   ├── DamagedFileError a file of ours that is missing, torn or something else
│   └── MismatchError    arms that may not be compared
└── RunError             exit code 3: the run could not go on
    ├── NonFiniteError   a loss, gradient or logit that is NaN or Inf
    ├── AlarmStop        an alarm, where the recipe says that it ends the run; saved first
    ├── SourceError      a data set that broke off while it was read
    ├── CheckpointError  a checkpoint that is damaged or belongs to another run
    ├── WriteError       a full disk, a missing permission
    ├── LostProcessError another process of the same run ended or hangs
    └── Interrupted      SIGINT or SIGTERM; the run was saved first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "AlarmStop",
    "CheckpointError",
    "DamagedFileError",
    "InputError",
    "Interrupted",
    "LostProcessError",
    "MismatchError",
    "NonFiniteError",
    "Problem",
    "QatrunError",
    "RecipeError",
    "RunError",
    "SourceError",
    "WriteError",
]


@dataclass(frozen=True)
class Problem:
    """One mistake in one line: `recipes/x.yaml:12: qat.format -- unknown format 'hif9'`.

    Attributes:
        key: of the recipe; "" where none is concerned.
        where: file and line, or the `--set`; "" where that is not known.
    """

    message: str
    key: str = ""
    where: str = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        key = f"{self.key} -- " if self.key else ""
        return f"{where}{key}{self.message}"


class QatrunError(Exception):
    """Base of all; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 3


class InputError(QatrunError):
    """What the user gave is wrong. `problems` holds all of it, so that one try shows every mistake."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(InputError):
    """A recipe or a `--set` that cannot be run."""


class DamagedFileError(InputError):
    """A file that qatrun wrote and that is missing, torn or something else now."""


class MismatchError(InputError):
    """Arms whose difference would not be the quantizer's alone."""


class RunError(QatrunError):
    """The run could not go on."""


class NonFiniteError(RunError):
    """A loss, a gradient or logits turned NaN or Inf."""


class SourceError(RunError):
    """A data set that could be opened broke off while it was read: the hub or the network, a damaged file in it."""


class CheckpointError(RunError):
    """A checkpoint that is damaged or belongs to another run."""


class WriteError(RunError):
    """A file cannot be written: a full disk, a missing permission. What was written before is whole."""


class LostProcessError(RunError):
    """Another process of the same run ended, or does not answer."""


class AlarmStop(RunError):
    """An alarm that was to end the run; it was saved first."""


class Interrupted(RunError):
    """SIGINT or SIGTERM: the run was saved first and can be resumed."""
