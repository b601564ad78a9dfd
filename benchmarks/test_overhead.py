"""What the queue costs a call that does nothing, beside a semaphore and nothing at all. The peers are in table.py.

One loop for all rounds and batches of calls: `asyncio.run` alone would cost more than what is measured.
"""

import time

import pytest
from measure import contended, timed, uncontended

CALLS = {"LLMQueue.submit": 1000}
"""So many that a round takes some milliseconds; of all others 5,000."""
TASKS = 1000
OURS = ("flag off", "LLMQueue.slot", "LLMQueue.submit")


@pytest.mark.benchmark(group="one after the other", timer=time.process_time)
@pytest.mark.parametrize("name", ["plain await", "asyncio.Semaphore", *OURS])
def test_uncontended(benchmark, runner, name):
    calls = CALLS.get(name, 5000)
    measured(benchmark, runner, name, uncontended(calls), calls)


@pytest.mark.benchmark(group="1,000 tasks on 64 slots", timer=time.process_time)
@pytest.mark.parametrize("name", ["asyncio.Semaphore", "LLMQueue.slot", "LLMQueue.submit"])
def test_contended(benchmark, runner, name):
    measured(benchmark, runner, name, contended(TASKS), TASKS)


def measured(benchmark, runner, name, scenarios, calls):
    reference = contended(TASKS)["asyncio.Semaphore"]
    timed(benchmark, runner, scenarios[name], reference, rounds=25, judged=name in OURS)
    benchmark.extra_info["calls_per_round"] = calls
