"""A recipe -> its arms -> trunk, branches, scores, comparison.

Each is loaded when first used: `qatrun studies` needs no torch.
"""

from typing import TYPE_CHECKING

from qatrun.lazy import lazy_names

if TYPE_CHECKING:
    from qatrun.study.advising import advise, recipe_to_advise
    from qatrun.study.checking import preflight
    from qatrun.study.dryrun import dry_run_of
    from qatrun.study.exporting import export_arm
    from qatrun.study.fix import fix_study
    from qatrun.study.housekeeping import clean, list_studies, spare_files
    from qatrun.study.inspecting import inspect_model
    from qatrun.study.named import diagnose_study, named_study, report_study
    from qatrun.study.pairs import compare_named, ranked_arms
    from qatrun.study.results import StudyResult, alarms_raised, comparison_csv
    from qatrun.study.runner import run, run_study
    from qatrun.study.scoring import eval_config, score_path
    from qatrun.study.sensitivity import find_sensitivity
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "qatrun.study.advising": ("advise", "recipe_to_advise"),
            "qatrun.study.checking": ("preflight",),
            "qatrun.study.dryrun": ("dry_run_of",),
            "qatrun.study.exporting": ("export_arm",),
            "qatrun.study.fix": ("fix_study",),
            "qatrun.study.housekeeping": ("clean", "list_studies", "spare_files"),
            "qatrun.study.inspecting": ("inspect_model",),
            "qatrun.study.named": ("diagnose_study", "named_study", "report_study"),
            "qatrun.study.pairs": ("compare_named", "ranked_arms"),
            "qatrun.study.results": ("StudyResult", "alarms_raised", "comparison_csv"),
            "qatrun.study.runner": ("run", "run_study"),
            "qatrun.study.scoring": ("eval_config", "score_path"),
            "qatrun.study.sensitivity": ("find_sensitivity",),
        },
    )

__all__ = [
    "StudyResult",
    "advise",
    "alarms_raised",
    "clean",
    "compare_named",
    "comparison_csv",
    "diagnose_study",
    "dry_run_of",
    "eval_config",
    "export_arm",
    "find_sensitivity",
    "fix_study",
    "inspect_model",
    "list_studies",
    "named_study",
    "preflight",
    "ranked_arms",
    "recipe_to_advise",
    "report_study",
    "run",
    "run_study",
    "score_path",
    "spare_files",
]
