"""Run the suites in several fresh processes, keep what they saw, and compare it with the run before.

    python benchmarks/run.py [--runs 10] [--folder out/bench] [--strict] [-- options of pytest]

Each run is a folder TIME-COMMIT of one JSON file a process, TIME-COMMIT.part until it is complete; `llmq.tune.compare`
tells how two are compared. `--strict`: exit status 1 where the new run is worse. The seed of hashing is fixed, since it
alone moves times by some per cent.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from llmq.errors import LLMQError
from llmq.tune.benchmarks import benchmarks_table
from llmq.tune.compare import Comparison, compare_benchmarks

SUITES = Path(__file__).parent
NAME = re.compile(r"\d{8}T\d{6}-[^.]+")
ONCE = "test_parity or test_transport"
"""Not judged by their times, so the first process alone runs them."""


def run(folder: Path, runs: int, options: list[str]) -> None:
    """One file a process; stops at the first that is red. The folder is there only once it is complete."""
    part = folder.with_name(folder.name + ".part")
    _run_into(part, runs, options)
    part.rename(folder)


def _run_into(folder: Path, runs: int, options: list[str]) -> None:
    folder.mkdir(parents=True)
    for number in range(1, runs + 1):
        file = folder / f"{number}.json"
        command = [sys.executable, "-m", "pytest", "-q", "--no-summary", "--benchmark-quiet"]
        command += ["--benchmark-json", str(file.resolve()), *(options or _all_suites(number))]
        print(f"process {number} of {runs}", flush=True)
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True)
        if done.returncode != 0:
            file.unlink(missing_ok=True)
            sys.exit(done.stdout + done.stderr)


def _all_suites(process: int) -> list[str]:
    return [str(SUITES)] if process == 1 else [str(SUITES), "-k", f"not ({ONCE})"]


def commit() -> str:
    """The commit, and whether the folder differs from it."""
    command = ["git", "-C", str(SUITES), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def runs_before(folder: Path) -> list[Path]:
    """The complete runs in a folder, in order of time."""
    return sorted(path for path in folder.glob("*") if NAME.fullmatch(path.name) and any(path.glob("*.json")))


def _positive(text: str) -> int:
    runs = int(text)
    if runs < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {runs}")
    return runs


def main() -> Comparison | None:
    """Run, keep, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=_positive, default=10)
    parser.add_argument("--folder", type=Path, default=Path("out/bench"))
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("options", nargs="*")
    asked = parser.parse_args()
    before = runs_before(asked.folder)
    now = asked.folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{commit()}"
    run(now, asked.runs, asked.options)
    print(benchmarks_table(now))
    if not before:
        print(f"Saved as {now}; there is no run before to compare it with.")
        return None
    found = compare_benchmarks(before[-1], now)
    print(f"{before[-1].name} and now\n{found}")
    if asked.strict and found.verdict == "worse":
        sys.exit(1)
    return found


if __name__ == "__main__":
    try:
        main()
    except LLMQError as error:
        sys.exit(f"Error: {error}")
