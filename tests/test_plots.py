"""The pictures: what they show is in their frames, and what they say in words is on them."""

import io
import itertools
from dataclasses import dataclass, field

import pytest
from matplotlib.image import imread

from llmq.errors import ConfigError
from llmq.records import AttemptRecord, RecordList, Records
from llmq.tune.compare import Change
from llmq.tune.drawing import zones
from llmq.tune.figures import HIGHEST_LABEL, WIDTH_INCHES, kept_apart, level_ticks
from llmq.tune.plots import (
    plot_before_after,
    plot_goodput,
    plot_outcomes,
    plot_percentiles,
    plot_sweep,
    plot_times,
    plot_tradeoff,
)
from llmq.tune.point import QUANTILES, Point
from llmq.tune.recommend import OperatingPoint
from llmq.tune.report import short
from llmq.tune.standing import Bounds
from llmq.tune.timelines import MAX_ROWS, count_steps, merged, plot_gantt, plot_timeline

OF_SWEEPS = (plot_sweep, plot_goodput, plot_times, plot_outcomes, plot_tradeoff, plot_percentiles)


def point(level, goodput=0.0, share_429=0.0, **other):
    """A window of 100 s, in which calls took a second."""
    succeeded = round(100 * goodput)
    attempts = round(succeeded / (1 - share_429))
    values = {
        "order": level,
        "purpose": "level",
        "window_seconds": 100.0,
        "warm_up_seconds": 2.0,
        "succeeded": succeeded,
        "attempts": attempts,
        "refused": attempts - succeeded,
        "failed": 0,
        "goodput_low": 0.9 * goodput,
        "goodput_high": 1.1 * goodput,
        "attempt_rate": attempts / 100,
        "share_429_low": 0.8 * share_429,
        "share_429_high": share_429 + 0.01,
        "error_share": 0.0,
        "error_share_low": 0.0,
        "error_share_high": 0.01,
        "in_flight": float(level),
        "outcomes": {"ok": succeeded, "429 requests": attempts - succeeded},
        "service_p50": 0.8,
        "service_p95": 1.0,
        "wait_p50": 0.5,
        "wait_p95": 0.0,
        "service_quantiles": tuple(0.5 + q for q in QUANTILES) if succeeded else (),
        "response_quantiles": tuple(1.5 + q for q in QUANTILES) if succeeded else (),
    }
    return Point(level, goodput=goodput, share_429=share_429, **{**values, **other})


@dataclass
class Measured:
    """What the pictures and the report need of a `Sweep`."""

    points: list
    answer: OperatingPoint
    bounds: Bounds = field(default_factory=Bounds)
    title: str = "demo"
    records: dict = field(default_factory=dict)
    predicted: object = None
    stopped: str | None = None

    def judged(self):
        return sorted((p for p in self.points if p.purpose != "burst"), key=lambda p: (p.setting.paced, p.level))

    def recommend(self):
        return self.answer

    def drift(self):
        return None


@pytest.fixture
def measured():
    points = [
        point(1, 1.0, succeeded=30),
        point(2, 2.0),
        point(4, 4.0),
        point(8, 5.0, 0.4),
        point(16, 4.5, 0.5),
        point(32, 3.0, limited_by="client"),
        point(8, 4.9, order=40, requests_per_minute=295.0),
    ]
    answer = OperatingPoint(8, "requests", "Because.", requests_per_minute=295.0, goodput=4.9, share_429=0.0)
    return Measured(points, answer)


def attempt(start, end, outcome="ok", *, submitted=None, service=None, stage=None, **other):
    submitted = start if submitted is None else submitted
    return AttemptRecord(1, 1, stage, None, service, None, submitted, start, end, outcome, **other)


def recorded(*attempts):
    return Records(RecordList(), RecordList(attempts))


def words_of(figure):
    """All text on a figure that has been drawn."""
    figure.png()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def is_whole(figure):
    """Whether all that is drawn fits on the picture."""
    figure.png()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01


@pytest.mark.parametrize("plot", OF_SWEEPS)
def test_a_picture_is_as_wide_as_a_notebook_and_cuts_no_words(plot, measured):
    figure = plot(measured)
    assert imread(io.BytesIO(figure._repr_png_())).shape[1] == 100 * WIDTH_INCHES
    assert is_whole(figure)


@pytest.mark.parametrize("plot", [plot for plot in OF_SWEEPS if plot is not plot_percentiles])
def test_a_frame_has_a_row_a_setting_and_says_what_is_broken_and_recommended(plot, measured):
    frame = plot(measured).frame
    assert list(frame["setting"]) == ["1", "2", "4", "8", "16", "32", "8 at 295 requests/min"]
    assert list(frame["recommended"]) == [False] * 6 + [True]
    assert list(frame["broken_by"].fillna("")) == ["", "", "", *["429 share over 1%"] * 2, "client-limited", ""]
    if "goodput_low" in frame:
        assert list(frame["goodput_low"])[1] == pytest.approx(1.8)


@pytest.mark.parametrize("plot", [plot for plot in OF_SWEEPS if plot is not plot_percentiles])
def test_nothing_measured_is_an_empty_picture(plot):
    figure = plot(Measured([], OperatingPoint(None, "unknown", "Nothing.")))
    assert figure.png().startswith(b"\x89PNG")
    assert figure.frame.empty


def test_zones_are_of_one_cause_each_and_meet_between_levels(measured):
    found = zones(measured.points, measured.bounds)
    assert [cause for *_, cause in found] == ["429 share over 1%", "client-limited"]
    assert found[0][:2] == (pytest.approx(32**0.5), pytest.approx(512**0.5))
    assert found[1][0] == found[0][1]
    assert found[1][1] > 32


def test_zones_of_the_rate_found_are_one_whatever_their_size():
    points = [point(1, 1.0), point(2, 2.0, over_rate=0.1), point(4, 4.0, over_rate=0.5)]
    assert [cause for *_, cause in zones(points, Bounds())] == ["over the rate found"]


def test_a_pace_is_written_at_its_point_and_causes_above_their_zone(measured):
    words = words_of(plot_goodput(measured))
    assert "at 295/min" in words
    assert "recommended:\n8 at 295/min" in words
    assert any("429 share over 1%" in text for text in words)
    assert any("client-limited" in text for text in words)


def test_times_are_named_at_their_lines_and_not_in_a_legend(measured):
    figure = plot_times(measured)
    words = words_of(figure)
    assert {"service p50", "service p95", "wait p50"} <= set(words)
    assert "wait p95" not in words, "it is 0 and has no place on a logarithmic scale"
    assert figure.axes[0].get_legend() is None
    assert figure.axes[0].get_yscale() == "log"


def test_a_p95_of_few_calls_is_hollow(measured):
    lines = plot_times(measured).axes[0].lines
    hollow = [line for line in lines if line.get_markerfacecolor() == "white" and line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in hollow] == [(1, 1.0)]


def test_outcomes_are_shares_in_a_fixed_order():
    outcomes = {"weird": 1, "429 tokens": 1, "ok": 6, "ok after retry": 2}
    found = plot_outcomes(Measured([point(2, 2.0, outcomes=outcomes)], OperatingPoint(2, "latency", "")))
    assert list(found.frame.columns[-4:]) == ["ok", "ok after retry", "429 tokens", "weird"]
    assert list(found.frame.iloc[0, -4:]) == [0.6, 0.2, 0.1, 0.1]
    assert {"ok", "429 tokens", "weird", "2 *"} <= set(words_of(found))


def test_the_tradeoff_names_every_setting_and_leaves_out_what_has_no_time(measured):
    measured.points.append(point(64, service_p95=None))
    figure = plot_tradeoff(measured)
    words = words_of(figure)
    assert {"1", "2", "4", "8", "16", "32", "8 at 295/min (recommended)"} <= set(words)
    assert 64 not in list(figure.frame["level"])


def test_an_open_loop_is_judged_by_its_response_time():
    found = Measured([point(2, 2.0, offered_rate=2.0, response_p95=3.0)], OperatingPoint(2, "latency", ""))
    figure = plot_tradeoff(found)
    assert figure.axes[0].get_xlabel().startswith("response time p95")
    assert figure.frame["response_p95"].tolist() == [3.0]
    assert "response p95" in words_of(plot_times(found))


def test_percentiles_are_of_the_recommended_setting_and_say_where_there_are_too_few():
    """q^n <= 0.025 (order statistics): 200 calls are enough for p97.5 and too few for p99."""
    few = point(4, 2.0)
    figure = plot_percentiles(Measured([few, point(8, 3.0)], OperatingPoint(4, "latency", "")))
    frame = figure.frame.set_index("quantile")
    assert frame.loc[0.975, "enough_calls"]
    assert not frame.loc[0.99, "enough_calls"]
    assert frame.loc[0.5, "service_seconds"] == 1.0
    assert frame.loc[0.5, "response_seconds"] == 2.0
    assert "How long calls take at 4: 200 calls" in words_of(figure)
    assert {"p50", "p90", "p99"} <= set(words_of(figure))


def test_percentiles_of_pooled_windows_are_of_the_one_with_the_most_calls():
    class Pooled(Measured):
        def judged(self):
            return [point(4, 4.0, succeeded=400)]

    found = Pooled([point(4, 1.5), point(4, 2.5, order=9)], OperatingPoint(4, "latency", ""))
    assert "How long calls take at 4: 250 calls" in words_of(plot_percentiles(found))


def test_percentiles_of_a_level_that_was_not_measured_are_refused(measured):
    assert "300 calls" in " ".join(words_of(plot_percentiles(measured, 32)))
    with pytest.raises(ConfigError, match="no times are known of level 5; they are of: 1, 2, 4, 8"):
        plot_percentiles(measured, 5)
    with pytest.raises(ConfigError, match="no call succeeded"):
        plot_percentiles(Measured([point(1)], OperatingPoint(None, "unknown", "")))


def test_before_and_after_are_relative_and_a_change_from_nothing_has_no_size():
    goodput = Change("goodput", 2.0, 3.0, 0.5, 0.4, 0.6, "better", unit="ok/s")
    errors = Change("errors $x$", 0.0, 0.1, 0.1, None, None, "undecided")
    figure = plot_before_after([goodput, errors])
    assert figure.frame["change"].tolist()[0] == 0.5
    assert figure.frame["change"].isna().tolist() == [False, True]
    words = words_of(figure)
    assert "2 → 3 ok/s  (+50%, better)" in words
    assert "0 → 0.1 " in words
    assert is_whole(figure)
    with pytest.raises(ConfigError, match="nothing to compare"):
        plot_before_after([])


def test_the_timeline_counts_and_shows_limit_refusals_and_events():
    records = recorded(
        attempt(10, 14),
        attempt(12, 16, submitted=10),
        attempt(14, 14.5, "rejected", limit_type="requests", retry_after_seconds=2.0),
        attempt(15, 15.5, "rejected"),
    )
    figure = plot_timeline(records, limit=[(10, 4), (13, 2)], events=[(13, "halved")])
    frame = figure.frame
    rows = {kind: frame[frame["kind"] == kind] for kind in set(frame["kind"])}
    assert list(zip(rows["in_flight"]["at_seconds"], rows["in_flight"]["value"], strict=True)) == [
        (0, 1), (2, 2), (4.5, 1), (5, 2), (5.5, 1), (6, 0),
    ]  # fmt: skip
    assert list(zip(rows["waiting"]["at_seconds"], rows["waiting"]["value"], strict=True)) == [(0, 1), (2, 0)]
    assert list(zip(rows["limit"]["at_seconds"], rows["limit"]["until_seconds"], strict=True)) == [(0, 3), (3, 6)]
    assert list(rows["429"]["label"]) == ["requests", "unknown"]
    assert rows["429"]["until_seconds"].iloc[0] == 6.5
    assert list(rows["event"]["at_seconds"]) == [3]
    assert {"halved", "limit", "429 requests", "429 unknown"} <= set(words_of(figure))
    assert is_whole(figure)


def test_a_timeline_without_refusals_or_records():
    assert len(plot_timeline(recorded(attempt(0, 1))).axes) == 2
    with pytest.raises(ConfigError, match="no records"):
        plot_timeline(recorded())


def test_services_stand_in_order_of_their_start_and_the_rest_is_counted():
    many = [attempt(n, n + 1.0, service=f"s{n}", stage="draft") for n in range(MAX_ROWS + 2)]
    figure = plot_gantt(recorded(*reversed(many)))
    assert list(dict.fromkeys(sorted(figure.frame["service_id"], key=lambda name: int(name[1:]))))[-1] == "s39"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["s0", "s1"]
    assert "Calls by service and stage: 40 of 42 services, 2 left out" in words_of(figure)


def test_numbered_stages_are_one_and_calls_without_a_service_are_not_drawn():
    calls = [attempt(n, n + 1.0, service="a", stage=f"features_{n}") for n in (1, 2)]
    figure = plot_gantt(recorded(*calls, attempt(0, 1.0), attempt(5, 5.1, "rejected", service="a", stage="mapping")))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["features", "mapping"]
    assert len(figure.frame) == 3
    calls = [attempt(n, n + 1.0, service="a", stage=f"mapping_{n}_data") for n in (1, 2)]
    figure = plot_gantt(recorded(*calls, attempt(3, 4.0, service="a", stage="v2")))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mapping_data", "v2"]
    with pytest.raises(ConfigError, match="service_id"):
        plot_gantt(recorded(attempt(0, 1.0)))


def test_stages_differ_without_colour():
    """Every pair of neighbours differs in its hatch or by a fifth in its lightness."""
    calls = [attempt(n, n + 1.0, service="a", stage=stage) for n, stage in enumerate(("a", "b", "c", "d", "e", "f"))]
    bars = [container[0] for container in plot_gantt(recorded(*calls)).axes[0].containers]
    looks = [(bar.get_hatch(), _lightness(bar.get_facecolor())) for bar in bars]
    for (hatch, light), (other_hatch, other_light) in itertools.pairwise(looks):
        assert hatch != other_hatch or abs(light - other_light) > 0.2


def _lightness(color):
    red, green, blue, _ = color
    return 0.3 * red + 0.59 * green + 0.11 * blue


def test_names_with_dollars_are_not_taken_for_formulas(measured):
    measured.title = "a $x^$ b"
    assert any("a $x^$ b" in text for text in words_of(plot_sweep(measured)))
    words_of(plot_gantt(recorded(attempt(0, 1.0, service="$x^$", stage="$y^$"))))
    words_of(plot_timeline(recorded(attempt(0, 1.0)), events=[(0.5, "$z^$")]))


@pytest.mark.parametrize(
    ("spans", "steps"),
    [
        ([], []),
        ([(1, 1)], []),
        ([(0, 2), (2, 3)], [(0, 1), (3, 0)]),
        ([(0, 3), (1, 2)], [(0, 1), (1, 2), (2, 1), (3, 0)]),
    ],
)
def test_steps_of_a_count(spans, steps):
    assert count_steps(spans) == steps


def test_spans_that_touch_are_one():
    assert merged([(5, 6), (0, 2), (2, 3), (1, 1.5)]) == [(0, 3), (5, 6)]


def test_labels_are_kept_apart_in_their_order():
    found = kept_apart([0.5, 0.5, 0.49, 2.0], 0.1)
    assert found == pytest.approx([0.59, 0.69, 0.49, HIGHEST_LABEL])


def test_ticks_are_powers_of_two_or_far_enough_apart():
    assert level_ticks([1, 2, 3, 4]) == [1, 2, 4]
    assert level_ticks([10, 11, 12, 20]) == [10, 12, 20]


def test_a_setting_in_few_letters():
    both = point(8, 1.0, requests_per_minute=290.0, tokens_per_minute=12000.0)
    assert [short(p.setting) for p in (point(8, 1.0), both)] == ["8", "8 at 290/min, 12000 tok/min"]
