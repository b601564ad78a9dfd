"""A sweep as one HTML page, for a reader who was not there: the answer, why, how sure, what was done, the pictures.

The page needs nothing else: pictures are inside it, there is no script, and all text is escaped.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import ConfigError
from llmq.pages import html_table, html_text, page
from llmq.tune.plots import plot_goodput, plot_outcomes, plot_percentiles, plot_times, plot_tradeoff
from llmq.tune.report import FEW_CALLS, HEAD, rows, short
from llmq.tune.timelines import plot_gantt, plot_timeline
from llmq.words import number

if TYPE_CHECKING:
    import pandas as pd

    from llmq.records import Records
    from llmq.tune.figures import SweepFigure
    from llmq.tune.point import Point
    from llmq.tune.recommend import OperatingPoint
    from llmq.tune.sweep import Sweep

_DPI = 130
_STYLE = """\
h2 { margin-top: 2.5rem; }
p, li, dd { max-width: 46rem; }
pre { padding: .75rem 1rem; border: 1px solid #8886; border-radius: .3rem; overflow-x: auto; }
figure { margin: 0 0 2rem; }
figure img { width: 100%; max-width: 60rem; background: #fff; border: 1px solid #8884; }
.answer { font-size: 1.25rem; font-weight: 600; }
.table { overflow-x: auto; }
.table table td { text-align: right; white-space: nowrap; }
.table table td:last-child { text-align: left; }
dt { font-weight: 600; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""

BINDS = {
    "requests": "the provider's limit on requests per minute",
    "tokens": "the provider's limit on tokens per minute",
    "concurrency": "the provider's limit on calls at once",
    "overload": "the provider, which says that it is overloaded",
    "server": "the provider's capacity: calls take longer the more there are",
    "latency": "nothing yet: more calls at once would bring more",
    "pipeline": "the pipeline: it has too little to do at once",
    "client": "this client: its processor or its event loop",
    "slo": "the bound on latency",
    "errors": "errors: calls fail in the end",
    "unknown": "something that is not known",
}

GLOSSARY = (
    ("Level", "How many calls run at once at most: the slots of the queue."),
    ("Pace", "How many calls, or tokens, may start a minute; starts are spaced out in time."),
    ("Goodput", "Calls that succeeded, a second. What is refused or fails does not count."),
    ("429 share", "Of all attempts, those that the provider refused with status 429. Each costs a slot and a retry."),
    ("Wait", "From handing a call to the queue until it has a slot."),
    ("Service time", "From having a slot until the answer is there. Refused attempts are not in it."),
    ("p50, p95", "Half, and 95 of 100 calls, take at most so long."),
    ("Knee", "The smallest level that brings nearly all the goodput there is; beyond it only waiting grows."),
    ("95 % interval", "Where the true figure is to be expected; of 100 such intervals 95 hold it."),
    (
        "Feasible",
        "Within the bounds on 429s, errors and latency, and held back by neither client nor pipeline.",
    ),
)


def write_html(sweep: Sweep, path: str | Path) -> None:
    """Write the page of a sweep. Raises ConfigError where it cannot be written."""
    try:
        Path(path).write_text(html_report(sweep), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror or error}") from None


def html_report(sweep: Sweep) -> str:
    """The page of a sweep, as text."""
    answer = sweep.recommend()
    parts = [
        *_answer(sweep, answer),
        "<h2>What was measured, and how</h2>",
        html_table((), _facts(sweep)),
        "<h2>Pictures</h2>",
        *_pictures(sweep, answer),
        "<h2>All windows</h2>",
        f'<div class="table">{html_table(HEAD, rows(sweep))}</div>',
        _paragraph(f"Times are in seconds; in brackets are 95 % intervals, in percent. {FEW_CALLS}."),
        "<h2>Words</h2>",
        f"<dl>{''.join(f'<dt>{html_text(word)}</dt><dd>{html_text(what)}</dd>' for word, what in GLOSSARY)}</dl>",
    ]
    return page(f"How many LLM calls at once: {sweep.title or 'a sweep'}", parts, _STYLE)


def _answer(sweep: Sweep, answer: OperatingPoint) -> Iterator[str]:
    yield "<h2>The answer</h2>"
    setting = answer.setting
    if setting is None:
        yield _paragraph("No level can be recommended.", "answer")
    else:
        pace = f", paced at {setting.pace}" if setting.paced else ", without a pace"
        yield _paragraph(f"Run {setting.level} call{'s' if setting.level != 1 else ''} at once{pace}.", "answer")
        yield _paragraph("Put this into the configuration:")
        yield f"<pre>{_lines(answer.yaml)}</pre>"
    stopped = None if sweep.stopped is None else f"The sweep {sweep.stopped}."
    if stopped is not None:
        yield _paragraph(stopped)
    yield "<h3>Why</h3>"
    yield _paragraph(answer.reason)
    yield _paragraph(f"What binds: {BINDS.get(answer.binds, answer.binds)}.")
    if answer.waste:
        yield _paragraph(answer.waste)
    yield "<h3>How sure</h3>"
    yield _list([*_sureness(answer), *(note for note in answer.notes if note != stopped)])
    if answer.next_steps:
        yield "<h3>What to do next</h3>"
        yield _list(answer.next_steps)


def _sureness(answer: OperatingPoint) -> Iterator[str]:
    if answer.confidence is not None:
        yield f"Confidence in this level: {answer.confidence:.0%}."
    if answer.level_low is not None and answer.level_high is not None:
        yield f"95 % interval of the level: {answer.level_low} to {answer.level_high}."
    if answer.goodput is not None:
        spread = ""
        if answer.goodput_low is not None and answer.goodput_high is not None:
            spread = f" (95 % interval {number(answer.goodput_low)} to {number(answer.goodput_high)})"
        yield f"Goodput there: {number(answer.goodput)} calls a second{spread}."
    if answer.share_429 is not None:
        most = "" if answer.share_429_high is None else f", at most {answer.share_429_high:.2%} at 95 % confidence"
        yield f"429 share there: {answer.share_429:.2%}{most}."
    if answer.level is None:
        yield "Nothing is recommended, so there is no interval to give."


def _facts(sweep: Sweep) -> list[tuple[str, str]]:
    points = sorted(sweep.points, key=lambda p: p.order)
    bounds, changed = sweep.bounds, sweep.drift()
    slo = "no bound on p95" if bounds.slo_p95 is None else f"p95 of the service time at most {number(bounds.slo_p95)} s"
    facts = [
        ("What", sweep.title or "not named"),
        (
            "Bounds",
            f"429 share at most {number(bounds.max_429_ratio)}, errors at most {number(bounds.max_error_ratio)}, {slo}",
        ),
        ("Method", _method(sweep.points)),
        ("Predicted", "nothing" if sweep.predicted is None else str(sweep.predicted)),
    ]
    if not points:
        return [*facts, ("Windows", "none yet")]
    return [
        *facts,
        ("Used", _used(points)),
        ("Windows", f"{len(points)}, each {_range([p.window_seconds for p in points])} s"),
        ("Discarded", f"{_range([p.warm_up_seconds for p in points])} s of warm-up before each window"),
        ("Order", ", ".join(_in_order(p) for p in points)),
        (
            "Drift",
            _NO_DRIFT if changed is None else f"{changed:+.1%} goodput where it began, measured again last",
        ),
        ("Client", _client(points)),
    ]


def _method(points: Sequence[Point]) -> str:
    rates = [p.offered_rate for p in points if p.offered_rate is not None]
    if rates:
        return f"calls came at {_range(rates)} a second whatever became of them (an open loop); a queue retried them"
    return "as many calls as there are slots were kept running (a closed loop), by a queue that retried them"


_NO_DRIFT = "not known: nothing was measured again last"


def _used(points: Sequence[Point]) -> str:
    costs = [p.cost for p in points if p.cost is not None]
    cost = f"{sum(costs):.2f} USD" if len(costs) == len(points) else "cost not known"
    minutes = sum(p.window_seconds + p.warm_up_seconds for p in points) / 60
    attempts = sum(p.attempts for p in points)
    return f"{attempts:,} attempts and {cost} within the windows; {minutes:.1f} minutes with warm-ups"


def _in_order(point: Point) -> str:
    purposes = {"between": " (added)", "more": " (more of it)", "drift": " (again)", "burst": " (on a burst)"}
    return f"{short(point.setting)}{purposes.get(point.purpose, '')}"


def _client(points: Sequence[Point]) -> str:
    cpu = [p.cpu_share for p in points if p.cpu_share is not None]
    lag = [p.loop_lag_p99 for p in points if p.loop_lag_p99 is not None]
    limited = [short(p.setting) for p in points if p.limited_by == "client"]
    if not cpu and not lag:
        return "not watched (in virtual time there is nothing to watch)"
    words = [f"processor at most {max(cpu):.0%} of a core"] if cpu else []
    words += [f"event-loop lag p99 at most {max(lag) * 1000:.1f} ms"] if lag else []
    return ", ".join(words) + (f"; it was the limit at {'; '.join(limited)}" if limited else "; never the limit")


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture to draw, how to read it, and what to tell someone who cannot see it, from its frame."""

    name: str
    how: str
    draw: Callable[[], SweepFigure]
    tell: Callable[[pd.DataFrame], str]


def _pictures(sweep: Sweep, answer: OperatingPoint) -> Iterator[str]:
    """Each picture with how to read it; those whose data is missing are named, with the reason."""
    judged = sweep.judged()
    if not judged:
        yield _paragraph("There are none: no window counts yet.")
        return
    ours = next((p for p in judged if p.setting == answer.setting), None)
    refused = max((p for p in judged if p.refused and p is not ours), key=lambda p: p.share_429, default=None)
    wanted = [
        _Picture("Goodput against level", _GOODPUT, lambda: plot_goodput(sweep), _told("goodput", "{}/s", number)),
        _Picture("Times against level", _TIMES, lambda: plot_times(sweep), _told("service_p95", "p95 {} s", number)),
        _Picture("Outcomes", _OUTCOMES, lambda: plot_outcomes(sweep), _told("ok", "{} plain ok", "{:.0%}".format)),
        _Picture("Goodput against latency", _TRADEOFF, lambda: plot_tradeoff(sweep), _told("goodput", "{}/s", number)),
        _Picture("Percentiles", _PERCENTILES, lambda: plot_percentiles(sweep), _told_percentiles),
    ]
    for point in (ours, refused):
        if point is not None:
            draw = functools.partial(_timeline, sweep, point)
            wanted.append(_Picture(f"Timeline at {short(point.setting)}", _TIMELINE, draw, _told_timeline))
    if ours is not None:
        draw = functools.partial(_gantt, sweep, ours)
        wanted.append(_Picture("Calls by service", _GANTT, draw, lambda frame: f"{len(frame)} calls"))
    missing = []
    for picture in wanted:
        try:
            yield _figure(picture)
        except ConfigError as error:
            missing.append(f"{picture.name}: {error}")
    if missing:
        yield _paragraph("Left out, for want of data:")
        yield _list(missing)


def _told(column: str, words: str, write: Callable[[float], str]) -> Callable[[pd.DataFrame], str]:
    """The values of a column by setting, in words."""

    def tell(frame: pd.DataFrame) -> str:
        if column not in frame:
            return ""
        known = frame.dropna(subset=[column])
        values = zip(known["setting"], known[column], strict=True)
        return "; ".join(f"{setting}: {words.format(write(value))}" for setting, value in values)

    return tell


def _told_percentiles(frame: pd.DataFrame) -> str:
    wanted = frame[frame["quantile"].isin([0.5, 0.95])].dropna(subset=["service_seconds"])
    values = zip(wanted["quantile"], wanted["service_seconds"], strict=True)
    return "; ".join(f"p{100 * q:.0f} of the service time {number(seconds)} s" for q, seconds in values)


def _told_timeline(frame: pd.DataFrame) -> str:
    most = frame.loc[frame["kind"] == "in_flight", "value"].max()
    return f"at most {most:.0f} in flight, {(frame['kind'] == '429').sum()} refusals"


def _timeline(sweep: Sweep, point: Point) -> SweepFigure:
    return plot_timeline(_records(sweep, point), limit=point.level)


def _gantt(sweep: Sweep, point: Point) -> SweepFigure:
    return plot_gantt(_records(sweep, point))


def _records(sweep: Sweep, point: Point) -> Records:
    """What was recorded in the latest window of a point's setting."""
    windows = [p.order for p in sweep.points if p.setting == point.setting and p.order in sweep.records]
    if not windows:
        raise ConfigError("records of its calls were not kept (a sweep that was resumed has its points only)")
    return sweep.records[max(windows)]


_GOODPUT = (
    "Higher is better. Where the solid line stops to rise, more calls at once bring nothing; where the dotted line "
    "leaves it, attempts are wasted. Hatched levels are not feasible, for the cause written above them."
)
_TIMES = (
    "Lower is better, and each step upwards multiplies. Service time that rises means that the provider is busy; wait "
    "that rises means that calls queue here. A diamond is a setting with a pace."
)
_OUTCOMES = (
    "A bar a setting. The less that is not plain ok, the better: retries and refusals cost time and, for some, money."
)
_TRADEOFF = (
    "Each mark is a setting, by its level. Best is high and to the left; a step to the right without one up buys "
    "nothing."
)
_PERCENTILES = (
    "Read upwards from p95: 95 of 100 calls took at most so long. Response counts from when a call was meant to start, "
    "so the gap between the lines is time spent waiting."
)
_TIMELINE = (
    "From left to right as it happened, warm-up included: calls running (dashed: the limit), calls waiting, and each "
    "refusal as a tick with how long the provider asked to stay away."
)
_GANTT = "A row a service, a bar a call: gaps within a row are time that the service waited for a slot or for nothing."


def _figure(picture: _Picture) -> str:
    figure = picture.draw()
    image = base64.b64encode(figure.png(_DPI)).decode("ascii")
    name, how = html_text(picture.name), html_text(picture.how)
    return (
        f"<figure>\n<figcaption><h3>{name}</h3><p>{how}</p></figcaption>\n"
        f'<img src="data:image/png;base64,{image}" alt="{name}: {html_text(picture.tell(figure.frame))}">\n</figure>'
    )


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{html_text(text)}</p>"


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html_text(text)}</li>' for text in texts)}</ul>"


def _lines(text: str) -> str:
    return "\n".join(html_text(line) for line in text.splitlines())


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"
