"""A secret in a prompt, key, header, URL, answer or error text is in nothing that llmq exports, logs or writes."""

import asyncio
import contextlib
import functools
import json
import logging
import warnings
from pathlib import Path

import anyio
import httpx2
import openai
import pytest
from typer.testing import CliRunner

import llmq
from llmq import AsyncTransport, Budget, Ledger, LLMTaskMeta, Retry, Transport
from llmq.cli import app
from llmq.errors import LLMQError, ProviderError
from llmq.providers.chat import ChatAnswer
from llmq.providers.simulated import SimulatedProvider

pytestmark = pytest.mark.anyio

SECRET = "sk-planted-0123456789"
META = LLMTaskMeta("features_3", "m", "service-1", "request-1")
URL = f"https://host.example/v1/{SECRET}/chat/completions?key={SECRET}"
HEADERS = {"authorization": f"Bearer {SECRET}", "x-secret": SECRET}
BODY = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
ANSWER = {
    "id": SECRET,
    "object": "chat.completion",
    "created": 0,
    "model": "m-2026",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": SECRET}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
EVENT = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": SECRET}, "index": 0}]}


def respond(status, request):
    """Answers with the secret everywhere: in a stream where that is asked for, else in JSON, or in a refusal."""
    headers = {"x-request-id": SECRET, "set-cookie": SECRET, "retry-after": "0"}
    if status != 200:
        error = {"error": {"message": f"bad {SECRET}", "type": "requests", "param": SECRET, "code": None}}
        return httpx2.Response(status, headers=headers, json=error)
    if b'"stream":true' in request.content:
        text = f"data: {json.dumps(EVENT)}\n\ndata: [DONE]\n\n"
        return httpx2.Response(200, headers={**headers, "content-type": "text/event-stream"}, text=text)
    return httpx2.Response(200, headers=headers, json=ANSWER)


@pytest.fixture
def watched(captured, caplog):
    """A queue, and all that it tells anybody."""
    caplog.set_level(logging.DEBUG, "llmq")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        budget = Budget(tokens=1000, by="service_id")
        c = captured(2, ledger=Ledger(budgets=[budget]), max_queued=100, request_timeout=5)
        changes = c.queue.changes(10_000)

        def told():
            records = [json.dumps(vars(record), default=str) for record in caplog.records]
            summary = c.queue.ledger.summary(1.0)
            return "\n".join(
                [
                    c.exported(),
                    repr(c.queue.records()),
                    repr(c.queue.statistics()),
                    repr([change for _, change in changes._unread]),
                    c.queue.explain(),
                    *records,
                    *(str(warning.message) for warning in warned),
                    summary.to_json(),
                    summary.to_html(),
                    str(summary),
                ]
            )

        yield c, told


def check(told, *notes):
    text = told()
    for expected in ("llm_queue.submit", "request-1", "features", *notes):
        assert expected in text, "the net catches something"
    assert SECRET not in text


@contextlib.contextmanager
def refused(status, kind):
    """A call raises what holds the secret, and llmq's notes do not; with status 200 it raises nothing."""
    if status == 200:
        yield
        return
    with pytest.raises(kind, match=SECRET) as caught:
        yield
    notes = getattr(caught.value, "__notes__", [])
    assert bool(notes) == (status == 429)
    assert SECRET not in repr(notes)


@pytest.mark.parametrize("status", [200, 400, 429, 500])
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_a_transport_sees(watched, status, stream):
    c, told = watched
    transport = AsyncTransport(httpx2.MockTransport(functools.partial(respond, status)))
    async with httpx2.AsyncClient(transport=transport) as client:

        async def call():
            response = await client.post(URL, headers=HEADERS, json={**BODY, "stream": stream})
            assert SECRET in response.text
            response.raise_for_status()

        for attempt in (1, 2):
            with refused(status, httpx2.HTTPStatusError):
                await c.queue.submit(call, meta=META, retry=Retry(attempt, base=0))
            with refused(status, httpx2.HTTPStatusError):
                async with c.queue.slot(META):
                    await call()
    check(told, "host.example", f'"http.response.status_code": {status}')


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrapped_client(watched, status, stream):
    c, told = watched

    async def main():
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(functools.partial(respond, status)))
        base_url = f"https://host.example/{SECRET}/v1"
        async with openai.AsyncOpenAI(api_key=SECRET, base_url=base_url, http_client=http, max_retries=1) as client:
            llmq.wrap(client)

            async def call():
                found = await client.chat.completions.create(
                    **BODY, stream=stream, user=SECRET, extra_query={"k": SECRET}
                )
                return [chunk async for chunk in found] if stream else found

            with refused(status, openai.RateLimitError):
                assert SECRET in str(await c.queue.submit(call, meta=META))

    asyncio.run(main())
    check(told, "host.example", f'"http.response.status_code": {status}')


@pytest.mark.parametrize("status", [200, 429])
def test_submit_sync(watched, status):
    c, told = watched
    with httpx2.Client(transport=Transport(httpx2.MockTransport(functools.partial(respond, status)))) as client:

        def call(prompt):
            client.post(URL, headers=HEADERS, json={**BODY, "prompt": prompt}).raise_for_status()

        with refused(status, httpx2.HTTPStatusError):
            c.queue.submit_sync(call, SECRET, meta=META)
    check(told, "host.example")


async def test_exceptions_of_the_call_and_of_a_judge(captured, watched):
    c, told = watched

    async def leak(error):
        raise error

    def judge(error):
        raise KeyError(str(error))

    for error in (
        ValueError(SECRET),
        ProviderError(SECRET, status_code=429, headers={"retry-after": "0"}, body=SECRET),
    ):
        error.add_note(SECRET)
        with pytest.raises(type(error)):
            await c.queue.submit(functools.partial(leak, error), meta=META, retry=Retry(2, base=0))
    judged = captured(classify=judge)
    for judge_returns in (None, SECRET):
        if judge_returns:
            judged.queue._classify = lambda error: SECRET
        error = ValueError(SECRET)
        with pytest.raises(ValueError, match=SECRET):
            await judged.queue.submit(functools.partial(leak, error))
        (note,) = error.__notes__
        assert "was not judged" in note
        assert SECRET not in note
    assert SECRET not in judged.exported()
    check(told)


async def test_cancelled_and_timed_out_calls(watched):
    c, told = watched

    async def call(prompt):
        await anyio.sleep(10)

    with pytest.raises(TimeoutError):
        await c.queue.submit(functools.partial(call, SECRET), meta=META)
    with anyio.move_on_after(1):
        await c.queue.submit(functools.partial(call, SECRET), meta=META)
    c.queue.close()
    with pytest.raises(LLMQError) as caught:
        await c.queue.submit(functools.partial(call, SECRET), meta=META)
    assert SECRET not in str(caught.value)
    check(told)


class Leaking:
    """A provider that answers, refuses and breaks with the secret in it."""

    def __init__(self, spec):
        self.inner, self.calls = SimulatedProvider(spec), 0

    async def complete(self, request):
        self.calls += 1
        match self.calls % 7:
            case 0:
                raise ProviderError(f"bad {SECRET}", status_code=400, body={"message": SECRET})
            case 3:
                raise ProviderError(f"slow {SECRET}", status_code=429, headers={"retry-after": "0"}, body=SECRET)
            case 5:
                return ChatAnswer(f'{{"no": "{SECRET}"}}', 1, 1)
        return await self.inner.complete(request)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_run(enabled, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "llmq")
    monkeypatch.setattr("llmq.providers.open.SimulatedProvider", Leaking)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    service = {"service_id": "S-1", "name": "Name", "description": f"Told in prompts: {SECRET}"}
    lines = [json.dumps({**service, "service_id": f"S-{n}"}) for n in range(8)]
    Path("services.jsonl").write_text("\n".join(lines))
    settings = {
        "llm_queue_enabled": enabled,
        "simulate": {"latency_seconds": 0.001},
        "retry_base_seconds": 0,
        "llm_budgets": [{"tokens": 5000}],
    }
    Path("app.yaml").write_text(json.dumps(settings))
    done = CliRunner().invoke(
        app, ["run", "--services", "services.jsonl", "--out", "out.jsonl", "--config", "app.yaml"]
    )
    assert done.exit_code == 1, done.output
    found = {path.name: path.read_text() for path in Path().glob("out.jsonl.*")}
    assert set(found) == {
        f"out.jsonl.{end}" for end in ("quarantine.jsonl", "calls.jsonl", "report.json", "report.html")
    }
    assert "AnswerError" in found["out.jsonl.quarantine.jsonl"]
    assert "status 400" in found["out.jsonl.quarantine.jsonl"]
    told = [done.output, *found.values(), *(json.dumps(vars(record), default=str) for record in caplog.records)]
    assert not [text for text in told if SECRET in text]
