"""Hold an operating point in steady state and say whether it keeps what it promises: the enablement checklist."""

from __future__ import annotations

import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from llmq.ledger import Price
from llmq.pipeline import Pipeline
from llmq.records import Records
from llmq.retry import Retry
from llmq.runtime import RuntimeEnv
from llmq.tune.guard import Caps, checked_caps
from llmq.tune.plan import Step
from llmq.tune.point import Point, Setting
from llmq.tune.runner import Load, Runner
from llmq.tune.running import check_target
from llmq.tune.standing import ATTEMPTS_TO_PROVE, Bounds
from llmq.tune.statistics import block_counts, count_interval
from llmq.waiters import clock
from llmq.words import number

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

SLOWER = 0.1
"""So much slower than with the flag off is let pass: less would take thousands of calls to tell from chance."""

_TO_EMPTY = 4
"""So many times the level of a paced setting empties a bucket that may have rested; the level itself may be below the
rate."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the checklist. `holds` None: not decided by what was measured."""

    what: str
    holds: bool | None
    evidence: str

    def __str__(self) -> str:
        return f"[{ {True: 'ok', False: 'NO', None: '??'}[self.holds]:>2}] {self.what}: {self.evidence}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What a setting did when it was held. `on` and `off`: finished calls (of a pipeline: stages) a second, low, high
    (95 %), with the queue, and with the flag off and `open_items` at once."""

    setting: Setting
    point: Point
    on: tuple[float, float, float]
    off: tuple[float, float, float]
    open_items: int
    checks: tuple[Check, ...]
    records: Records

    @property
    def passed(self) -> bool:
        """Whether every line of the checklist holds."""
        return all(check.holds for check in self.checks)

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame, a row a line of the checklist: what, holds, evidence."""
        import pandas as pd

        return pd.DataFrame([(c.what, c.holds, c.evidence) for c in self.checks], columns=["what", "holds", "evidence"])

    def __str__(self) -> str:
        head = f"Held {self.setting} calls at once for {number(self.point.window_seconds)} s: "
        head += "it keeps what it promises." if self.passed else "it does not keep, or not surely, what it promises."
        return "\n".join([head, *map(str, self.checks)])


async def verify(
    call_or_pipeline: Callable[[T], Awaitable[object]] | Pipeline,
    items: Iterable[T],
    setting: Setting,
    *,
    seconds: float | None = None,
    bounds: Bounds | None = None,
    retry: Retry | None = None,
    request_timeout: float | None = None,
    open_items: int | None = None,
    caps: Caps | None = None,
    prices: Mapping[str, Price] | None = None,
) -> Verification:
    """Hold `setting` until its 429 share is proven (400 attempts), then run with the flag on and off, for as long each.

    `caps` hold for all of it; see `Caps` for what counts with the flag off. `seconds`: hold it at least so long.
    The rest is as in `sweep`; raises what `sweep` raises, and `Stopped` at a cap.
    """
    check_target(call_or_pipeline)
    settings = RuntimeEnv.instance().settings
    bounds = bounds or Bounds()
    open_items = settings.concurrency if open_items is None else open_items
    finished: list[float] = []
    runner = Runner(
        _noting(call_or_pipeline, finished),
        items,
        load=Load(seconds=seconds, calls=ATTEMPTS_TO_PROVE),
        retry=settings.retry if retry is None else retry,
        request_timeout=settings.request_timeout if request_timeout is None else request_timeout,
        open_items=open_items,
        highest=setting.level * (_TO_EMPTY if setting.paced else 1),
        caps=checked_caps(caps),
        prices=settings.prices if prices is None else prices,
    )
    await runner.probe()
    await runner.warm_up()
    runner.rate_limited = runner.rate_limited or setting.paced
    point, records = await runner.measure(Step(setting, calls=ATTEMPTS_TO_PROVE), 0, "level")
    on, off = [await _a_second(runner, held, point.window_seconds, finished) for held in (setting, None)]
    checks = tuple(_checks(point, bounds, on, off, open_items))
    return Verification(setting, point, on, off, open_items, checks, records)


Rate = tuple[float, float, float]


def _noting(target: Callable[[Any], Awaitable[object]] | Pipeline, finished: list[float]) -> Any:
    """The same work, which notes when a call, or a stage, has come out well."""

    def noted(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(call)
        async def run(*arguments: Any) -> Any:
            result = await call(*arguments)
            finished.append(clock())
            return result

        return run

    if isinstance(target, Pipeline):
        return Pipeline([replace(stage, call=noted(stage.call)) for stage in target.stages])
    return noted(target)


async def _a_second(runner: Runner, setting: Setting | None, seconds: float, finished: list[float]) -> Rate:
    finished.clear()
    start, end = await runner.hold(setting, seconds, lambda: bool(finished))
    if end <= start:
        return 0.0, 0.0, 0.0
    blocks = block_counts(finished, start, end)
    low, high = count_interval(blocks)
    return sum(blocks) / (end - start), low / (end - start), high / (end - start)


def _checks(point: Point, bounds: Bounds, on: Rate, off: Rate, open_items: int) -> Iterable[Check]:
    refused = f"{point.refused} of {point.attempts} attempts refused, {point.share_429:.2%}"
    refused += f" (95 %: {point.share_429_low:.2%} to {point.share_429_high:.2%})"
    share = _within(point.share_429_low, point.share_429_high, bounds.max_429_ratio)
    yield Check(f"429 share under {bounds.max_429_ratio:.1%}", share, refused)
    errors = _within(point.error_share_low, point.error_share_high, bounds.max_error_ratio)
    failed = f"{point.failed} of {point.succeeded + point.failed} calls failed in the end"
    yield Check(f"error share under {bounds.max_error_ratio:.1%}", errors, failed)
    if bounds.slo_p95 is not None:
        p95 = point.service_p95
        holds = None if p95 is None else bounds.broken_by(point) is None and bounds.unproven_by(point) is None
        yield Check(f"p95 under {number(bounds.slo_p95)} s", holds, f"{number(p95 or math.nan)} s")
    client = "" if point.cpu_share is None else f"{point.cpu_share:.0%} of a core, "
    lag = "" if point.loop_lag_p99 is None else f"loop lag p99 {1000 * point.loop_lag_p99:.0f} ms, "
    fine = point.limited_by != "client"
    yield Check("this client keeps up", fine, f"{client}{lag}{point.in_flight:.1f} of {point.level} calls in flight")
    yield _against_off(on, off, open_items)


def _within(low: float, high: float, bound: float) -> bool | None:
    if high <= bound:
        return True
    return False if low > bound else None


def _against_off(on: Rate, off: Rate, open_items: int) -> Check:
    """Whether the flag slows this pipeline, by the ratio of finished calls a second (errors of a quotient)."""
    what = f"as fast as with the flag off and {open_items} items open, within {SLOWER:.0%}"
    if off[0] <= 0 or on[0] <= 0:
        return Check(what, None if off[0] <= 0 else False, f"{number(on[0])} calls/s against {number(off[0])}")
    ratio = on[0] / off[0]
    half = ratio * math.hypot(*((rate[2] - rate[1]) / 2 / rate[0] for rate in (on, off)))
    text = f"{number(on[0])} calls/s against {number(off[0])}, {ratio - 1:+.0%} (95 %: {ratio - half - 1:+.0%} to "
    text += f"{ratio + half - 1:+.0%})"
    holds = True if ratio - half >= 1 - SLOWER else False if ratio + half < 1 - SLOWER else None
    return Check(what, holds, text)
