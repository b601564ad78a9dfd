"""The commands, in a process of their own, as a user types them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llmq.generators.services import sample_services
from llmq.testing import serve_provider

PATIENCE = 120


def llmq(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "llmq", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", **environment},
    )


def services_file(count=2):
    path = Path("services.jsonl")
    path.write_text("".join(f"{json.dumps(s.model_dump())}\n" for s in sample_services()[:count]))
    return path


# Slow enough for a busy machine to keep up with: its loop lag must stay under a tenth of the latency.
SLOW = ["latency_seconds=0.4", "max_concurrency=2", "sigma=0.1"]
QUICK = ["--seconds", "1.2", "--levels", "1 2 4", *[word for s in SLOW for word in ("--simulate", s)]]


@pytest.mark.parametrize("how", ["over HTTP", "in process"])
def test_tune_ends_in_a_table_a_picture_and_the_yaml_to_paste(how):
    done = llmq("tune", "--out", "found", *QUICK, *(["--in-process"] if how == "in process" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<- recommended" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("llm_queue_concurrency:")]
    assert yaml.safe_load(line)["llm_queue_concurrency"] in (1, 2)
    assert Path("found/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert line in Path("found/recommendation.txt").read_text()
    points = [json.loads(line) for line in Path("found/points.jsonl").read_text().splitlines()]
    assert {p["level"] for p in points} >= {1, 2, 4}
    assert len(Path("found/points.csv").read_text().splitlines()) == len(points) + 1
    assert "recommended" in Path("found/table.txt").read_text()


def test_tune_against_a_given_endpoint_and_model_with_single_calls():
    with serve_provider(latency_seconds=0.4) as found:
        done = llmq(
            "tune", "--base-url", found.url, "--model", "some-model", "--single-calls",
            "--seconds", "2.5", "--levels", "1,2", "--out", "found",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert set(found.stats()["stages"]) == {"ambitions"}
        ids = [c["service_id"] for c in found.stats(calls=True)["calls"]]
    assert len(set(ids)) > len(sample_services()), "items are repeated under fresh ids"
    assert found.url in Path("found/points.jsonl").read_text()


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
    done = llmq(*command[3:], "--resume")
    assert done.returncode == 0, done.stderr
    after = [json.loads(line)["level"] for line in points.read_text().splitlines()]
    assert after[: len(measured)] == measured
    assert set(after) >= {1, 2, 4}


def test_run_writes_records_and_says_what_it_did():
    done = llmq("run", "--services", services_file(), "--out", "out.jsonl", "--simulate", "latency_seconds=0.001")
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
    done = llmq("tune", "--base-url", "http://127.0.0.1:9/v1", "--levels", "1 2", SA_RETRY_BASE_SECONDS="0.01")
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
    assert "Nothing looks wrong." in llmq("doctor").stdout


def test_doctor_misses_a_key():
    Path("config").mkdir()
    Path("config/app.yaml").write_text("provider: openai\napi_key_env: MY_KEY\n")
    assert "MY_KEY is not set" in " ".join(llmq("doctor").stdout.split())


@pytest.mark.parametrize("command", [["tune"], ["run"], ["doctor"], ["provider"]])
def test_help_has_an_example(command):
    done = llmq(*command, "--help")
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
