import importlib.util
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest

from llmq.errors import ConfigError
from llmq.tune.benchmarks import benchmarks_table, plot_benchmarks, read_benchmarks


def entry(name, rounds, **extra):
    return {"name": name, "group": "g", "extra_info": extra, "stats": {"min": min(rounds), "data": rounds}}


def save(path, *entries):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"benchmarks": entries}), encoding="utf-8")
    return path


def test_a_process_tells_its_fastest_round_and_how_often_the_reference_goes_into_it(tmp_path):
    save(tmp_path / "run" / "1.json", entry("a", [4.0, 2.0, 9.0], reference_seconds=[3.0, 1.0, 2.0], goodput=7.0))
    save(tmp_path / "run" / "2.json", entry("a", [6.0, 8.0, 12.0], reference_seconds=[2.0, 2.0], goodput=8.0))
    found = read_benchmarks(tmp_path / "run")["a"]
    assert found.seconds == [2.0, 6.0]
    assert found.cost == [2.0, 3.0]
    assert found.metrics == {"goodput": [7.0, 8.0]}
    assert (found.group, found.judged, found.virtual) == ("g", True, False)


def test_a_file_alone_is_a_run_of_one_process(tmp_path):
    found = read_benchmarks(save(tmp_path / "1.json", entry("a", [1.0], judged=False, virtual=True)))["a"]
    assert (found.seconds, found.cost, found.judged, found.virtual) == ([1.0], None, False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "1.json: not JSON"),
        ("[]", "1.json: no list `benchmarks`"),
        ('{"benchmarks": [{"name": "a"}]}', "1.json: benchmark 'a' cannot be used: stats: Field required"),
        (
            json.dumps({"benchmarks": [entry("a", [1.0], reference_seconds=[0.0])]}),
            "'a' cannot be used: extra_info.reference_seconds.0",
        ),
        (json.dumps({"benchmarks": [entry("a", [1.0], goodput="many")]}), "'a' cannot be used: extra_info.goodput"),
        (json.dumps({"benchmarks": [entry("a", [0.0])]}), "'a' cannot be used: stats.min: .*greater than 0"),
        (json.dumps({"benchmarks": [entry("a", [-1.0])]}), "'a' cannot be used: stats.min: .*greater than 0"),
        (json.dumps({"benchmarks": [entry("a", [float("nan")])]}), "'a' cannot be used: stats.min: .*finite"),
        (json.dumps({"benchmarks": [entry("a", [1.0], goodput=float("nan"))]}), "extra_info.goodput: .*finite"),
        (json.dumps({"benchmarks": [entry([1], [1.0])]}), "cannot be used: name: "),
        ("[" * 100_000, "1.json: not JSON: maximum recursion"),
        ('{"benchmarks": [7]}', "1.json: benchmark '7' cannot be used"),
    ],
)
def test_what_is_no_saved_run_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_benchmarks(tmp_path / "1.json")


def test_nothing_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.json: No such file"):
        read_benchmarks(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"holds no \.json file; save one with `pytest benchmarks --benchmark-json"):
        read_benchmarks(tmp_path)


TOLD = {
    "goodput": 79.5,
    "share_429": 0.25,
    "in_flight": 16.0,
    "service_p50": 0.2,
    "service_p95": 0.3,
    "wait_p50": 0.0,
    "wait_p95": 0.7,
}


def test_the_table_has_a_row_a_benchmark(tmp_path):
    file = save(
        tmp_path / "1.json", entry("closed[4]", [0.002], **TOLD), entry("bare[x]", [2e-6], reference_seconds=[1e-6])
    )
    head, *_, first, second = benchmarks_table(file).splitlines()
    assert head == str(file)
    assert first.split() == [
        "closed[4]",
        "2.00",
        "ms",
        "-",
        "79.50",
        "25.0%",
        "16.0",
        "0.200",
        "0.300",
        "0.000",
        "0.700",
    ]
    assert second.split() == ["bare[x]", "2.0", "µs", "2.00", "x", "-", "-", "-", "-", "-", "-", "-"]


def test_the_figure_shows_goodput_and_percentiles_by_benchmark(tmp_path):
    file = save(tmp_path / "1.json", entry("closed", [0.002], **TOLD), entry("bare", [2e-6]))
    goodput, times = plot_benchmarks(file).axes
    assert [bar.get_width() for bar in goodput.patches] == [79.5]
    assert [label.get_text() for label in goodput.get_yticklabels()] == ["closed"]
    assert {line.get_label(): list(line.get_xdata()) for line in times.lines} == {
        "service p50": [0.2],
        "service p95": [0.3],
        "wait p95": [0.7],
    }
    assert [text.get_text() for text in times.texts] == ["429: 25.0%"]


def test_where_none_tells_goodput_the_figure_shows_times(tmp_path):
    file = save(tmp_path / "1.json", entry("bare", [2.0], reference_seconds=[1.0]))
    figure = plot_benchmarks(file)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.0]
    assert figure.axes[0].get_xlabel() == "time of a round, x reference"
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_equal_names_of_two_modules_are_two_benchmarks(tmp_path):
    twins = [{**entry("a", [seconds]), "fullname": f"{module}.py::a"} for module, seconds in (("x", 1.0), ("y", 2.0))]
    found = read_benchmarks(save(tmp_path / "1.json", *twins, {**entry("b", [3.0]), "fullname": "x.py::b"}))
    assert {full: (each.name, each.seconds) for full, each in found.items()} == {
        "x.py::a": ("x.py::a", [1.0]),
        "y.py::a": ("y.py::a", [2.0]),
        "x.py::b": ("b", [3.0]),
    }


def test_names_are_drawn_as_they_are(tmp_path):
    file = save(tmp_path / "$\\frac{$.json", entry("$\\frac{$\x1b", [1.0]))
    assert plot_benchmarks(file)._repr_png_().startswith(b"\x89PNG")
    assert "$\\frac{$?" in benchmarks_table(file)


@pytest.fixture
def suite():
    """benchmarks/run.py, which is no module."""
    path = Path(__file__).parents[1] / "benchmarks" / "run.py"
    spec = importlib.util.spec_from_file_location("benchmarks_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_complete_runs_of_its_own_are_the_run_before(suite, tmp_path):
    for name in ("20260101T000000-abc", "20251231T000000-abc-dirty", "20260102T000000-abc.part", "my-notes"):
        save(tmp_path / name / "1.json", entry("a", [1.0]))
    (tmp_path / "20260103T000000-abc").mkdir()
    assert [path.name for path in suite.runs_before(tmp_path)] == ["20251231T000000-abc-dirty", "20260101T000000-abc"]


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_has_its_name_once_it_is_complete(suite, tmp_path, code):
    def process(command, **_):
        assert not (tmp_path / "run").exists()
        (tmp_path / "run.part" / "1.json").write_text("{}")
        return subprocess.CompletedProcess(command, code, "red", "")

    with mock.patch("subprocess.run", process), pytest.raises(SystemExit) if code else nullcontext():
        suite.run(tmp_path / "run", 1, [])
    assert (tmp_path / "run").exists() == (code == 0)


@pytest.mark.alone
def test_the_suites_pass_and_what_they_save_is_read(tmp_path):
    """Without the comparison of HTTP clients, in which nothing is ours."""
    home, saved = Path(__file__).parents[1], tmp_path / "1.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", "not test_transport", "--benchmark-quiet"]
    done = subprocess.run(
        [*command, "--benchmark-json", str(saved)], cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    goodput = read_benchmarks(saved)["benchmarks/test_throughput.py::test_virtual[4]"].metrics["goodput"]
    assert goodput == pytest.approx([20], rel=0.1), "4 calls at once of 0.2 s"


def test_a_run_of_no_process_is_refused(suite, capsys):
    with mock.patch("sys.argv", ["run.py", "--runs", "0"]), pytest.raises(SystemExit, match="2"):
        suite.main()
    assert "at least 1 is needed, got 0" in capsys.readouterr().err
