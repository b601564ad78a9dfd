"""What two sweeps, or two saved benchmark runs, are said to be to each other."""

import dataclasses
import json
import math
import random

import pytest

from llmq.errors import ConfigError
from llmq.tune.compare import Comparison, compare_benchmarks, compare_sweeps, newcombe, welch
from llmq.tune.guard import Prediction
from llmq.tune.sweep import Sweep
from tests.windows import point


def sweep(*points):
    return Sweep(list(points))


# --- formulas


def test_newcombe_as_published():
    # Newcombe 1998, table II, (a) 56/70 - 48/80: method 10 gives 0.0524 to 0.3339
    assert newcombe((48, 80), (56, 70), 1.959964) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_newcombe_of_nothing_excludes_nothing():
    assert newcombe((0, 0), (0, 0), 1.96) == (-1.0, 1.0)


def test_welch():
    # difference 2, errors 1/3 each side, 4 degrees of freedom: 2.776 * sqrt(2/3)
    low, high = welch([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], 0.05)
    assert (low, high) == pytest.approx((2 - 2.267, 2 + 2.267), abs=1e-3)
    assert welch([1.0, 1.0], [3.0, 3.0], 0.05) == (2.0, 2.0)


# --- sweeps

BASE = sweep(*(point(n, min(n, 4.0), service_p95=1.5) for n in (1, 2, 4, 8)))


def rows(comparison):
    return {row.what: row for row in comparison.rows}


def test_equal_sweeps_are_undecided():
    found = compare_sweeps(BASE, BASE)
    assert found.verdict == "undecided"
    assert {row.verdict for row in found.rows} == {"undecided"}
    assert len(found.rows) == 3 * 5


def test_more_goodput_at_the_operating_point_is_better():
    faster = sweep(point(1, 1.0), point(2, 2.0), point(4, 4.8), point(8, 4.8))
    found = compare_sweeps(BASE, faster)
    row = rows(found)["operating point 4: goodput"]
    assert (found.verdict, row.verdict) == ("better", "better")
    # ln 1.2 plus or minus z * 1 % * sqrt 2; z of 1 - 0.05 / 2 / 15 rows is 2.935
    half = 2.935 * 0.01 * math.sqrt(2)
    assert (row.low, row.high) == pytest.approx((1.2 * math.exp(-half) - 1, 1.2 * math.exp(half) - 1), abs=1e-4)
    assert rows(found)["at 2: goodput"].verdict == "undecided"
    assert compare_sweeps(faster, BASE).verdict == "worse"


def test_a_comparison_is_drawn_with_its_units_but_no_shares():
    slower = sweep(*(point(n, min(n, 4.0), service_p95=3.0) for n in (1, 2, 4, 8)))
    frame = compare_sweeps(BASE, slower).plot("then and now").frame
    assert not any("429" in name for name in frame.what)
    assert dict(zip(frame.what, frame.unit, strict=True))["at 2: goodput"] == "calls/s"
    times = frame[frame.what == "at 2: service p95"].iloc[0]
    assert (times.unit, times.before, times.after, times.change, times.verdict) == ("s", 1.5, 3.0, 1.0, "undecided")


def test_what_is_not_known_is_drawn_as_not_known():
    before, after = sweep(point(1, 0.0, succeeded=0)), sweep(point(1, 1.0))
    figure = compare_sweeps(before, after).plot()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert any(text.startswith("0 → 1") for text in texts)
    assert not any("nan" in text for text in texts)


def test_where_there_is_nothing_to_draw_it_says_why():
    with pytest.raises(ConfigError, match="print the comparison: there is no level in common"):
        Comparison((), "undecided", "there is no level in common").plot()


def test_each_sweep_is_taken_at_what_it_recommends():
    wider = sweep(point(1, 1.0), point(2, 2.0), point(4, 4.0), point(8, 8.0))
    found = compare_sweeps(BASE, wider)
    row = rows(found)["operating point 4 -> 8: goodput"]
    assert (row.before, row.after, found.verdict) == (4.0, 8.0, "better")
    assert "goodput at the operating point changed by +100.0%" in found.reason


def test_refusals_are_compared_by_their_difference():
    refusing = sweep(point(1, 1.0), point(2, 2.0), point(4, 4.0), point(8, 4.0, refused=100, refused_by="requests"))
    found = compare_sweeps(BASE, refusing)
    row = rows(found)["at 8: 429 share"]
    assert (row.change, row.relative, row.verdict) == (0.1, False, "worse")
    assert 0.06 < row.low < 0.1 < row.high < 0.14
    assert "+10.00 points" in str(found)


def test_p95_claims_nothing_without_an_interval():
    slower = sweep(*(dataclasses.replace(each, service_p95=30.0) for each in BASE.points))
    row = rows(compare_sweeps(BASE, slower))["at 1: service p95"]
    assert (row.change, row.low, row.verdict) == (19.0, None, "undecided")


def test_a_level_where_nothing_succeeded_claims_nothing():
    dead = sweep(point(1, 0.0, service_p95=None), *BASE.points[1:])
    found = rows(compare_sweeps(BASE, dead))
    assert found["at 1: goodput"].remark == "nothing succeeded"
    assert found["at 1: service p95"].remark == "too few calls"


def test_nothing_in_common():
    found = compare_sweeps(sweep(point(1, 1.0)), sweep(point(2, 0.0, succeeded=0, limited_by="client")))
    assert (found.rows, found.verdict) == ((), "undecided")


def test_a_sweep_without_a_recommendation_decides_nothing():
    found = compare_sweeps(BASE, sweep(point(4, 1.0, limited_by="client")))
    assert found.verdict == "undecided"
    assert rows(found)["at 4: goodput"].verdict == "worse"


def test_saved_sweeps_are_read(tmp_path):
    lines = [json.dumps({"sweep": "w", **dataclasses.asdict(each)}) + "\n" for each in BASE.points]
    (tmp_path / "points.jsonl").write_text("".join(lines) + '{"torn by a cra')
    assert compare_sweeps(tmp_path, tmp_path / "points.jsonl").rows == compare_sweeps(BASE, BASE).rows


def test_what_is_no_sweep_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="got int"):
        compare_sweeps(BASE, 7)
    with pytest.raises(ConfigError, match="cannot read .*none"):
        compare_sweeps(tmp_path / "none", BASE)
    (tmp_path / "points.jsonl").write_text('{"level": 1}\n')
    with pytest.raises(ConfigError, match=r"points.jsonl, line 1: not a point"):
        compare_sweeps(tmp_path, BASE)
    (tmp_path / "points.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no point"):
        compare_sweeps(tmp_path, BASE)


# --- benchmarks


def save(folder, processes, **extra):
    """A run: {benchmark: its costs by process}."""
    folder.mkdir()
    for number in range(max(map(len, processes.values()))):
        entries = [
            {
                "name": name,
                "group": None,
                "extra_info": {"reference_seconds": [1.0], **extra},
                "stats": {"min": costs[number]},
            }
            for name, costs in processes.items()
        ]
        (folder / f"{number}.json").write_text(json.dumps({"benchmarks": entries}))
    return folder


STEADY = [2.00, 2.02, 1.98, 2.01, 1.99]


def test_ten_per_cent_slower_is_worse_and_only_there(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY, "y": STEADY})
    after = save(tmp_path / "b", {"x": [1.1 * t for t in STEADY], "y": STEADY})
    found = compare_benchmarks(before, after)
    assert found.verdict == "worse"
    assert found.reason == "x: time, x reference."
    assert [(row.what, row.verdict) for row in found.rows] == [
        ("x: time, x reference", "worse"),
        ("y: time, x reference", "undecided"),
    ]
    assert found.rows[0].change == pytest.approx(0.1)
    back = compare_benchmarks(after, before)
    assert (back.verdict, back.rows[0].verdict) == ("better", "better")


def test_a_machine_that_is_slower_is_not_a_change(tmp_path):
    before, after = save(tmp_path / "a", {"x": STEADY}), save(tmp_path / "b", {"x": STEADY})
    for file in after.iterdir():
        content = json.loads(file.read_text())
        (each,) = content["benchmarks"]
        each["stats"]["min"] *= 2
        each["extra_info"]["reference_seconds"] = [2.0]
        file.write_text(json.dumps(content))
    assert compare_benchmarks(before, after).verdict == "undecided"


def test_a_change_under_the_margin_is_none(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY})
    after = save(tmp_path / "b", {"x": [1.04 * t for t in STEADY]})
    found = compare_benchmarks(before, after)
    assert (found.verdict, found.rows[0].remark) == ("undecided", "under the margin of 5%")
    assert compare_benchmarks(before, after, margin=0.03).verdict == "worse"


def test_noise_is_no_change_however_large(tmp_path):
    before = save(tmp_path / "a", {"x": [1.0, 2.0, 3.0, 1.5, 2.5]})
    after = save(tmp_path / "b", {"x": [1.4, 2.3, 3.4, 1.9, 2.6]})
    found = compare_benchmarks(before, after)
    assert found.verdict == "undecided"
    assert found.rows[0].low < 0 < found.rows[0].high


def test_too_few_processes_claim_nothing(tmp_path):
    before, after = save(tmp_path / "a", {"x": STEADY}), save(tmp_path / "b", {"x": [9.0, 9.0]})
    found = compare_benchmarks(before, after)
    assert (found.verdict, found.rows[0].low) == ("undecided", None)
    assert "5 and 2 processes, at least 3 of each are needed" in found.reason


@pytest.mark.parametrize(
    ("metric", "value", "verdict"),
    [
        ("goodput", 79.9, "worse"),
        ("goodput", 80.1, "better"),
        ("goodput", 80.00000001, "undecided"),
        ("share_429", 0.01, "worse"),
        ("share_429", 0.0, "undecided"),
        ("wait_p95", 0.9, "better"),
        ("makespan", 10.1, "worse"),
    ],
)
def test_what_is_exact_is_compared_exactly(tmp_path, metric, value, verdict):
    told = {"goodput": 80.0, "share_429": 0.0, "wait_p95": 1.0, "makespan": 10.0}
    before = save(tmp_path / "a", {"x": [2.0]}, virtual=True, **told)
    after = save(tmp_path / "b", {"x": [2.0]}, virtual=True, **{**told, metric: value})
    found = compare_benchmarks(before, after)
    assert found.verdict == verdict
    assert {row.what: row.verdict for row in found.rows if row.verdict != "undecided"} == (
        {} if verdict == "undecided" else {f"x: {metric}": verdict}
    )


def test_figures_of_real_time_are_not_taken_for_exact(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY}, goodput=80.0)
    assert compare_benchmarks(before, save(tmp_path / "b", {"x": STEADY}, goodput=70.0)).verdict == "undecided"


def test_peers_are_not_judged(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY}, judged=False)
    with pytest.raises(ConfigError, match="no benchmark in common that is judged"):
        compare_benchmarks(before, before)


def test_a_benchmark_that_is_gone_is_named(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY, "y": STEADY})
    assert "Not measured any more: y." in compare_benchmarks(before, save(tmp_path / "b", {"x": STEADY})).reason


def test_a_margin_that_cannot_be_is_refused(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY})
    with pytest.raises(ConfigError, match="margin is a share .* got 5"):
        compare_benchmarks(before, before, margin=5)


def test_the_frame_has_a_row_a_figure(tmp_path):
    before = save(tmp_path / "a", {"x": STEADY})
    frame = compare_benchmarks(before, before).frame
    assert list(frame["what"]) == ["x: time, x reference"]
    assert list(frame["change"]) == [0.0]


def test_equal_runs_are_called_unchanged_and_ten_per_cent_is_found(tmp_path):
    """By simulation: 10 benchmarks, 6 processes, 2 % from one to another; no margin, so that intervals count."""
    draw = random.Random(7)

    def run(name, factor=1.0):
        costs = {f"b{n}": [draw.gauss(2, 0.04) for _ in range(6)] for n in range(10)}
        costs["b0"] = [factor * cost for cost in costs["b0"]]
        return save(tmp_path / name, costs)

    equal = [compare_benchmarks(run(f"a{n}"), run(f"b{n}"), margin=0).verdict for n in range(100)]
    assert equal.count("undecided") >= 92  # 95 expected at least, 2.2 the standard deviation
    planted = [compare_benchmarks(run(f"c{n}"), run(f"d{n}", 1.1)).rows[0].verdict for n in range(40)]
    assert planted.count("worse") >= 36


def written(folder, about=None, **changes):
    found = {"sweep": "w", **dataclasses.asdict(BASE.points[0]), **changes}
    (folder / "points.jsonl").write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}) + "\n")
    if about is not None:
        (folder / "sweep.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"level": "1"}, "level: Input should be a valid integer"),
        ({"level": 0}, "level: at least 1"),
        ({"goodput": None}, "goodput: Input should be a valid number"),
        ({"goodput": float("nan")}, "goodput: not finite"),
        ({"attempts": -1}, "attempts: less than 0"),
        ({"outcomes": [1]}, "outcomes: "),
        ({"ok_blocks": 5}, "ok_blocks: "),
        ({"purpose": "fun"}, "purpose: "),
        ({"service_quantiles": [1.0]}, "service_quantiles: 19 are needed"),
        ({"rate": {"admitted": 1}}, "rate.tokens: Field required"),
        ({"colour": 1}, "colour: not known"),
        ({"sweep": "gone"}, "sweep: the name"),
    ],
)
def test_a_saved_point_of_a_wrong_kind_is_refused_with_line_and_key(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=rf"points.jsonl, line 1: not a point of a sweep: {said}"):
        Sweep.read(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"title": 7}, "title: "),
        ({"bounds": [1]}, "bounds: "),
        ({"bounds": {"max_429_ratio": "x"}}, "bounds.max_429_ratio: "),
        ({"present": 0}, "present: "),
        ({"predicted": {"calls": "many"}}, "predicted.calls: "),
        ({"colour": 1}, "colour: "),
        ([1], "Input should be an object"),
    ],
)
def test_what_is_told_of_a_sweep_is_checked_by_key(tmp_path, about, said):
    with pytest.raises(ConfigError, match=rf"sweep.json is not of this version: .*{said}"):
        Sweep.read(written(tmp_path, about))


def test_a_sweep_is_read_by_its_sweep_json_and_is_as_it_was_told(tmp_path):
    told = Sweep(BASE.points[:1], title="t", present=3, predicted=Prediction(5, 1.5, 7), stopped="here")
    found = Sweep.read(written(tmp_path, told.about()) / "sweep.json")
    assert (found.points, found.about()) == (told.points, told.about())
