"""A recipe -> its arms -> trunk, branches, scores, comparison.

All but the preflight is loaded when first used: `qatrun check` trains and scores nothing.
"""

from typing import TYPE_CHECKING

from qatrun.lazy import lazy_names
from qatrun.study.preflight import preflight

if TYPE_CHECKING:
    from qatrun.study.named import diagnose_study, report_study
    from qatrun.study.pairs import compare_named
    from qatrun.study.results import StudyResult, comparison_csv
    from qatrun.study.runner import run, run_study
    from qatrun.study.scoring import eval_config, score_path
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "StudyResult": "qatrun.study.results",
            "compare_named": "qatrun.study.pairs",
            "comparison_csv": "qatrun.study.results",
            "diagnose_study": "qatrun.study.named",
            "eval_config": "qatrun.study.scoring",
            "report_study": "qatrun.study.named",
            "run": "qatrun.study.runner",
            "run_study": "qatrun.study.runner",
            "score_path": "qatrun.study.scoring",
        },
    )

__all__ = [
    "StudyResult",
    "compare_named",
    "comparison_csv",
    "diagnose_study",
    "eval_config",
    "preflight",
    "report_study",
    "run",
    "run_study",
    "score_path",
]
