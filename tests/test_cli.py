"""The commands, as a user types them: in a process of their own where that matters, in this one elsewhere."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import yaml
from typer.testing import CliRunner

from llmq import cli
from llmq.cli import _is_sweep, _recorded
from llmq.errors import ConfigError
from llmq.generators.services import sample_services
from llmq.testing import serve_provider

PATIENCE = 120


WIDE = {"COLUMNS": "120", "NO_COLOR": "1"}


def in_a_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "llmq", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **WIDE, **environment},
    )


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def llmq(*arguments, **environment):
    cli.out_console.width = cli.err_console.width = int(WIDE["COLUMNS"])
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], env=WIDE | environment, catch_exceptions=False)
    return Done(done.exit_code, done.stdout, done.stderr)


def services_file(count=2):
    path = Path("services.jsonl")
    path.write_text("".join(f"{json.dumps(s.model_dump())}\n" for s in sample_services()[:count]))
    return path


# Slow enough for a busy machine to keep up with: its loop lag must stay under a tenth of the latency.
SLOW = ["latency_seconds=0.2", "max_concurrency=12", "sigma=0.1"]
QUICK = ["--seconds", "1.5", "--levels", "6 12 18", *[word for s in SLOW for word in ("--simulate", s)]]


@pytest.mark.alone
@pytest.mark.parametrize("how", ["over HTTP", "virtual"])
def test_tune_ends_in_a_table_a_picture_and_the_yaml_to_paste(how):
    done = in_a_process(
        "tune", "--out", "found", *QUICK, *(["--virtual", "--calls", "300"] if how == "virtual" else [])
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<- recommended" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("llm_queue_concurrency:")]
    assert yaml.safe_load(line)["llm_queue_concurrency"] in (11, 12)
    assert Path("found/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert line in Path("found/recommendation.txt").read_text()
    points = [json.loads(line) for line in Path("found/points.jsonl").read_text().splitlines()]
    assert {p["level"] for p in points} >= {6, 12, 18}
    assert len(Path("found/points.csv").read_text().splitlines()) == len(points) + 1
    assert "recommended" in Path("found/table.txt").read_text()


@pytest.mark.alone
def test_tune_against_a_given_endpoint_and_model_with_single_calls():
    with serve_provider(latency_seconds=0.4) as found:
        done = llmq(
            "tune", "--base-url", found.url, "--model", "some-model", "--single-calls",
            "--seconds", "2.5", "--levels", "1,2", "--out", "found", "--max-calls", "40",
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        assert "stopped at the cap of 40 calls" in done.stdout
        assert set(found.stats()["stages"]) == {"ambitions"}
        ids = [c["service_id"] for c in found.stats(calls=True)["calls"]]
    assert len(set(ids)) > len(sample_services()), "items are repeated under fresh ids"
    assert found.url in Path("found/sweep.json").read_text()


@pytest.mark.alone
def test_tune_interrupted_leaves_valid_points_and_no_server_and_goes_on():
    command = [sys.executable, "-m", "llmq", "tune", "--out", "found", *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    points = Path("found/points.jsonl")
    while not points.exists() or not points.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    measured = [json.loads(line)["level"] for line in points.read_text().splitlines()]
    done = llmq(*command[3:], "--resume", "--max-calls", "600")
    assert done.returncode in (0, 1), done.stderr
    after = [json.loads(line)["level"] for line in points.read_text().splitlines()]
    assert after[: len(measured)] == measured
    assert set(after) >= {6, 12, 18}


def test_run_writes_records_and_says_what_it_did():
    done = in_a_process(
        "run", "--services", services_file(), "--out", "out.jsonl", "--simulate", "latency_seconds=0.001"
    )
    assert done.returncode == 0, done.stderr
    assert "2 services finished" in done.stdout
    assert "42 calls sent, 0 of them paid twice" in done.stdout
    assert len(Path("out.jsonl").read_text().splitlines()) == 2


def test_run_takes_catalogues_generator_and_config():
    Path("mine.yaml").write_text(
        "llm_queue_enabled: true\nllm_queue_concurrency: 2\nsimulate: {latency_seconds: 0.001}\n"
    )
    Path("mine").mkdir()
    for name in ("applications", "technologies", "information"):
        Path(f"mine/{name}.json").write_text(json.dumps({"items": [{"id": f"only-{name}", "name": name}]}))
    done = llmq(
        "run", "--services", services_file(1), "--out", "a.jsonl", "--config", "mine.yaml", "--catalogues", "mine"
    )
    assert done.returncode == 0, done.stderr
    assert "llm_queue_concurrency is 2; with the queue off 5 calls run at once" in " ".join(done.stderr.split())
    assert "only-information" in Path("a.jsonl").read_text()
    done = llmq("run", "--services", "services.jsonl", "--out", "b.jsonl", "--generator", "ambitions")
    assert json.loads(Path("b.jsonl").read_text())["ambitions"]


def test_run_says_by_its_exit_code_that_services_failed():
    done = llmq("run", "--services", services_file(), "--out", "out.jsonl", "--simulate", "malformed_ratio=1")
    assert done.returncode == 1
    assert "2 failed: out.jsonl.quarantine.jsonl (--resume tries them again)" in done.stdout


@pytest.mark.parametrize("command", ["run", "tune"])
def test_a_dry_run_calls_nothing_and_says_what_it_would(command):
    arguments = ["--services", services_file(), "--out", "out.jsonl", "--dry-run"]
    done = llmq(command, *arguments, "--base-url", "https://api.example.com/v1", "--model", "big")
    assert done.returncode == 0, done.stderr
    assert "https://api.example.com/v1" in done.stdout
    assert "OPENAI_API_KEY" in done.stdout
    assert "model big" in done.stdout
    assert not Path("out.jsonl").exists()


RUN = ["run", "--services", "services.jsonl", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--services", "missing.jsonl", "--out", "o"], "cannot read missing.jsonl"),
        (["run", "--services", "services.jsonl", "--out", "services.jsonl/o"], "cannot write to services.jsonl/o"),
        ([*RUN, "--config", "no.yaml"], "no.yaml is not there"),
        ([*RUN, "--catalogues", "nowhere"], "cannot read nowhere"),
        ([*RUN, "--simulate", "latncy_seconds=1"], "did you mean latency_seconds?"),
        ([*RUN, "--simulate", "error_ratio=2"], "--simulate error_ratio"),
        ([*RUN, "--simulate", "error_ratio"], "expected NAME=VALUE"),
        ([*RUN, "--base-url", "https://example.com/v1"], "OPENAI_API_KEY is not set"),
        ([*RUN, "--base-url", "example.com"], "must start with http"),
        (["tune", "--levels", "1 two"], "--levels takes whole numbers"),
        (["tune", "--levels", "0", "--in-process"], "each at least 1"),
        (["tune", "--base-url", "http://127.0.0.1:9/v1", "--simulate", "seed=1"], "are for the simulated one"),
        (["doctor", "--config", "no.yaml"], "no.yaml is not there"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(arguments, message):
    services_file()
    done = llmq(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_tune_against_a_provider_that_is_not_there_ends_in_a_line():
    done = in_a_process("tune", "--base-url", "http://127.0.0.1:9/v1", "--levels", "1 2", SA_RETRY_BASE_SECONDS="0.01")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "none of the first 8 calls succeeded (transient)" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_services_are_never_the_output():
    services = services_file()
    before = services.read_bytes()
    done = llmq("run", "--services", services, "--out", services, "--resume")
    assert done.returncode == 2
    assert "are the same file" in done.stderr
    assert services.read_bytes() == before


def test_doctor_shows_settings_sources_flag_and_what_looks_wrong():
    Path("config").mkdir()
    Path("config/app.yaml").write_text(
        "llm_queue_concurrency: 2\nrequest_timeout: null\nbase_url: https://example.com/v1\n"
    )
    done = llmq("doctor", SA_LLM_QUEUE_ENABLED="true", SA_CONCURENCY="9")
    assert done.returncode == 0, done.stderr
    text = " ".join(re.sub(r"[│┃]", " ", done.stdout).split())
    assert "LLM queue: on (environment SA_LLM_QUEUE_ENABLED)" in text
    assert "llm_queue_concurrency 2 config/app.yaml" in text
    assert "retry_attempts 4 default" in text
    for package in ("openai", "uvicorn", "logfire", "matplotlib"):
        assert re.search(rf"{package} \d", text)
    assert "llm_queue_concurrency is 2; with the queue off 5 calls run at once" in text
    assert "a call that hangs holds its slot for ever" in text
    assert "provider is simulated" in text
    assert "SA_CONCURENCY is in the environment and is no setting of llmq (did you mean SA_CONCURRENCY?)" in text


def test_doctor_is_content_with_the_defaults():
    assert "Nothing looks wrong." in in_a_process("doctor").stdout


def test_doctor_misses_a_key():
    Path("config").mkdir()
    Path("config/app.yaml").write_text("provider: openai\napi_key_env: MY_KEY\n")
    assert "MY_KEY is not set" in " ".join(llmq("doctor").stdout.split())


@pytest.mark.parametrize("command", [["tune"], ["run"], ["what-if"], ["doctor"], ["provider"]])
def test_help_has_an_example(command):
    done = in_a_process(*command, "--help")
    assert done.returncode == 0
    assert "Example: " in done.stdout
    assert f"llmq {command[0]}" in done.stdout


def test_help_of_the_provider_tells_every_behaviour():
    from llmq.providers.spec import ProviderSpec

    text = llmq("provider", "--help").stdout
    assert all(name in text for name in ProviderSpec.model_fields)


def test_a_port_that_is_taken_is_told():
    with serve_provider() as found:
        port = found.url.split(":")[2].split("/")[0]
        done = llmq("provider", "serve", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_the_server_listens_on_loopback_by_default():
    with serve_provider() as found:
        assert found.url.startswith("http://127.0.0.1:")


# --- a run as a trace, and what if


RECORDED = ["latency_seconds=0.1", "sigma=0.1"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The traces of a run of six services with the queue and without, and what else is in the folder."""
    folder = tmp_path_factory.mktemp("recorded")
    services = folder / "services.jsonl"
    services.write_text("".join(f"{json.dumps(s.model_dump())}\n" for s in sample_services()[:6]))
    for name, flag in (("on", "true"), ("off", "false")):
        with contextlib.chdir(folder):
            done = llmq(
                "run", "--services", services, "--out", f"{name}.jsonl", "--trace", f"{name}.trace",
                *[word for value in RECORDED for word in ("--simulate", value)],
                SA_LLM_QUEUE_ENABLED=flag, SA_LLM_QUEUE_CONCURRENCY="4", SA_CONCURRENCY="3",
            )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("flag", ["on", "off"])
def test_a_run_leaves_a_trace_without_prompts_or_names(recorded, flag):
    text = (recorded / f"{flag}.trace").read_text()
    header, *attempts = [json.loads(line) for line in text.splitlines()]
    calls = (recorded / f"{flag}.jsonl.calls.jsonl").read_text().splitlines()
    assert len(attempts) == len(calls) > 30
    assert header["level"] == 4 if flag == "on" else header["level"] >= 3
    assert all(attempt["output_tokens"] > 0 for attempt in attempts)
    for service in sample_services()[:6]:
        assert service.service_id not in text
        assert service.name not in text


@pytest.mark.parametrize("flag", ["on", "off"])
def test_what_if_says_what_is_known_and_what_is_not(recorded, flag):
    done = llmq("what-if", recorded / f"{flag}.trace", "--levels", "2 64")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "64 at once: unknown" in done.stdout
    assert "the simulation differs from it by: goodput" in done.stdout
    assert "No level can be recommended." in done.stdout


def test_what_if_under_a_given_limit_ends_in_a_report(recorded):
    trace = recorded / "on.trace"
    done = llmq("what-if", trace, "--levels", "1 4", "--requests-per-minute", 600, "--out", "found/deeper")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llm_queue_requests_per_minute:" in done.stdout
    assert "600 requests per minute" in done.stdout
    assert Path("found/deeper/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "the simulation differs from it by" in Path("found/deeper/report.html").read_text()


def test_what_if_of_no_trace_is_refused():
    Path("bad.trace").write_text('{"format": "something"}\n')
    done = llmq("what-if", "bad.trace")
    assert done.returncode == 2
    assert "bad.trace, line 1: format:" in done.stderr


@pytest.mark.parametrize(("trace", "why"), [("there.trace", "is there already"), ("nowhere/a.trace", "no folder")])
def test_a_trace_that_cannot_be_written_is_refused_before_the_first_call(trace, why):
    Path("there.trace").write_text("mine")
    done = llmq("run", "--services", services_file(), "--out", "out.jsonl", "--trace", trace)
    assert done.returncode == 2
    assert why in " ".join(done.stderr.split())
    assert not Path("out.jsonl").exists()
    assert Path("there.trace").read_text() == "mine"


# --- tune on a virtual clock, what it costs, and what is done with its answer

VIRTUAL = ["tune", "--virtual", "--single-calls", "--levels", "2 4 8", "--calls", "150", "--out", "found"]
THREE_AT_ONCE = ["--simulate", "latency_seconds=0.5", "--simulate", "max_concurrency=3"]
PAID = ["tune", "--base-url", "https://api.example.com/v1", "--model", "big"]


def said(done):
    """All that it said, on one line."""
    return " ".join(f"{done.stdout} {done.stderr}".split())


def points_of(folder):
    return [json.loads(line) for line in Path(folder, "points.jsonl").read_text().splitlines()]


def test_tune_on_a_virtual_clock_holds_its_answer_and_puts_it_into_the_settings_file():
    """Flag off, 2 services run at once: 3 at once are not slower."""
    settings = Path("mine.yaml")
    settings.write_text(
        "# ours\nllm_queue_enabled: false  # until tuned\nconcurrency: 2\nmodel: some-model  # the usual\n"
    )
    done = llmq(*VIRTUAL, *THREE_AT_ONCE, "--verify", "--apply", "--config", settings)
    assert done.returncode == 0, said(done)
    assert "llm_queue_concurrency: 3" in done.stdout
    assert "429 share under 1.0%: 0 of " in done.stdout
    assert "it keeps what it promises" in Path("found/verification.txt").read_text()
    assert Path("found/verification.txt").read_text() in done.stdout
    assert "Applied to mine.yaml: " in done.stdout
    text = settings.read_text()
    assert yaml.safe_load(text) == {
        "llm_queue_enabled": True,
        "llm_queue_concurrency": 3,
        "concurrency": 2,
        "model": "some-model",
    }
    for comment in ("# ours", "# until tuned", "# the usual"):
        assert comment in text
    assert all(p["cpu_share"] is None for p in points_of("found")), "in virtual time"


def test_tune_says_by_its_exit_code_that_its_answer_does_not_hold():
    done = llmq(*VIRTUAL, *THREE_AT_ONCE, "--verify", SA_CONCURRENCY="3", SA_RETRY_ATTEMPTS="1")
    assert done.returncode == 0, said(done)
    done = llmq(*VIRTUAL, "--simulate", "latency_seconds=0.5", "--verify", "--out", "other", SA_CONCURRENCY="32")
    assert done.returncode == 1, said(done)
    assert "[NO] as fast as with the flag off and 32 items open" in done.stdout
    assert "Recommended: 8 calls at once" in done.stdout


def test_tune_of_a_provider_that_fails_changes_no_settings_file():
    settings = Path("mine.yaml")
    settings.write_text("llm_queue_concurrency: 7\n")
    arguments = ["--simulate", "latency_seconds=0.5", "--simulate", "error_ratio=0.5"]
    done = llmq(*VIRTUAL, *arguments, "--apply", "--verify", "--config", settings, SA_RETRY_ATTEMPTS="1")
    assert done.returncode == 1, said(done)
    assert "No level can be recommended." in done.stdout
    assert "Applied" not in done.stdout
    assert settings.read_text() == "llm_queue_concurrency: 7\n"
    assert not Path("found/verification.txt").exists()


def test_each_level_gets_as_many_calls_as_are_asked_for():
    done = llmq(*VIRTUAL, *THREE_AT_ONCE)
    assert done.returncode == 0, said(done)
    asked = [p for p in points_of("found") if p["purpose"] == "level"]
    assert {p["level"] for p in asked} == {2, 4, 8}
    assert all(p["attempts"] + p["warm_up_seconds"] * p["attempt_rate"] >= 140 for p in asked)
    assert all(p["offered_rate"] is None for p in asked)


def test_arrivals_are_an_open_loop_of_single_calls():
    done = llmq(*VIRTUAL, "--simulate", "latency_seconds=0.5", "--arrivals", "3")
    assert done.returncode in (0, 1), said(done)
    points = points_of("found")
    assert {p["offered_rate"] for p in points} == {3.0}
    (eight,) = [p for p in points if p["level"] == 8 and p["purpose"] == "level"]
    assert 0.7 * 3 < eight["attempt_rate"] < 1.3 * 3


@pytest.mark.parametrize("most", [5, 60])
def test_tune_stops_at_its_cap_on_calls_and_says_so(most):
    with serve_provider(latency_seconds=0.1) as server:
        arguments = ["--base-url", server.url, "--single-calls", "--levels", "2 4", "--max-calls", most]
        done = llmq("tune", *arguments, "--seconds", "0.5", "--out", "found")
        assert server.stats()["requests"] == most
    assert done.returncode == 1, said(done)
    assert f"stopped at the cap of {most} calls" in said(done)
    assert "No level can be recommended" in done.stdout


def test_a_dry_run_guesses_what_a_sweep_will_use():
    done = llmq(*PAID, "--dry-run", "--levels", "2 4", "--seconds", "10")
    assert done.returncode == 0, said(done)
    # 2, 4 and 2 again, each for 10 s and two calls of 1 s: (2 + 4 + 2) * 12 calls in 36 s; twice that; 10 s of 4
    assert "If a call takes 1 s: up to about 328 calls, 2.0 minutes" in done.stdout
    assert "If a call takes 5 s: up to about 104 calls, 3.2 minutes" in done.stdout
    assert "at most 2, 4 at once, each for 10 s" in done.stdout
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PAID, "a paid provider is measured with a cap (--max-calls, --max-cost ...) or with --yes"),
        ([*PAID, "--max-cost", "1"], "--max-cost needs the model's price; set llm_prices"),
        ([*PAID, "--max-calls", "0"], "the cap on calls must be more than 0"),
        ([*PAID, "--virtual"], "are for the simulated one"),
        (["tune", "--virtual", "--config", "paid.yaml"], "--virtual is for the simulated provider"),
        (["tune", "--virtual", "--apply"], "config/app.yaml is not there; name one with --config"),
        (["tune", "--virtual", "--apply", "--config", "no.yaml"], "no.yaml is not there"),
        (["tune", "--virtual", "--arrivals", "3"], "arrivals are of single calls"),
        (["tune", "--virtual", "--single-calls", "--arrivals", "-3"], "arrivals (calls a second) must be more than 0"),
        (["tune", "--virtual", "--single-calls", "--slo-p95", "0"], "slo_p95 must be more than 0"),
        (["compare", "there", "nowhere"], "nowhere"),
        (["compare", "nowhere", "nothing"], "there is nothing at nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["report", "empty"], "empty"),
        (["report", "torn"], "torn/points.jsonl, line 1: not a point of a sweep"),
    ],
)
def test_what_cannot_be_tuned_compared_or_reported_is_told_in_a_line(arguments, message):
    Path("paid.yaml").write_text("provider: openai\nbase_url: https://api.example.com/v1\n")
    Path("empty").mkdir()
    for name in ("there", "torn"):
        Path(name).mkdir()
        Path(name, "points.jsonl").write_text('{"level": 1}\n')
    done = llmq(*arguments, OPENAI_API_KEY="sk-planted")
    assert done.returncode == 2, said(done)
    assert message in " ".join(done.stderr.split())
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "sk-planted" not in said(done)
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["--calls", "--max-429-ratio"])
def test_what_is_out_of_range_is_a_matter_of_the_command_line(option):
    done = llmq("tune", "--virtual", option, "-1")
    assert done.returncode == 2
    assert option in done.stderr
    assert "Traceback" not in done.stderr


# --- compare and report


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """A provider before and after it has become half as fast."""
    folder = tmp_path_factory.mktemp("sweeps")
    for name, latency in (("before", 0.5), ("after", 1.0)):
        simulate = ["--simulate", f"latency_seconds={latency}", "--simulate", "max_concurrency=3"]
        done = llmq(*VIRTUAL, *simulate, "--out", folder / name)
        assert done.returncode == 0, said(done)
    return folder


@pytest.mark.parametrize(
    ("before", "after", "code", "verdict"),
    [("before", "after", 1, "worse"), ("after", "before", 0, "better"), ("before", "before", 0, "undecided")],
)
def test_compare_of_two_sweeps_says_by_its_exit_code_what_is_worse(sweeps, before, after, code, verdict):
    done = llmq("compare", sweeps / before, sweeps / after / "points.jsonl")
    assert done.returncode == code, said(done)
    assert verdict in done.stdout.lower()


def test_compare_of_a_sweep_with_benchmarks_is_refused(sweeps):
    Path("bench.json").write_text("{}")
    for two in ((sweeps / "before", "bench.json"), ("bench.json", sweeps / "before")):
        done = llmq("compare", *two)
        assert done.returncode == 2
        assert "are not of one kind: compare two sweeps, or two benchmark runs" in said(done)


def test_report_draws_a_saved_sweep_again(sweeps):
    done = llmq("report", sweeps / "before", "--out", "again")
    assert done.returncode == 0, said(done)
    assert "Recommended: 3 calls at once" in done.stdout
    assert "<- recommended" in done.stdout
    assert Path("again/sweep.png").read_bytes().startswith(b"\x89PNG")
    for name in ("table.txt", "recommendation.txt"):
        assert Path("again", name).read_text() == Path(sweeps, "before", name).read_text()
    assert "<html" in Path("again/report.html").read_text()


@pytest.mark.parametrize("command", [["compare"], ["report"]])
def test_help_of_compare_and_report_has_an_example(command):
    done = llmq(*command, "--help")
    assert f"Example: llmq {command[0]}" in done.stdout.replace("`", "")


def test_a_trace_that_is_the_output_is_refused():
    for trace in ("out.jsonl", "out.jsonl.report.json"):
        done = llmq("run", "--services", services_file(), "--out", "out.jsonl", "--trace", trace)
        assert done.returncode == 2
        assert "what the run itself writes" in " ".join(done.stderr.split())
        assert not Path("out.jsonl").exists()


def test_a_trace_that_cannot_be_written_does_not_hide_how_the_run_ended(capsys):
    recorder = mock.Mock()
    recorder.write.side_effect = ConfigError("disk full")
    with pytest.raises(ZeroDivisionError), _recorded(recorder):
        raise ZeroDivisionError
    assert "Warning: disk full" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="disk full"), _recorded(recorder):
        pass


def test_what_is_neither_sweep_nor_benchmarks_is_told_in_clear_words(tmp_path):
    with pytest.raises(ConfigError, match="there is nothing at nowhere"):
        _is_sweep(Path("nowhere"))
    (tmp_path / "sweep.json").write_text("{}")
    for path in (tmp_path, tmp_path / "sweep.json"):
        with pytest.raises(ConfigError, match=r"holds no points.jsonl, so there is no sweep"):
            _is_sweep(path)
    (tmp_path / "points.jsonl").write_text("")
    assert _is_sweep(tmp_path)
    assert _is_sweep(tmp_path / "sweep.json")
    (tmp_path / "w").mkdir()
    assert not _is_sweep(tmp_path / "w")
    (tmp_path / "w" / "recommendation.txt").write_text("")
    with pytest.raises(ConfigError, match="its points are not saved"):
        _is_sweep(tmp_path / "w")


TWO_LEVELS = ["--virtual", "--single-calls", "--simulate", "latency_seconds=1", "--levels", "1 2", "--calls", "450"]


@pytest.mark.parametrize(("most", "why"), [(1500, "the caps leave nothing"), (2500, "stopped at the cap of")])
def test_what_cannot_be_verified_is_told_and_not_applied_and_its_results_are_kept(most, why):
    Path("app.yaml").write_text("concurrency: 5\n")
    done = llmq(
        "tune", "--config", "app.yaml", *TWO_LEVELS, "--max-calls", most, "--verify", "--apply", "--out", "found"
    )
    assert done.returncode == 1, done.stderr
    assert f"Not verified: {why}" in done.stdout
    assert "Not applied to app.yaml" in done.stdout
    assert Path("app.yaml").read_text() == "concurrency: 5\n"
    assert Path("found/report.html").exists()


def test_without_a_terminal_a_paid_provider_with_a_cap_is_measured_unasked(monkeypatch):
    """The provider is on this machine; for once it is taken for a paid one."""
    monkeypatch.setattr(cli, "_is_loopback", lambda _: False)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serve_provider(latency_seconds=0.05) as found:
        command = ["tune", "--base-url", found.url, "--model", "m", "--single-calls", "--max-calls", "60"]
        done = CliRunner().invoke(cli.app, [*command, "--levels", "2", "--seconds", "0.5", "--out", "found"])
    assert "This will use up to about" in done.output
    assert "Go on?" not in done.output
    assert "stopped at the cap of 60 calls" in done.output
