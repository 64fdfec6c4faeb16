"""Kill the demo at random moments with SIGKILL, resume it each time, and compare what it ends in with an uninterrupted run.

python scripts/kill_test.py                      # five kills: before, at and after the switch among them
python scripts/kill_test.py --set train.steps=60 --set warmup.steps=20 --set eval.limit=50 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qatrun.recipe import load_recipe

CLOCK_FIELDS = {"seconds", "tokens_per_second"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = [option for override in arguments.overrides for option in ("--set", override)]
        command = [sys.executable, "-m", "qatrun.cli", "train", arguments.recipe, *options, "--resume", "--set"]
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        subprocess.run([*command, f"output_dir={whole}"], check=True, stdout=subprocess.DEVNULL)
        rng = random.Random(arguments.seed)
        for arm, step in _moments(recipe.warmup.steps, recipe.train.steps, rng):
            _run_until(arm, step, [*command, f"output_dir={killed}"], killed / recipe.name)
        subprocess.run([*command, f"output_dir={killed}"], check=True, stdout=subprocess.DEVNULL)
        differing = _differences(whole / recipe.name, killed / recipe.name)
    print("identical" if not differing else "different: " + ", ".join(differing))
    return int(bool(differing))


def _moments(switch: int, steps: int, rng: random.Random) -> list[tuple[str, int]]:
    """(arm, step after which it is killed): twice before the switch, at it, and twice after."""
    before = sorted(rng.sample(range(1, switch), 2))
    after = sorted(rng.sample(range(switch + 1, steps), 2))
    return [("trunk-*", step) for step in before] + [("hif8", step) for step in (switch + 1, *after)]


def _run_until(arm: str, step: int, command: list[str], study: Path) -> None:
    """Start the command and kill it as soon as the arm has done that many steps."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while _steps_done(study, arm) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before {arm} step {step}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed in {arm} after step {_steps_done(study, arm)}")


def _steps_done(study: Path, arm: str) -> int:
    files = list(study.glob(f"{arm}/metrics.jsonl"))
    return len(files[0].read_text(encoding="utf-8").splitlines()) if files else 0


def _differences(one: Path, other: Path) -> list[str]:
    """Weights, codes, scores and metrics (clock fields aside) that are not the same."""
    patterns = (
        "*/*.safetensors",
        "*/quantized/*.safetensors",
        "*/checkpoints/*/*.safetensors",
        "*/eval*/items.parquet",
    )
    files = {path.relative_to(one) for pattern in patterns for path in one.glob(pattern)}
    files |= {path.relative_to(one) for path in one.glob("*/metrics.jsonl")}
    return sorted(str(file) for file in files if _content(one / file) != _content(other / file))


def _content(file: Path) -> str:
    if not file.is_file():
        return "missing"
    if file.suffix != ".jsonl":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return json.dumps([{key: value for key, value in row.items() if key not in CLOCK_FIELDS} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
