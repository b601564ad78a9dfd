"""`llmq tune --verify` against llmock, a token-bucket server that nobody here wrote. Real time, some two minutes.

1,200 requests a minute, 0.2 s each: 20 a second, so that 4 slots bring 20 less transit. Its bucket holds a minute's
worth, 1,200 requests: 64 at once, 320 a second, empty it in 4 s, so the warm-up (5 s) meets the limit.

What the server counted while the answer was held: its journal has each request with status and time. Verification
empties the bucket first and ends with the flag off, both of which are refused on purpose. So the server's count is
that of as many requests in a row as verification says it measured, those with the fewest refusals: had it kept
refusals to itself, there would be no such row.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.acceptance

PER_MINUTE = 1200
PATIENCE = 300


@pytest.fixture
def llmock():
    """Its address; `tests/test_llmock.py` says why it runs in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        root = f"http://127.0.0.1:{free.getsockname()[1]}"
    serve = ["serve", "--port", root.rpartition(":")[2], "--rpm", str(PER_MINUTE), "--latency-ms", "200"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLMOCK_", "PYTHONPATH"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmock.cli", *serve, "--log-level", "warning"], stdout=subprocess.DEVNULL, env=clean
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "llmock did not start: pip install 'llmq-toolkit[test]'"
            try:
                get(f"{root}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield root
    finally:
        process.terminate()
        process.communicate()


def get(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


def tuned(llmock, out):
    command = [
        *(sys.executable, "-m", "llmq", "tune", "--base-url", f"{llmock}/v1", "--model", "gpt-4o", "--out", out),
        *("--single-calls", "--levels", "4 8 16 32 64", "--seconds", "5", "--verify"),
    ]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)


def test_tune_recommends_cap_and_pace_and_the_servers_own_count_confirms_them(llmock):
    out = "found"
    done = tuned(llmock, out)
    if "client-limited" in done.stdout:  # says nothing of the provider: measured once more
        out = "again"
        done = tuned(llmock, out)
    text = done.stdout
    swept_until = Path(out, "sweep.json").stat().st_mtime - time.time() + time.monotonic()
    pasted = "\n".join(line for line in text.splitlines() if line.startswith("llm_queue_"))
    settings = yaml.safe_load(pasted)
    assert 0.97 * 0.99 * PER_MINUTE <= settings["llm_queue_requests_per_minute"] < PER_MINUTE
    assert 4 <= settings["llm_queue_concurrency"] <= 6
    assert "limit on requests per minute binds" in text

    refused, attempts = map(int, re.search(r"429 share under 1.0%: (\d+) of (\d+) attempts refused", text).groups())
    journal = [r for r in get(f"{llmock}/_llmock/requests")["requests"] if r["started_at"] > swept_until]
    windows = [journal[at : at + attempts] for at in range(len(journal) - attempts + 1)]
    held = min(windows, key=lambda window: sum(r["status"] == 429 for r in window))
    counted = sum(r["status"] == 429 for r in held)
    assert counted <= refused
    assert counted < 0.01 * attempts
    a_minute = 60 * (attempts - 1) / (held[-1]["started_at"] - held[0]["started_at"])
    assert a_minute == pytest.approx(settings["llm_queue_requests_per_minute"], rel=0.02)
    assert {r["status"] for r in journal} <= {200, 429}

    assert done.returncode == 0, text + done.stderr
    assert "it keeps what it promises" in text
