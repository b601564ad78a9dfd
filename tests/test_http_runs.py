"""The command `llmq run` against a real HTTP provider."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from llmq.generators.services import repeated, sample_services
from llmq.testing import serve_provider

PATIENCE = 300


def llmq_command(*arguments):
    return [sys.executable, "-m", "llmq", *map(str, arguments)]


def run(*arguments, check=0, **environment):
    done = subprocess.run(
        llmq_command("run", *arguments),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "SA_RETRY_BASE_SECONDS": "0.05", **environment},
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def on(limit):
    return {"SA_LLM_QUEUE_ENABLED": "true", "SA_LLM_QUEUE_CONCURRENCY": str(limit)}


def services_file(count, path="services.jsonl"):
    found = repeated(sample_services())
    lines = [json.dumps(next(found).model_dump()) for _ in range(count)]
    Path(path).write_text("".join(line + "\n" for line in lines))
    return path


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def by_id(path):
    return {line["service_id"]: line for line in lines(path)}


def bodies(found):
    return Counter((c["stage"], c["service_id"], c["digest"]) for c in found.stats(calls=True)["calls"])


def test_flag_off_and_on_send_the_same_calls_and_write_the_same_records():
    services = services_file(5)
    seen = []
    for enabled in (False, True):
        with serve_provider(latency_seconds=0.02) as found:
            out = f"{enabled}.jsonl"
            run("--services", services, "--out", out, "--base-url", found.url, **(on(8) if enabled else {}))
            seen.append((by_id(out), bodies(found)))
            assert found.stats()["requests"] == 5 * 21
    assert seen[0] == seen[1]
    assert set(seen[0][1].values()) == {1}


def test_faults_quarantine_the_same_services_in_both():
    services = services_file(12)
    spec = {"latency_seconds": 0.01, "error_ratio": 0.02, "cut_ratio": 0.015, "malformed_ratio": 0.015, "seed": 11}
    seen = []
    for enabled in (False, True):
        with serve_provider(**spec) as found:
            out = f"{enabled}.jsonl"
            run("--services", services, "--out", out, "--base-url", found.url, check=1, **(on(8) if enabled else {}))
            seen.append((set(by_id(out)), {k: v["error_type"] for k, v in by_id(f"{out}.quarantine.jsonl").items()}))
    assert seen[0] == seen[1]
    finished, quarantined = seen[0]
    assert finished
    assert quarantined
    assert len(finished) + len(quarantined) == 12


def test_40_services_at_8_fill_the_cap_exactly_and_no_more():
    services = services_file(40)
    with serve_provider(latency_seconds=0.15) as found:
        run("--services", services, "--out", "out.jsonl", "--base-url", found.url, **on(8))
        stats = found.stats(calls=True)
    assert stats["peak_in_flight"] == 8
    calls = stats["calls"]
    work = sum(c["ended_at"] - c["started_at"] for c in calls)
    makespan = max(c["ended_at"] for c in calls) - min(c["started_at"] for c in calls)
    assert len(calls) == 840
    # 1.1 is what a quiet machine must reach (see docs/measured.md); here other work may run beside.
    assert makespan <= 1.5 * max(work / 8, 0.5)


@pytest.mark.parametrize("enabled", [False, True])
def test_mappings_overtake_a_slow_stage_only_with_the_flag_on(enabled):
    services = services_file(3)
    with serve_provider(latency_seconds=0.02, slow_stages={"features_2": 40}) as found:
        run("--services", services, "--out", "out.jsonl", "--base-url", found.url, **(on(8) if enabled else {}))
        calls = found.stats(calls=True)["calls"]
    at = {(c["service_id"], c["stage"]): c for c in calls}
    for service in {c["service_id"] for c in calls}:
        slow = at[service, "features_2"]
        overlapped = [
            name
            for name in ("applications", "technologies", "data")
            if slow["started_at"] < at[service, f"mapping_1_{name}"]["started_at"] < slow["ended_at"]
        ]
        assert bool(overlapped) is enabled


def kill_at_random(command, rng, lowest, highest):
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | on(16)
    )
    try:
        output, _ = process.communicate(timeout=rng.uniform(lowest, highest))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        return None, ""


def test_killed_at_random_and_resumed_every_service_is_there_once():
    """Six kills here; twenty over 200 services by hand, see docs/measured.md."""
    kills, count = 6, 60
    services = services_file(count)
    rng = random.Random(20)
    with serve_provider(latency_seconds=0.05, malformed_ratio=0.002) as found:
        command = llmq_command("run", "--services", services, "--out", "out.jsonl", "--base-url", found.url, "--resume")
        killed = 0
        while killed < kills:
            code, output = kill_at_random(command, rng, 1.3, 2.3)
            assert code in (None, 0, 1), output
            if code is not None:
                break
            killed += 1
        for _ in range(10):
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | on(16))
            if done.returncode == 0:
                break
        sent = bodies(found)
    ids = [line["service_id"] for line in lines("out.jsonl")]
    assert len(ids) == len(set(ids)) == count
    assert lines("out.jsonl.quarantine.jsonl") == []
    twice_at_server = sum(sent.values()) - len(sent)
    reported = int(done.stdout.split(" calls sent, ")[1].split()[0])
    assert killed >= 3
    # A call is noted just before it is sent; of each kill, the few in between may not have arrived.
    assert twice_at_server <= reported <= twice_at_server + 16 * killed


def test_interrupted_by_ctrl_c_it_says_how_to_go_on_and_leaves_valid_files():
    services = services_file(50)
    with serve_provider(latency_seconds=0.05) as found:
        command = llmq_command("run", "--services", services, "--out", "out.jsonl", "--base-url", found.url)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not Path("out.jsonl").exists() or not Path("out.jsonl").stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert "go on with --resume" in output
        assert "Traceback" not in output
        assert lines("out.jsonl")
        run("--services", services, "--out", "out.jsonl", "--base-url", found.url, "--resume")
    assert len(by_id("out.jsonl")) == 50


def test_paced_at_the_servers_own_rate_hardly_anything_is_refused():
    pace = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "pace.py"))["paced"]
    found = pace(seconds=8, requests_per_minute=1200, latency_seconds=0.3)
    assert found.requests > 120
    assert found.refused / found.requests < 0.02
    assert 0.9 < found.share_of_the_limit < 1.05
