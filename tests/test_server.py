"""The HTTP provider, and the client for any OpenAI-compatible endpoint, over loopback. Real time."""

import asyncio
import json
import urllib.error
import urllib.request
from contextlib import asynccontextmanager

import openai
import pytest

from llmq import LLMQueue, Retry, classify
from llmq.dialects import rate_limit_state
from llmq.errors import AnswerError, ConfigError
from llmq.providers.chat import ChatRequest
from llmq.providers.openai_client import OpenAICompatibleClient
from llmq.retry import Kind
from llmq.testing import serve_provider

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def ask(text="hello", **more):
    return ChatRequest("m", [{"role": "user", "content": text}], **more)


@asynccontextmanager
async def client_of(found):
    client = OpenAICompatibleClient(found.url)
    try:
        yield client
    finally:
        await client.aclose()


async def test_an_answer_with_usage_labels_and_schema():
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 7, "maximum": 7}}, "required": ["n"]}
    with serve_provider(latency_seconds=0.01) as found:
        async with client_of(found) as client:
            answer = await client.complete(ask("q", schema=schema, stage="draft", service_id="Zürich"))
        assert json.loads(answer.content) == {"n": 7}
        assert answer.prompt_tokens >= 1
        assert answer.completion_tokens >= 1
        (call,) = found.stats(calls=True)["calls"]
    assert (call["stage"], call["service_id"], call["status"], call["attempt"]) == ("draft", "Z\\xfcrich", 200, 1)


async def test_a_reader_own_sdk_client_streams_and_the_slot_lasts_as_long():
    queue = LLMQueue(1, telemetry=None)
    with serve_provider(latency_seconds=0.05) as found:
        async with openai.AsyncOpenAI(base_url=found.url, api_key="none", max_retries=0) as client:
            message = [{"role": "user", "content": "tell"}]
            plain = await client.chat.completions.create(model="m", messages=message)
            async with queue.slot():
                stream = await client.chat.completions.create(model="m", messages=message, stream=True)
                text = ""
                async for chunk in stream:
                    assert queue.statistics().in_flight == 1
                    text += chunk.choices[0].delta.content or ""
            assert [m.id async for m in client.models.list()] == ["simulated-1"]
    assert text == plain.choices[0].message.content
    assert queue.statistics().in_flight == 0


async def test_a_refusal_says_what_openai_would_say():
    with serve_provider(requests_per_minute=60, bucket_seconds=1, latency_seconds=0.01) as found:
        async with client_of(found) as client:
            await client.complete(ask("a"))
            with pytest.raises(openai.RateLimitError) as caught:
                await client.complete(ask("b"))
    verdict = classify(caught.value)
    assert (verdict.kind, verdict.limit_type, verdict.status_code) == (Kind.RATE, "requests", 429)
    assert 0 < verdict.retry_after_seconds <= 1.001
    headers = caught.value.response.headers
    assert headers["retry-after"] == "1"
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_the_sdk_own_retries_are_off():
    with serve_provider(error_ratio=1, latency_seconds=0.01) as found:
        async with client_of(found) as client:
            with pytest.raises(openai.InternalServerError):
                await client.complete(ask())
        assert found.stats()["requests"] == 1


@pytest.mark.parametrize("fault", ["cut_ratio", "error_ratio"])
async def test_faults_are_retried_by_the_queue_until_they_pass(fault):
    with serve_provider(**{fault: 0.5}, latency_seconds=0.01, seed=3) as found:
        queue = LLMQueue(4, telemetry=None)
        async with client_of(found) as client:
            answers = await asyncio.gather(
                *[
                    queue.submit(lambda n=n: client.complete(ask(f"q{n}")), retry=Retry(20, base=0.01, cap=0.02))
                    for n in range(12)
                ]
            )
        assert len({a.content for a in answers}) == 12
        assert found.stats()["requests"] == len(queue.records().attempts) > 12


async def test_a_malformed_answer_comes_through_as_it_is():
    with serve_provider(malformed_ratio=1, latency_seconds=0.01) as found:
        async with client_of(found) as client:
            answer = await client.complete(ask("q", schema={"type": "object", "properties": {"a": {"type": "string"}}}))
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.content)


async def test_a_hang_ends_with_the_request_timeout_and_the_server_notices():
    with serve_provider(timeout_ratio=1) as found:
        queue = LLMQueue(1, request_timeout=0.3, telemetry=None)
        async with client_of(found) as client:
            with pytest.raises(TimeoutError, match=r"request_timeout=0\.3"):
                await queue.submit(lambda: client.complete(ask()))
            assert queue.statistics().in_flight == 0
            for _ in range(200):
                if found.stats()["in_flight"] == 0:
                    break
                await asyncio.sleep(0.05)
        assert found.stats()["by_status"] == {"0": 1}


async def test_64_calls_at_once_are_64_at_the_server():
    with serve_provider(latency_seconds=0.5, sigma=0) as found:
        queue = LLMQueue(64, telemetry=None)
        async with client_of(found) as client:
            async with queue.map(lambda n: client.complete(ask(str(n))), range(192)) as outcomes:
                assert all([o.error is None async for o in outcomes])
        assert found.stats()["peak_in_flight"] == 64


async def test_what_is_no_request_is_told_so():
    with serve_provider() as found:
        request = urllib.request.Request(f"{found.url}/chat/completions", b"{}", {"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        with caught.value as answer:
            assert answer.code == 400
            assert "cannot read the request" in json.load(answer)["error"]["message"]


async def test_nothing_from_the_environment_goes_to_a_local_server(monkeypatch):
    planted = {
        "OPENAI_API_KEY": "sk-planted",
        "OPENAI_CUSTOM_HEADERS": "x-secret: planted",
        "OPENAI_ORG_ID": "org-planted",
        "OPENAI_PROJECT_ID": "proj-planted",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    client = OpenAICompatibleClient("http://127.0.0.1:1/v1")
    sent = []

    async def note(request, **_):
        sent.append(request)
        raise ConnectionError

    monkeypatch.setattr(client._client._client, "send", note)
    with pytest.raises(ConnectionError):
        await client.complete(ask())
    await client.aclose()
    assert sent[0].headers["authorization"] == "Bearer none-needed"
    assert "planted" not in repr(list(sent[0].headers.items()))


@pytest.mark.parametrize(
    "response_format",
    ["x", {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
     {"type": "json_schema", "json_schema": {"schema": {"type": "bogus"}}}],
)  # fmt: skip
async def test_a_schema_that_cannot_be_followed_is_the_callers_error(response_format):
    body = {"model": "m", "messages": [], "response_format": response_format}
    with serve_provider() as found:
        address, content = f"{found.url}/chat/completions", json.dumps(body).encode()
        request = urllib.request.Request(address, content, {"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        with caught.value as answer:
            assert answer.code == 400


async def test_a_stream_tells_its_usage_when_asked_and_only_then():
    with serve_provider(latency_seconds=0.01) as found:
        async with openai.AsyncOpenAI(base_url=found.url, api_key="none", max_retries=0) as client:
            for options in ({}, {"stream_options": {"include_usage": True}}):
                message = [{"role": "user", "content": "tell"}]
                stream = await client.chat.completions.create(model="m", messages=message, stream=True, **options)
                chunks = [chunk async for chunk in stream]
                assert [bool(c.usage) for c in chunks] == [False] * (len(chunks) - 1) + [bool(options)]
                assert (chunks[-1].choices == []) is bool(options)
                assert [c.choices[0].delta.role for c in chunks if c.choices].count("assistant") == 1


async def test_an_answer_without_text_is_an_error(monkeypatch):
    with serve_provider(latency_seconds=0.01) as found:
        async with client_of(found) as client:

            async def without_text(**_):
                return openai.types.chat.ChatCompletion.model_construct(choices=[], usage=None)

            monkeypatch.setattr(client._client.chat.completions, "create", without_text)
            with pytest.raises(AnswerError, match="no text"):
                await client.complete(ask())


async def test_a_key_is_needed_anywhere_but_on_loopback_and_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="environment variable MY_KEY is not set"):
        OpenAICompatibleClient("https://api.example.com/v1", api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAICompatibleClient()
    monkeypatch.setenv("MY_KEY", "sk-planted")
    remote = OpenAICompatibleClient("https://api.example.com/v1", api_key_env="MY_KEY")
    assert not remote.is_loopback
    local = OpenAICompatibleClient("http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    assert local.is_loopback
    assert local._client.api_key != "sk-planted", "a real key never goes to a local server"
    for client in (remote, local):
        await client.aclose()


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://localhost:1/v1", True),
        ("http://[::1]:1/v1", True),
        ("http://127.9.9.9/v1", True),
        ("https://localhost.example.com/v1", False),
        ("https://10.0.0.1/v1", False),
    ],
)
async def test_loopback_is_told_from_the_address(monkeypatch, url, loopback):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    client = OpenAICompatibleClient(url)
    assert client.is_loopback is loopback
    await client.aclose()


async def test_over_http_the_quirks_are_the_same():
    quirks = {"dialect": "anthropic", "window": "fixed", "limit_factors": (1, 0.5), "factor_seconds": 3600}
    with serve_provider(requests_per_minute=60, bucket_seconds=60, latency_seconds=0.001, **quirks) as found:
        async with openai.AsyncOpenAI(base_url=found.url, api_key="none", max_retries=0) as client:
            message = [{"role": "user", "content": "tell"}]
            response = await client.chat.completions.with_raw_response.create(model="m", messages=message)
    (state,) = rate_limit_state(response.headers)
    assert (state.dimension, state.limit, state.remaining) == ("requests", 60, 59)
    assert 0 < state.reset_seconds <= 60


async def test_over_http_a_lie_is_told_and_a_bare_refusal_says_nothing():
    for spec, limit_type, wait in (
        ({"dialect": "azure", "retry_after": 7}, "requests", 7),
        ({"dialect": "bare"}, "unknown", None),
        ({"dialect": "anthropic", "retry_after": "none"}, "requests", None),
    ):
        with serve_provider(requests_per_minute=1, bucket_seconds=1, latency_seconds=0.001, **spec) as found:
            async with client_of(found) as client:
                await client.complete(ask("a"))
                with pytest.raises(openai.RateLimitError) as caught:
                    await client.complete(ask("b"))
        verdict = classify(caught.value)
        assert (verdict.kind, verdict.limit_type) == (Kind.RATE, limit_type)
        told = {name: value for name, value in caught.value.response.headers.items() if name.startswith("retry")}
        assert told == ({} if wait is None else {"retry-after-ms": str(wait * 1000)})


async def test_over_http_the_server_has_a_line_of_its_own_and_refuses_at_random():
    with serve_provider(latency_seconds=0.05, sigma=0, server_slots=1, refusal_ratio=0.5) as found:
        queue = LLMQueue(8, telemetry=None)
        async with client_of(found) as client:
            await asyncio.gather(
                *[
                    queue.submit(lambda n=n: client.complete(ask(f"q{n}")), retry=Retry(30, base=0.01, cap=0.02))
                    for n in range(8)
                ]
            )
        stats = found.stats(calls=True)
    assert stats["admitted"] == 8
    assert stats["refused_by_type"] == {"random": stats["refused"]}
    assert stats["requests"] == 8 + stats["refused"] > 8
    answered = [call for call in stats["calls"] if call["status"] == 200]
    spans = max(call["ended_at"] for call in answered) - min(call["started_at"] for call in answered)
    assert spans >= 8 * 0.05 - 0.001, "one after the other; a timer may ring within the clock's resolution"
