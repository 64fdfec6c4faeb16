"""A recipe -> its arms -> trunk, branches, scores, comparison."""

from qatrun.study.layout import ArmFolder, StudyFolder, newest_study
from qatrun.study.pairs import Pair, compare_arms, compare_named
from qatrun.study.preflight import Preflight, detectable_drop_pp, preflight
from qatrun.study.runner import Display, StudyResult, comparison_csv, run, run_study
from qatrun.study.scoring import eval_config, score_path

__all__ = [
    "ArmFolder",
    "Display",
    "Pair",
    "Preflight",
    "StudyFolder",
    "StudyResult",
    "compare_arms",
    "compare_named",
    "comparison_csv",
    "detectable_drop_pp",
    "eval_config",
    "newest_study",
    "preflight",
    "run",
    "run_study",
    "score_path",
]
