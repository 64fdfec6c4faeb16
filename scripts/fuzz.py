"""Feed the command line with inputs that nobody would write on purpose, and see that none of them ends badly.

Recipes, `--set`, data, model folders, quantized folders, study files, task files and command lines are broken at random,
from a seed; each is given to a command that meets it, in a folder of its own. A bad end is a traceback, an error that
qatrun calls its own, a signal, a command that does not end, an exit code that means nothing, code that ran, or a file that
was touched outside the output folder.

python scripts/fuzz.py                           # 1,000 inputs; exit code 1 if one of them ended badly
python scripts/fuzz.py --seed 1 --inputs 200 --jobs 2
python scripts/fuzz.py --seed 1 --only 17        # one of them again: what it printed, and the folder is kept
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from fuzzing import run as running
from fuzzing.inputs import KINDS, Input, draw
from fuzzing.world import write_world

SETUP_LIMIT_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a command may take")
    parser.add_argument("--only", type=int, help="number of the one input to run")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qatrun-fuzz-"))
    os.environ["HF_HOME"] = str(folder / "hub")
    running.preload()
    base = _base(folder)
    numbers = range(arguments.inputs) if arguments.only is None else [arguments.only]
    bad = _run_all(base, folder, list(numbers), arguments)
    if arguments.only is None:
        running.remove(folder)
    return int(bool(bad))


def _base(folder: Path) -> Path:
    """The world that every input is a broken copy of, with its finished study."""
    base = folder / "base"
    base.mkdir()
    write_world(base / "world")
    made = running.start(["train", "tiny.yaml"], base, SETUP_LIMIT_S)
    while (code := made.poll()) is None:
        time.sleep(0.05)
    if code != 0:
        raise SystemExit(f"the world's own study ends with {code}:\n{made.said()}")
    return base / "world"


def _run_all(base: Path, folder: Path, numbers: list[int], arguments: argparse.Namespace) -> list[str]:
    """Run the inputs, so many at a time; the rows of those that ended badly, printed as they come."""
    at_work: list[tuple[int, Input, running.Run]] = []
    bad: list[str] = []
    places: Counter[str] = Counter()
    codes: Counter[tuple[str, int]] = Counter()
    began = time.monotonic()
    waiting = iter(numbers)
    while True:
        while len(at_work) < arguments.jobs and (number := next(waiting, None)) is not None:
            place = folder / f"input-{number}"
            shutil.copytree(base, place / "world", symlinks=True)
            drawn = draw(place / "world", random.Random(f"{arguments.seed}-{number}"))
            at_work.append((number, drawn, running.start(drawn.arguments, place, arguments.limit)))
        if not at_work:
            break
        for entry in list(at_work):
            number, drawn, run = entry
            if (code := run.poll()) is None:
                continue
            at_work.remove(entry)
            codes[drawn.kind, code] += 1
            if found := running.faults(run, code, _names_a_place(drawn)):
                bad.append(_row(number, drawn, code, found))
                places.update(re.findall(r"\(([\w/]+\.py:\d+)\)", found[0])[-1:] or [found[0].partition(":")[0]])
                print(bad[-1], flush=True)
            if arguments.only is None:
                running.remove(run.folder)
            else:
                print(f"{_row(number, drawn, code, found)}\n{run.said()}\nin {run.world}")
        time.sleep(0.01)
    print(_summary(codes, arguments.seed, time.monotonic() - began))
    print(f"{len(bad)} ended badly" + "".join(f"\n{count:>6} {place}" for place, count in places.most_common()))
    return bad


def _names_a_place(drawn: Input) -> bool:
    """Whether the input names the folder that its output goes to, which may lie anywhere."""
    asked = (*drawn.arguments, drawn.what)
    return drawn.arguments[0] == "init" or any("output" in text for text in asked)


def _row(number: int, drawn: Input, code: int, found: list[str]) -> str:
    command = " ".join(text if len(text) < 60 else f"{text[:57]}..." for text in drawn.arguments)
    return (
        f"{number:>5}  {drawn.kind:<9} {code:>4}  {'; '.join(found)[:400]!r}  [{command!r:.120}; {drawn.what!r:.140}]"
    )


def _summary(codes: Counter[tuple[str, int]], seed: int, seconds: float) -> str:
    seen = sorted({code for _, code in codes})
    lines = [f"{'kind':<10}" + "".join(f"{code:>7}" for code in seen)]
    for kind in sorted(KINDS):
        lines.append(f"{kind:<10}" + "".join(f"{codes[kind, code] or '':>7}" for code in seen))
    lines.append(f"{sum(codes.values())} inputs, exit codes above, {seconds:.0f} s; one of them again:")
    lines.append(f"    {Path(sys.argv[0])} --seed {seed} --only NUMBER (the first column)")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
