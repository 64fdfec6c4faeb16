"""Plant faults in runs of eight models, and see whether the diagnosis and the alarms find them, and nothing else.

    python scripts/fault_bench.py --output FOLDER                        # models that need nothing, seed 0
    python scripts/fault_bench.py --output FOLDER --shared MODELS         # and those that need text or models from there
    python scripts/fault_bench.py --output FOLDER --models demo --only burst outlier --seed 1
    python scripts/fault_bench.py --output FOLDER --healthy 10           # alarms of healthy arms over 10 seeds
    python scripts/fault_bench.py --output FOLDER --summary              # matrix, wrong answers, faults.csv, healthy.csv

Models: `faults.models`. Faults: `faults.studies`. What counts as harm, and as a wrong answer: `faults.labels`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers
from rich.console import Console

from faults import healthy, tally
from faults.cells import CELLS_FILE, keep, read_cells
from faults.labels import Judge
from faults.models import SUBJECTS, Subject
from faults.studies import SEQ_LEN, STUDIES, run
from faults.summary import summarize
from qatrun.report import TerminalDisplay


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="what is made is kept, and used again"
    )
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--only", nargs="+", choices=[study.name for study in STUDIES], help="studies; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, metavar="DIR", help="folder with models/, text/ and data/")
    parser.add_argument("--healthy", type=int, metavar="SEEDS", help="only train healthy arms over so many seeds")
    parser.add_argument("--summary", action="store_true", help="only say what the cells there say")
    return parser.parse_args()


def subjects(arguments: argparse.Namespace, console: Console) -> list[Subject]:
    """Those that can be had; the others are named."""
    found = []
    for name in arguments.models:
        try:
            found.append(SUBJECTS[name]((arguments.output / name).resolve(), arguments.shared))
        except FileNotFoundError as error:
            console.print(str(error), markup=False)
    return found


def main() -> int:
    arguments = parse_arguments()
    transformers.logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not arguments.summary:
        for subject in subjects(arguments, console):
            output = (arguments.output / subject.name).resolve()
            with TerminalDisplay(console) as display:
                if arguments.healthy:
                    healthy.run(subject, arguments.healthy, output, display)
                    continue
                judge = Judge(subject, SEQ_LEN)
                for study in STUDIES:
                    if arguments.only is None or study.name in arguments.only:
                        cells = run(study, subject, judge, arguments.seed, output, display)
                        keep(output / f"seed-{arguments.seed}" / CELLS_FILE, cells)
    files = [arguments.output / name for name in ("faults.csv", "healthy.csv")]
    wrong = summarize(read_cells(arguments.output), files[0], console)
    tally.write_csv(files[1], healthy.COLUMNS, list(healthy.rows(arguments.output)))
    faults, over_seeds = map(tally.read_csv, files)
    for columns, rows in ((tally.DIAGNOSIS, tally.diagnosis(faults)), (tally.ALARMS, tally.alarms(faults, over_seeds))):
        console.print(tally.markdown(columns, rows), markup=False, highlight=False, soft_wrap=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
