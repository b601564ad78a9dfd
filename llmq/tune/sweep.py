"""Measure a provider at several concurrency levels, with the caller's own pipeline or coroutine.

`plan.py` says what is measured next, `runner.py` measures it, `recommend.py` says what follows. Here they meet: points
are saved as they come, caps stop, and a virtual sweep gets a loop of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import operator
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmq.errors import ConfigError
from llmq.ledger import Price
from llmq.pipeline import Pipeline
from llmq.records import Records
from llmq.retry import Retry, seeded_jitter
from llmq.runtime import RuntimeEnv
from llmq.tune.evidence import drift, judged, limit_found
from llmq.tune.guard import Caps, Extra, Prediction, Stopped, checked_caps
from llmq.tune.limits import RATES
from llmq.tune.plan import Step, next_step, steps_left
from llmq.tune.point import Point
from llmq.tune.recommend import OperatingPoint, recommend
from llmq.tune.runner import Load, Runner
from llmq.tune.running import check_target
from llmq.tune.standing import Bounds
from llmq.tune.storage import ABOUT, PointStore, read_about, read_points
from llmq.tune.sweep_bar import sweep_progress
from llmq.virtual import in_virtual_time
from llmq.waiters import clock

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

T = TypeVar("T")

DEFAULT_LEVELS = (1, 2, 4, 8, 16, 32, 64)
VIRTUAL_CALLS = 2000
_FAST = 0.5
_SELDOM = 20_000


@dataclass
class Sweep:
    """What was measured, as it was measured, and what it says.

    `records` has each window's attempts by `Point.order`, where they were measured by this process; they are not
    saved. `predicted` is what was expected to be used, `stopped` why it ended early, `present` the calls at once that
    were set when it was made, `left` what the caps leave for more calls (None: nothing).
    """

    points: list[Point]
    bounds: Bounds = field(default_factory=Bounds)
    title: str = ""
    hidden_retries: bool = False
    records: dict[int, Records] = field(default_factory=dict, repr=False)
    predicted: Prediction | None = None
    stopped: str | None = None
    present: int | None = None
    left: Caps | None = field(default_factory=Caps, repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> Sweep:
        """A sweep that was saved with `out=folder`, without its records. A path of one of its files will do.

        Raises ConfigError.
        """
        folder = Path(folder)
        folder = folder.parent if folder.name in ("points.jsonl", ABOUT) else folder
        points = read_points(folder / "points.jsonl")
        if not points:
            raise ConfigError(f"{folder} holds no point of a sweep")
        about = read_about(folder)
        return cls(
            points,
            about.bounds,
            about.title,
            about.hidden_retries,
            predicted=about.predicted,
            stopped=about.stopped,
            present=about.present,
        )

    def about(self) -> dict[str, Any]:
        """What `read` needs beside the points."""
        return {
            "title": self.title,
            "bounds": asdict(self.bounds),
            "hidden_retries": self.hidden_retries,
            "predicted": None if self.predicted is None else asdict(self.predicted),
            "stopped": self.stopped,
            "present": self.present,
        }

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame, a row a window in order of level; the columns are the fields of `Point`."""
        import pandas as pd

        columns = [column.name for column in fields(Point)]
        return pd.DataFrame([asdict(p) for p in self.by_level()], columns=columns)

    def recommend(self) -> OperatingPoint:
        """What to set, and why; or why nothing can be recommended, and what to do."""
        answer = recommend(self.points, self.bounds, present=self.present)
        notes = answer.notes
        if self.stopped is not None:
            notes = (f"The sweep {self.stopped}.", *notes)
        if self.hidden_retries:
            warning = (
                "Your client retries by itself, so refusals were hidden and the 429 share is not to be trusted: hand "
                "its retries over (llmq.wrap) or switch them off (max_retries=0), and measure again."
            )
            notes = (warning, *notes)
        return replace(answer, notes=notes)

    def apply(self, path: str | Path = "config/app.yaml") -> dict[str, object]:
        """Put the operating point into a settings file; its comments and all other keys stay as they are.

        Returns what was changed: new values by name.
        Raises ConfigError where nothing can be recommended, or for a file that cannot be changed.
        """
        from llmq.tune.apply import apply

        return apply(self.recommend(), Path(path))

    def plot(self) -> Figure:
        """One figure: goodput, 429 share, service and wait times against concurrency."""
        from llmq.tune.plots import plot_sweep

        return plot_sweep(self)

    def drift(self) -> float | None:
        """Relative change of goodput from the first level's first measurement to its last."""
        return drift(self.points)

    def __str__(self) -> str:
        from llmq.tune.report import text_table

        return text_table(self)

    def _repr_html_(self) -> str:
        from llmq.tune.cards import sweep_card

        return sweep_card(self)

    def by_level(self) -> list[Point]:
        """All windows in order of pace, level and time."""
        return sorted(self.points, key=lambda p: (p.setting.paced, p.level, p.order))

    def judged(self) -> list[Point]:
        """One point a setting, its windows pooled."""
        return judged(self.points)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sweep is: `done` of about `total` windows, the level being measured, the newest point."""

    done: int
    total: int
    level: int | None
    point: Point | None = None


async def sweep(
    call_or_pipeline: Callable[[T], Awaitable[object]] | Pipeline,
    items: Iterable[T],
    levels: Sequence[int] | None = None,
    *,
    virtual: bool = False,
    seconds: float | None = None,
    calls: int | None = None,
    arrivals: float | Sequence[float] | None = None,
    slo_p95: float | None = None,
    max_429_ratio: float = 0.01,
    max_error_ratio: float = 0.01,
    retry: Retry | None = None,
    request_timeout: float | None = None,
    open_items: int | None = None,
    refine: bool = True,
    caps: Caps | None = None,
    prices: Mapping[str, Price] | None = None,
    on_plan: Callable[[Prediction], bool] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    title: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> Sweep:
    """Measure `call(item)`, or a pipeline over items, at each level (calls at once), and say which to use.

    A list of items is used over and over; an iterator only as long as it lasts. `seconds` is how long a window
    is after its warm-up (default: 40 service times, between 2 and 20 s), `calls` how many attempts it has at least.

    `virtual`: on a virtual clock, an hour in a second, with `calls` of 2,000. Only what waits by the loop's timers can
    be virtual, such as `llmq.testing.SimulatedProvider`: sockets and threads raise `VirtualTimeError`. With the same
    `seed` it finds the same again, if the call does.

    `arrivals`: an open loop. Calls come at so many a second, at random (Poisson), or at the given seconds, over and
    over; response times count from the intended start, and `slo_p95` bounds them. Otherwise the loop is closed: each
    level is kept full, and `slo_p95` bounds the service time.

    `refine` adds windows by itself: levels in between, paces where a rate binds, more samples where needed. `caps`
    stop it hard, with what was measured; `on_plan` is told what it will use, after the first few calls and before the
    rest, and returns False to stop. `prices` (default: the settings') are by model. `retry` and `request_timeout`
    default to the settings in force. With `out`, each point is saved there as it is measured, and `resume` goes on.

    A plain call holds one slot; what it sends through `llmq.submit` itself takes no second one. Runs on asyncio.
    Hand the retries of your own client over (`llmq.wrap`) or switch them off (`max_retries=0`): hidden ones cannot be
    counted.
    Raises what the call raises if nothing but errors of its own comes back, `ProviderError` if no call succeeds, and
    `ConfigError` for what cannot be measured.
    `on_progress` hears before and after each window; by default a bar is shown (`llmq.progress`).
    """
    check_target(call_or_pipeline)
    caps = checked_caps(caps)
    settings = RuntimeEnv.instance().settings
    order = _checked_levels(DEFAULT_LEVELS if levels is None else levels)
    bounds = Bounds(max_429_ratio, max_error_ratio, slo_p95)
    if virtual and seconds is None and calls is None:
        calls = VIRTUAL_CALLS
    load = Load(
        _positive("seconds", seconds), _checked_calls(calls), _checked_arrivals(arrivals, call_or_pipeline), seed
    )
    if load.calls is not None and caps.calls is not None and caps.calls <= load.calls:
        raise ConfigError(
            f"a window has {load.calls} calls, and the cap is {caps.calls}, so no level would be measured; raise the "
            "cap (--max-calls), or measure fewer calls (calls=, --calls)"
        )
    what = _describe(call_or_pipeline, title, load, virtual=virtual)
    store = None if out is None else PointStore(Path(out), what, resume=resume)
    unpaced = settings.llm_queue_enabled and not settings.queue_policy.limits
    present = settings.llm_queue_concurrency if unpaced else None  # of others it is not known what they would bring
    known = Sweep.read(store.folder) if store and store.points else Sweep([])
    result = Sweep(
        list(store.points) if store else [],
        bounds,
        title,
        known.hidden_retries,
        predicted=known.predicted,
        present=present,
        left=caps,
    )
    make_runner = functools.partial(
        Runner,
        call_or_pipeline,
        items,
        load=load,
        retry=settings.retry if retry is None else retry,
        request_timeout=settings.request_timeout if request_timeout is None else request_timeout,
        open_items=settings.concurrency if open_items is None else open_items,
        highest=order[-1],
        caps=caps,
        prices=settings.prices if prices is None else prices,
    )
    random.Random(seed).shuffle(order)
    with sweep_progress(on_progress, at_once=on_plan is None) as report:
        work = _Work(result, order, make_runner, store, on_plan, report, virtual=virtual, refine=refine)
        if virtual:
            with _collecting_seldom(), seeded_jitter(seed):
                await in_virtual_time(work.run)
        else:
            await work.run()
    return result


@contextlib.contextmanager
def _collecting_seldom() -> Iterator[None]:
    """What a virtual sweep makes is kept: to look for garbage among it would take a fifth of its time."""
    before = gc.get_threshold()
    if not 0 < before[0] < _SELDOM:  # switched off, or another sweep has done so
        yield
        return
    gc.set_threshold(_SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(slots=True)
class _Work:
    """One sweep under way."""

    result: Sweep
    order: list[int]
    make_runner: Callable[[], Runner]
    store: PointStore | None
    on_plan: Callable[[Prediction], bool] | None
    report: Callable[[Progress], None]
    virtual: bool
    refine: bool
    asked_seconds: float = 0.0
    extra_windows: int = 0
    extra_seconds: float = 0.0

    def next_step(self) -> Step | None:
        """What to measure next."""
        extra = Extra(0)
        if self.refine:
            measured = max(1, sum(p.purpose == "level" for p in self.result.points))
            asked = self.asked_seconds * max(1.0, len(self.order) / measured)  # levels that were left out as well
            extra = Extra.left(self.extra_windows, asked, self.extra_seconds, virtual=self.virtual)
        return next_step(self.result.points, self.order, self.result.bounds, extra)

    async def run(self) -> None:
        """Measure until nothing is left, or a cap is met."""
        step = self.next_step()
        if step is None:
            return
        if step.purpose == "level":
            for point in self.result.points:  # of an earlier plan: this one ends in a drift of its own
                point.purpose = "more" if point.purpose == "drift" else point.purpose
        self.asked_seconds = sum(p.window_seconds + p.warm_up_seconds for p in self.result.points)
        runner = self.make_runner()  # in the loop that it measures in
        limit = limit_found(self.result.points)
        runner.rate_limited = limit is not None and limit.kind in RATES
        try:
            await self._work(runner)
        except BaseException:
            with contextlib.suppress(ConfigError):  # what went wrong first is told
                self._keep(runner)
            raise
        self._keep(runner)

    async def _work(self, runner: Runner) -> None:
        try:
            await runner.probe()
            if self._goes_on(runner):
                await runner.warm_up()
                await self._measure_all(runner)
        except Stopped as error:
            self.result.stopped = str(error)

    def _keep(self, runner: Runner) -> None:
        self.result.left = runner.used.left()
        self.result.hidden_retries = self.result.hidden_retries or runner.hidden_retries
        if self.store is not None:
            self.store.tell(self.result.about())

    def _goes_on(self, runner: Runner) -> bool:
        self.result.predicted = runner.predicted(self.order, refine=self.refine, virtual=self.virtual)
        if self.on_plan is not None and not self.on_plan(self.result.predicted):
            self.result.stopped = "was not wanted, after its first few calls"
            return False
        return True

    async def _measure_all(self, runner: Runner) -> None:
        points, order, bounds = self.result.points, self.order, self.result.bounds
        while (step := self.next_step()) is not None:
            done, total = len(points), len(points) + steps_left(points, order, bounds)
            self.report(Progress(done, total, step.setting.level))
            known_before, began_at = runner.rate_limited, clock()
            point, records = await runner.measure(step, done, step.purpose)
            if step.extra:
                self.extra_windows += 1
                self.extra_seconds += clock() - began_at
            else:
                self.asked_seconds += clock() - began_at
            points.append(point)
            self.result.records[point.order] = records
            self._heed_refusals(runner, known_before)
            if self.store is not None:
                self.store.add(point)
                self.store.rewrite()
            self.report(Progress(done + 1, total, None, point))

    def _heed_refusals(self, runner: Runner, known_before: bool) -> None:
        """Whether there is a bucket to empty before each window from now on, and at which rate it fills."""
        points = self.result.points
        limit = limit_found(points)
        runner.lets_in = 0.0 if limit is None else limit.lets_in
        if limit is not None and limit.kind not in RATES:
            runner.rate_limited = False
        elif runner.rate_limited and not known_before and all(p.purpose != "burst" for p in points):
            fast = _FAST * points[-1].goodput
            for earlier in (p for p in points if p.attempt_rate > fast):  # may have lived on what a rested bucket held
                earlier.purpose = "burst"


def _checked_levels(levels: Iterable[int]) -> list[int]:
    given = list(levels) if isinstance(levels, Iterable) and not isinstance(levels, str) else [levels]
    found = {_whole(level) for level in given}
    if not found or min(found) < 1:
        raise ConfigError(f"levels are calls at once, whole numbers, each at least 1; got {levels!r}")
    return sorted(found)


def _whole(number: object) -> int:
    """A whole number, numpy's too, and neither True nor False; 0 for anything else."""
    try:
        return 0 if isinstance(number, bool) else operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{name} must be more than 0 and finite, got {value}")
    return value


def _checked_calls(calls: int | None) -> int | None:
    if calls is None:
        return None
    if _whole(calls) < 1:
        raise ConfigError(f"calls is a whole number, at least 1; got {calls!r}")
    return _whole(calls)


def _checked_arrivals(arrivals: object, target: object) -> float | tuple[float, ...] | None:
    if arrivals is None:
        return None
    if isinstance(target, Pipeline):
        raise ConfigError("arrivals are of single calls; a pipeline's calls come from its stages")
    if isinstance(arrivals, (int, float)):
        return _positive("arrivals (calls a second)", arrivals)
    times = tuple(arrivals) if isinstance(arrivals, Iterable) else ()
    if len(times) < 2 or any(b < a for a, b in itertools.pairwise(times)) or times[-1] <= times[0]:
        raise ConfigError(
            "arrivals are calls a second, or at least two moments in seconds, in order and not all the same"
        )
    return times


def _describe(target: object, title: str, load: Load, *, virtual: bool) -> str:
    """What tells one sweep from another, when it is resumed."""
    stages = [stage.name for stage in target.stages] if isinstance(target, Pipeline) else []
    what = "-".join(stages[:4]) or getattr(target, "__name__", "call")
    lasts = [f"{load.seconds:g} s"] if load.seconds else []
    lasts += [f"{load.calls} calls"] if load.calls else []
    parts = [title or "sweep", what, f"{' and '.join(lasts) or 'automatic'} a level"]
    if load.arrivals is not None:
        parts.append(f"arrivals {load.arrivals if isinstance(load.arrivals, (int, float)) else len(load.arrivals)}")
    if virtual:
        parts.append("virtual")
    return "; ".join(parts)
