"""Is what a sweep recommends right? Twelve simulated providers, twenty seeds each, against the truth.

The truth comes from long runs in virtual time over a fine grid: every level, and every pace where a rate binds. A
setting is *admissible* if less than 1 % of the attempts are refused in the long run; the best admissible goodput is the
most that any such setting brings. For each recommendation
- `good`: its own long run has at least 97 % of what the best admissible setting brings at the same provider (each seed
  has other answers, so other tokens a call, and other times);
- `small`: its level is at most 1.25 times the smallest that has;
- `clean`: less than 1 % of its attempts are refused in the long run;
- `binds`: what binds is named right;
- `covered`: its stated 95 % interval of goodput holds the long run's; `covered, all`: so of every level asked for.
`refused`: how often a sweep that is stopped after 150 calls says that it cannot tell. All is drawn from the seeds, so a
second run prints the same but for the seconds.

    python benchmarks/judge.py [--seeds 20] [--only requests] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq import Retry, report_tokens, sweep
from llmq.retry import seeded_jitter
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider, VirtualLoop
from llmq.tune.guard import Caps
from llmq.tune.plan import Step
from llmq.tune.point import Point, Setting
from llmq.tune.runner import Load, Runner

LEVELS = (1, 2, 4, 8, 16, 32, 64)
CALLS = 2000
LONG_CALLS = 12_000
GRID_CALLS = 6_000
HELD_CALLS = 20_000
SHORT_CALLS = 150
SETTLE_SECONDS = 100.0
ADMISSIBLE = 0.01
GOOD_ENOUGH = 0.97
SMALL_ENOUGH = 1.25
RETRY = Retry(attempts=6)
REQUESTS = [
    ChatRequest("m", [{"role": "user", "content": f"question {n}"}]) for n in range(4000)
]  # so many that seeds differ little in their mean length


@dataclass(frozen=True)
class Shape:
    """A provider, what binds there, and the paces in requests a minute that the truth is looked for at."""

    spec: dict[str, Any]
    binds: str
    paces: tuple[float, ...] = ()


def _near(rate: float, *shares: float) -> tuple[float, ...]:
    return tuple(rate * share for share in (*shares, 0.97, 0.985, 1.0, 1.005, 1.01))


_CALL = {"latency_seconds": 2.0, "sigma": 0.5}
SHAPES = {
    "latency": Shape(_CALL, "latency"),
    "requests": Shape(_CALL | {"requests_per_minute": 600}, "requests", _near(600)),
    "tokens": Shape(_CALL | {"tokens_per_minute": 60_000}, "tokens", _near(510, 0.95)),
    "server queueing": Shape(_CALL | {"server_slots": 16}, "server"),
    "concurrency limit": Shape(_CALL | {"max_concurrency": 24}, "concurrency"),
    "heavy tail": Shape(
        _CALL | {"sigma": 1.2, "requests_per_minute": 500, "bucket_seconds": 1}, "requests", _near(500)
    ),
    "noisy neighbour": Shape(
        _CALL | {"requests_per_minute": 500, "limit_factors": (1.0, 0.6), "factor_seconds": 60},
        "requests",
        _near(400, 0.75, 0.85, 1.02, 1.03),
    ),
    "changing limit": Shape(
        _CALL
        | {"requests_per_minute": 500, "bucket_seconds": 10, "limit_factors": (1.0, 0.5, 1.5), "factor_seconds": 120},
        "requests",
        _near(250, 0.9, 1.03, 1.06, 1.1, 1.14, 1.16, 1.18, 1.2, 1.22, 1.24, 1.3),
    ),
    "shallow bucket": Shape(_CALL | {"requests_per_minute": 600, "bucket_seconds": 1}, "requests", _near(600)),
    "slow start": Shape(_CALL | {"server_slots": 20, "cold_seconds": 60, "cold_factor": 5}, "server"),
    "random errors": Shape(_CALL | {"server_slots": 24, "error_ratio": 0.01, "refusal_ratio": 0.004}, "server"),
    "mixed": Shape(
        _CALL
        | {
            "sigma": 0.8,
            "requests_per_minute": 700,
            "tokens_per_minute": 50_000,
            "max_concurrency": 40,
            "load_slots": 30,
            "error_ratio": 0.005,
        },
        "tokens",
        _near(425, 0.95),
    ),
}


@dataclass(frozen=True)
class Truth:
    """The most that is to be had, and where; the smallest level with 97 % of it; goodput of the levels asked for."""

    best: float
    best_at: Setting
    smallest: int
    by_level: dict[int, float]


@dataclass(frozen=True)
class Verdict:
    """How one recommendation stands."""

    level: int | None
    pace: str
    binds: str
    seconds: float
    calls: int
    good: bool
    small: bool
    clean: bool
    covered: bool
    all_covered: tuple[int, int]
    said: str


def client(spec: dict[str, Any], seed: int) -> tuple[SimulatedProvider, Any]:
    """A provider, and an async function that asks it."""
    provider = SimulatedProvider(ProviderSpec(seed=seed, **spec))

    async def ask(request: ChatRequest) -> None:
        answer = await provider.complete(request)
        report_tokens(answer.prompt_tokens, answer.completion_tokens)

    return provider, ask


def _virtually(main: Any) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def hold(spec: dict[str, Any], setting: Setting, calls: int, seed: int = 1000) -> Point:
    """One setting in a long run."""

    async def run() -> Point:
        _, ask = client(spec, seed)
        runner = Runner(
            ask,
            REQUESTS,
            load=Load(calls=calls),
            retry=RETRY,
            request_timeout=None,
            open_items=1,
            highest=max(64, setting.level),
            caps=Caps(),
            prices={},
        )
        await runner.probe()
        await runner.settle(SETTLE_SECONDS)
        point, _ = await runner.measure(Step(setting), 0, "level")
        return point

    with seeded_jitter(seed):
        return _virtually(run())


def truth(shape: Shape) -> Truth:
    """The best admissible goodput, and the smallest level that has 97 % of it, at any pace."""
    spec = shape.spec
    fine = {12, 14, 18, 20, 24} if shape.paces else {*range(12, 32), *range(32, 64, 4), 62, 63}
    levels = sorted(fine | set(LEVELS))
    grid = {Setting(n): hold(spec, Setting(n), LONG_CALLS if n in LEVELS else GRID_CALLS) for n in levels}
    for pace in shape.paces:
        grid[Setting(64, pace)] = hold(spec, Setting(64, pace), LONG_CALLS)
    admissible = {s: p.goodput for s, p in grid.items() if p.share_429 < ADMISSIBLE}
    best_at = max(admissible, key=admissible.__getitem__)
    best = admissible[best_at]
    enough = [s.level for s, goodput in admissible.items() if goodput >= GOOD_ENOUGH * best]
    smallest = min(enough)
    for pace in shape.paces:
        if admissible.get(Setting(64, pace), 0.0) < GOOD_ENOUGH * best:
            continue
        low, high = 0, smallest
        while high - low > 1:
            middle = (low + high) // 2
            point = hold(spec, Setting(middle, pace), GRID_CALLS)
            if point.goodput >= GOOD_ENOUGH * best and point.share_429 < ADMISSIBLE:
                high = middle
            else:
                low = middle
        smallest = min(smallest, high)
    return Truth(best, best_at, smallest, {n: grid[Setting(n)].goodput for n in LEVELS})


def judge(shape: Shape, seed: int, known: Truth) -> Verdict:
    """One sweep, against the truth."""
    provider, ask = client(shape.spec, seed)
    began = time.perf_counter()
    found = _virtually(
        sweep(ask, REQUESTS, LEVELS, virtual=True, calls=CALLS, seed=seed, retry=RETRY, on_progress=lambda _: None)
    )
    seconds = time.perf_counter() - began
    answer = found.recommend()
    asked = [p for p in found.points if p.purpose == "level" and not p.setting.paced]
    inside = sum(p.goodput_low <= known.by_level[p.level] <= p.goodput_high for p in asked)
    calls = provider.stats()["requests"]
    if answer.setting is None:
        no = False
        return Verdict(None, "", answer.binds, seconds, calls, no, no, no, no, (inside, len(asked)), str(answer))
    held = hold(shape.spec, answer.setting, HELD_CALLS, seed)
    best = hold(shape.spec, known.best_at, HELD_CALLS, seed)
    assert answer.goodput_low is not None
    assert answer.goodput_high is not None
    return Verdict(
        answer.level,
        answer.setting.pace,
        answer.binds,
        seconds,
        calls,
        good=held.goodput >= GOOD_ENOUGH * best.goodput,
        small=answer.setting.level <= SMALL_ENOUGH * known.smallest,
        clean=held.share_429 < ADMISSIBLE,
        covered=answer.goodput_low <= held.goodput <= answer.goodput_high,
        all_covered=(inside, len(asked)),
        said=f"{answer}\nheld: {held.goodput:.4g} calls/s, 429 {held.share_429:.2%}; best: {best.goodput:.4g} calls/s",
    )


def refuses_when_short(shape: Shape, seed: int) -> bool:
    """Whether a sweep stopped after 150 calls says that it cannot tell."""
    _, ask = client(shape.spec, seed)
    run = sweep(
        ask,
        REQUESTS,
        LEVELS,
        virtual=True,
        seconds=4,
        seed=seed,
        retry=RETRY,
        caps=Caps(calls=SHORT_CALLS),
        on_progress=lambda _: None,
    )
    return _virtually(run).recommend().level is None


def _truth_of(name: str) -> tuple[str, Truth]:
    return name, truth(SHAPES[name])


def _verdict_of(task: tuple[str, int, Truth]) -> tuple[str, int, Verdict, bool]:
    name, seed, known = task
    return name, seed, judge(SHAPES[name], seed, known), refuses_when_short(SHAPES[name], seed)


HEAD = (
    "| provider | best calls/s | smallest level | recommended | good | small | clean | binds | covered | covered, all "
    "| refused if short | s a sweep |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, known: Truth, verdicts: Sequence[Verdict], short: Sequence[bool]) -> str:
    """A line of the table."""
    n = len(verdicts)
    levels = sorted(v.level for v in verdicts if v.level is not None)
    recommended = f"{levels[0]} to {levels[-1]}" if levels else "none"
    inside, asked = (sum(v.all_covered[i] for v in verdicts) for i in (0, 1))
    right = sum(v.binds == SHAPES[name].binds for v in verdicts)
    counts = [sum(getattr(v, what) for v in verdicts) for what in ("good", "small", "clean")]
    covered = sum(v.covered for v in verdicts)
    seconds = sum(v.seconds for v in verdicts) / n
    cells = [f"{c}/{n}" for c in (*counts, right, covered)]
    return (
        f"| {name} | {known.best:.2f} | {known.smallest} | {recommended} | {' | '.join(cells)} | {inside}/{asked} "
        f"| {sum(short)}/{n} | {seconds:.1f} |"
    )


def main() -> None:
    """Judge all, print the table; exit 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=list(SHAPES))
    parser.add_argument("--write", action="store_true", help="put the table into docs/tuning.md")
    parser.add_argument("--verbose", action="store_true", help="show what was said where it was wrong")
    parser.add_argument("--truth", type=Path, help="file that keeps the truth for another try")
    asked = parser.parse_args()
    names = asked.only or list(SHAPES)
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        known = _saved(asked.truth)
        for name, found in pool.imap_unordered(_truth_of, [name for name in names if name not in known]):
            known[name] = found
            print(f"{name}: best {found.best:.3f} calls/s, smallest level {found.smallest}", flush=True)
            if asked.truth:
                asked.truth.write_text(json.dumps({n: asdict(t) for n, t in known.items()}))
        tasks = [(name, seed, known[name]) for seed in range(asked.seeds) for name in names]
        judged: dict[str, list[tuple[Verdict, bool]]] = {name: [] for name in names}
        for name, seed, verdict, short in pool.imap_unordered(_verdict_of, tasks):
            judged[name].append((verdict, short))
            right = verdict.good and verdict.small and verdict.clean and verdict.binds == SHAPES[name].binds
            if asked.verbose and not right:
                print(f"--- {name}, seed {seed}: {verdict.good=} {verdict.small=} {verdict.clean=}\n{verdict.said}\n")
    rows = [row(name, known[name], *zip(*judged[name], strict=True)) for name in names]
    every = [v for found in judged.values() for v, _ in found]
    short = [s for found in judged.values() for _, s in found]
    bounds = summary(every, short, judged)
    text = "\n".join([HEAD, *rows, "", *bounds])
    print(text)
    print(f"{time.perf_counter() - began:.0f} s")
    if asked.write:
        from measure import machine, put_into

        put_into(Path(__file__).parent.parent / "docs" / "tuning.md", "judge", f"{text}\n\nOn {machine()}.")
    sys.exit(any("missed" in line for line in bounds))


def _saved(path: Path | None) -> dict[str, Truth]:
    if path is None or not path.exists():
        return {}
    saved = json.loads(path.read_text())
    return {
        n: Truth(t["best"], Setting(**t["best_at"]), t["smallest"], {int(k): v for k, v in t["by_level"].items()})
        for n, t in saved.items()
    }


def summary(
    every: Sequence[Verdict], short: Sequence[bool], judged: dict[str, list[tuple[Verdict, bool]]]
) -> list[str]:
    """The bounds, and whether they hold."""
    n = len(every)
    inside, asked = (sum(v.all_covered[i] for v in every) for i in (0, 1))
    right = sum(2 * sum(v.binds == SHAPES[name].binds for v, _ in found) > len(found) for name, found in judged.items())
    needed = math.ceil(11 / 12 * len(judged))
    covered = sum(v.covered for v in every) / n
    lines = [
        ("at least 97 % of the best, small enough and clean", sum(v.good and v.small and v.clean for v in every), n),
    ]
    found = [f"- {what}: {count} of {total}{'' if count == total else ' (**missed**)'}" for what, count, total in lines]
    for what, share in (("of the recommended", covered), ("of every level", inside / asked)):
        held = 0.90 <= share <= 0.99
        found.append(
            f"- 95 % intervals {what} hold the truth in {share:.1%} (90 to 99 %){'' if held else ' (**missed**)'}"
        )
    share = sum(short) / n
    found.append(
        f"- sweeps of {SHORT_CALLS} calls refused: {share:.1%} (at least 90 %){'' if share >= 0.9 else ' (**missed**)'}"
    )
    found.append(f"- what binds is right for {right} of {len(judged)}{'' if right >= needed else ' (**missed**)'}")
    return found


if __name__ == "__main__":
    main()
