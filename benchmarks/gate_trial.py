"""How often the gate is right: equal runs, and runs with one benchmark slowed down on purpose.

    python benchmarks/gate_trial.py [tries] [factor]        10 tries, 1.10; each try is two runs of ten processes

Sets of ten processes take turns, plain and slowed, so what else the machine does comes between them. Each slowed set
is compared with the plain one before it, and each plain one with the plain one before it. Only the suite of
the planted benchmark is run, without the peers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from measure import SLOWER
from run import SUITES, run

from llmq.tune.compare import compare_benchmarks

PLANTED = "test_uncontended[LLMQueue.submit]"
RUNS = 10


def main(tries: int, factor: float) -> None:
    """Print each verdict, then the counts."""
    suites = [str(SUITES / "test_overhead.py"), "-k", "not Semaphore and not plain"]
    found, quiet, equal = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        plain = [Path(folder) / f"plain-{number}" for number in range(tries + 1)]
        run(plain[0], RUNS, suites)
        for number in range(tries):
            slowed = Path(folder) / f"slowed-{number}"
            os.environ[SLOWER] = f"{PLANTED}={factor}"
            run(slowed, RUNS, suites)
            del os.environ[SLOWER]
            run(plain[number + 1], RUNS, suites)
            planted, same = compare_benchmarks(plain[number], slowed), compare_benchmarks(*plain[number : number + 2])
            row = next(row for row in planted.rows if row.what.startswith(PLANTED))
            found += row.verdict == "worse"
            quiet += all(each.verdict == "undecided" for each in planted.rows if each is not row)
            equal += same.verdict == "undecided"
            print(f"slowed: {row}\nequal: {same}", flush=True)
    print(f"worse {found} of {tries}; nothing else said {quiet} of {tries}; equal pairs unchanged {equal} of {tries}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 10, float(given[1]) if given[1:] else 1.10)
