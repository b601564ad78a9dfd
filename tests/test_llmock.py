"""Against llmock, a token-bucket server that nobody here wrote and that judges how its client retries. Real time.

It lives in a process of its own (it brings an HTTP client of another generation). Its bucket holds a minute's worth, so
100 calls at 60 a minute take 40 s, whoever makes them.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter

import openai
import pytest

import llmq
from llmq import LLMQueue, LLMTaskMeta

pytestmark = pytest.mark.anyio

CALLS = 100
PER_MINUTE = 60


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Llmock:
    """The server, and what it tells."""

    def __init__(self, port):
        self.root = f"http://127.0.0.1:{port}"

    def get(self, path):
        with urllib.request.urlopen(f"{self.root}{path}", timeout=60) as answer:
            return json.load(answer)

    def verdict(self):
        return self.get("/_llmock/verdict")

    def requests(self):
        return self.get("/_llmock/requests")["requests"]


@pytest.fixture
def llmock():
    if subprocess.run([sys.executable, "-c", "import llmock"], capture_output=True).returncode:
        pytest.fail("llmock is not installed: pip install 'llmq-toolkit[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = ["serve", "--port", str(port), "--rpm", str(PER_MINUTE), "--log-level", "warning"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLMOCK_", "PYTHONPATH"))}
    command = [sys.executable, "-m", "llmock.cli", *serve]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean)
    try:
        found = Llmock(port)
        for _ in range(600):
            assert process.poll() is None, process.stderr.read()
            try:
                found.get("/health")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.communicate()


async def test_llmock_finds_nothing_wrong_with_a_hundred_calls_at_sixty_a_minute(llmock, capsys):
    assert "llmock" not in sys.modules
    queue = LLMQueue(8, telemetry=None)
    meta = LLMTaskMeta(model_name="gpt-4o")
    async with openai.AsyncOpenAI(base_url=f"{llmock.root}/v1", api_key="none", max_retries=8) as client:
        llmq.wrap(client)

        async def ask(n):
            message = [{"role": "user", "content": f"question {n}"}]
            return await client.chat.completions.create(model="gpt-4o", messages=message)

        calls = [queue.submit(lambda n=n: ask(n), meta=meta) for n in range(CALLS)]
        answers = await asyncio.gather(*calls)
    assert len(answers) == CALLS
    verdict, journal = llmock.verdict(), llmock.requests()
    assert verdict["passed"]
    assert verdict["findings"] == []
    assert verdict["calls"] == CALLS
    attempts = queue.records().attempts
    assert len(attempts) == len(journal) == verdict["attempts"]
    assert Counter(a.status_code for a in attempts) == Counter(r["status"] for r in journal)
    refused = [a for a in attempts if a.outcome == "rejected"]
    assert len(refused) == verdict["faults_injected"] > 0
    assert {a.limit_type for a in refused} == {"requests"}
    assert not any(r["sdk_retry_count"] for r in journal), "its own retries are off"
    assert Counter(o.outcome for o in queue.records().operations) == {"ok": CALLS}
    with capsys.disabled():
        print(f"\nllmock: PASS, amplification {len(journal) / CALLS:.2f} ({len(journal)} requests for {CALLS} calls)")
    assert len(journal) < 2 * CALLS
    assert "llmock" not in sys.modules
