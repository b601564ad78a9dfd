"""What really leaves, seen at the client and compared with what arrived at a server over loopback. Real time."""

import asyncio
import contextvars
import gc
import gzip
import json
import logging
import random
import subprocess
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import anthropic
import httpx2
import openai
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import llmq
from llmq import LLMQueue, LLMTaskMeta, Retry, StreamCutError
from llmq.telemetry import Telemetry
from llmq.testing import serve_provider

pytestmark = pytest.mark.anyio

PATIENCE = 60
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def anyio_backend():
    return "asyncio"


def make_queue(limit=8, **options):
    return LLMQueue(limit, telemetry=None, **options)


def assert_idle(queue):
    found = queue.statistics()
    assert (found.in_flight, found.waiting, queue.open_operations) == (0, 0, 0)


async def eventually(condition):
    """For what the collector sets off; bounded, never timed."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            gc.collect()
            await asyncio.sleep(0.01)


# A server that answers as it is told.

ANSWER = {
    "id": "a",
    "object": "chat.completion",
    "created": 1,
    "model": "m-2",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}
MESSAGE = {
    "id": "a",
    "type": "message",
    "role": "assistant",
    "model": "m-2",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 4},
}
REFUSAL = {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
AT_ONCE = {"retry-after-ms": "1"}


def chunk(text=None, **more):
    finish = more.pop("finish_reason", None)
    delta = {} if text is None else {"content": text}
    choices = more.pop("choices", [{"index": 0, "delta": delta, "finish_reason": finish}])
    return {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m-2", "choices": choices, **more}


def event(data, name=None):
    data = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
OPENAI_STREAM = [
    event(chunk("one ")),
    event(chunk("two")),
    event(chunk(finish_reason="stop")),
    event(chunk(choices=[], usage=USAGE)),
    event("[DONE]"),
]
_START = {**MESSAGE, "content": [], "stop_reason": None, "usage": {"input_tokens": 3, "output_tokens": 1}}
_BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
_DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}
_STOPPED = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}}
ANTHROPIC_STREAM = [
    event(each, each["type"])
    for each in (
        {"type": "message_start", "message": _START},
        _BLOCK,
        _DELTA,
        {"type": "content_block_stop", "index": 0},
        _STOPPED,
        {"type": "message_stop"},
    )
]


class Server(ThreadingHTTPServer):
    """`answer(number, handler)` answers the number-th request, from 1. It knows what came, and what it said."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.guard = threading.Lock()
        self.headers = []
        self.statuses = Counter()
        self.in_flight = 0
        self.go_on = threading.Event()

    @property
    def requests(self):
        return len(self.headers)

    def handle_error(self, request, client_address):
        """A client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        self.rfile.read(int(self.headers["content-length"]))
        with server.guard:
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            number = len(server.headers)
            server.in_flight += 1
        try:
            server.answer(number, self)
        finally:
            with server.guard:
                server.in_flight -= 1

    def log_message(self, *args):
        pass

    def reply(self, status, body, headers=None, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.server.guard:
            self.server.statuses[status] += 1
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, pieces, *, waits_after=None, headers=None, whole=True):
        """In chunks. Waits for `go_on` after so many; not `whole`: the connection breaks instead of its end."""
        with self.server.guard:
            self.server.statuses[200] += 1
        self.send_response(200)
        more = {"content-type": "text/event-stream", "transfer-encoding": "chunked", **(headers or {})}
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        for number, piece in enumerate(pieces):
            if number == waits_after:
                self.server.go_on.wait(PATIENCE)
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
        if whole:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True


@contextmanager
def serving(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def always(*args, **kwargs):
    return lambda number, handler: handler.reply(*args, **kwargs)


def streaming(pieces, **options):
    return lambda number, handler: handler.stream(pieces, **options)


def refusing_a_fifth(number, handler):
    if random.Random(number).random() < 0.2:
        handler.reply(429, REFUSAL, AT_ONCE)
    else:
        handler.reply(200, ANSWER)


# Clients, as a reader has them.


def openai_client(url, **options):
    return openai.AsyncOpenAI(base_url=url, api_key="none", **options)


def on_transport(url, **options):
    return openai_client(url, http_client=httpx2.AsyncClient(transport=llmq.AsyncTransport()), **options)


def wrapped(url, **options):
    return llmq.wrap(openai_client(url, **options))


def wrapped_on_aiohttp(url, **options):
    return llmq.wrap(openai_client(url, http_client=openai.DefaultAioHttpClient(), **options))


def transport_on_aiohttp(url, **options):
    http_client = openai.DefaultAioHttpClient()
    http_client._transport = llmq.AsyncTransport(http_client._transport)
    return openai_client(url, http_client=http_client, **options)


def sync_wrapped(url, **options):
    return llmq.wrap(openai.OpenAI(base_url=url, api_key="none", **options))


def sync_on_transport(url, **options):
    http_client = httpx2.Client(transport=llmq.Transport())
    return openai.OpenAI(base_url=url, api_key="none", http_client=http_client, **options)


def claude(url, **options):
    return llmq.wrap(anthropic.AsyncAnthropic(base_url=url, api_key="none", **options))


ASYNC_CLIENTS = [wrapped, on_transport, wrapped_on_aiohttp, transport_on_aiohttp]
SYNC_CLIENTS = [sync_wrapped, sync_on_transport]


def ask(client, text="hello", **options):
    message = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="m", messages=message, **options)


def ask_claude(client, **options):
    return client.messages.create(model="m", max_tokens=9, messages=MESSAGES, **options)


async def many(queue, client, count=60, **options):
    """So many calls at once. Some may fail in the end."""
    calls = [queue.submit(lambda n=n: ask(client, f"q{n}"), **options) for n in range(count)]
    return await asyncio.gather(*calls, return_exceptions=True)


def assert_only_refused(results):
    assert {type(each) for each in results} <= {openai.types.chat.ChatCompletion, openai.RateLimitError}


def assert_same(queue, requests, statuses):
    """What the queue saw is what the server knows."""
    attempts = queue.records().attempts
    assert all(a.seen for a in attempts)
    assert len(attempts) == requests
    assert Counter(str(a.status_code) for a in attempts) == statuses
    assert sum(a.outcome == "rejected" for a in attempts) == statuses["429"]
    assert sum(a.limit_type == "requests" for a in attempts) == statuses["429"]
    assert_idle(queue)


RATE = {"requests_per_minute": 6000, "bucket_seconds": 0.2, "latency_seconds": 0.02}


def stats_of(found):
    stats = found.stats()
    return stats["requests"], Counter(stats["by_status"])


@pytest.mark.parametrize("make", ASYNC_CLIENTS)
async def test_every_attempt_is_counted_as_the_provider_counts(make):
    queue = make_queue(24)
    with serve_provider(**RATE) as found:
        async with make(found.url) as client:
            assert_only_refused(await many(queue, client))
        requests, statuses = stats_of(found)
    assert statuses["429"] > 0
    assert_same(queue, requests, statuses)


@pytest.mark.parametrize("make", ASYNC_CLIENTS)
async def test_a_fifth_refused_is_a_fifth_counted(make):
    queue = make_queue(12)
    with serving(refusing_a_fifth) as server:
        async with make(server.url) as client:
            assert_only_refused(await many(queue, client, 100))
        assert 0.1 < server.statuses[429] / server.requests < 0.3
        assert_same(queue, server.requests, Counter({str(k): n for k, n in server.statuses.items()}))


@pytest.mark.parametrize("make", SYNC_CLIENTS)
def test_threads_count_as_the_provider_counts(make):
    queue = make_queue(12)
    with serve_provider(**RATE) as found:
        with make(found.url) as client, ThreadPoolExecutor(24) as threads:

            def call(n):
                try:
                    return queue.submit_sync(lambda: ask(client, f"q{n}"))
                except openai.RateLimitError as error:
                    return error

            assert_only_refused(list(threads.map(call, range(60))))
        requests, statuses = stats_of(found)
    assert statuses["429"] > 0
    assert_same(queue, requests, statuses)


async def test_aiohttp_counts_as_the_provider_counts():
    queue = make_queue(24)
    with serve_provider(**RATE) as found:
        async with aiohttp.ClientSession(middlewares=[llmq.aiohttp_middleware]) as session:

            async def call(n):
                message = [{"role": "user", "content": f"q{n}"}]
                body = {"model": "m", "messages": message}
                async with session.post(f"{found.url}/chat/completions", json=body, raise_for_status=True) as answer:
                    return await answer.json()

            calls = [queue.submit(lambda n=n: call(n), retry=Retry(4, base=0.01)) for n in range(60)]
            await asyncio.gather(*calls, return_exceptions=True)
        requests, statuses = stats_of(found)
    assert statuses["429"] > 0
    assert_same(queue, requests, statuses)


@pytest.mark.parametrize("sync", [False, True])
async def test_plain_httpx2_counts_as_the_provider_counts(sync):
    queue = make_queue(24)
    with serve_provider(**RATE) as found:
        address = f"{found.url}/chat/completions"

        def body(n):
            return {"model": "m", "messages": [{"role": "user", "content": f"q{n}"}]}

        if sync:
            with httpx2.Client(transport=llmq.Transport()) as client, ThreadPoolExecutor(24) as threads:
                one = threads.map(lambda n: queue.submit_sync(lambda: client.post(address, json=body(n))), range(60))
                answers = await asyncio.to_thread(list, one)
        else:
            async with httpx2.AsyncClient(transport=llmq.AsyncTransport()) as client:
                calls = [queue.submit(lambda n=n: client.post(address, json=body(n))) for n in range(60)]
                answers = await asyncio.gather(*calls)
        requests, statuses = stats_of(found)
    assert Counter(str(a.status_code) for a in answers) == statuses
    assert statuses["429"] > 0, "a client that raises nothing"
    assert_same(queue, requests, statuses)


async def test_an_unwrapped_client_that_retries_is_told_of_once(caplog):
    queue = make_queue(12)
    with serving(refusing_a_fifth) as server:
        async with openai_client(server.url) as client:
            await many(queue, client, 60)
        assert len(queue.records().attempts) < server.requests, "its retries are not seen"
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "AsyncOpenAI (max_retries=2) retries by itself" in warning.getMessage()
    assert "llmq.wrap(client)" in warning.getMessage()
    assert "max_retries=0" in warning.getMessage()
    assert queue.hidden_retries == ("AsyncOpenAI (max_retries=2)",)


@pytest.mark.parametrize("make", [*ASYNC_CLIENTS, lambda url: openai_client(url, max_retries=0)])
async def test_a_client_that_is_seen_or_does_not_retry_is_not_told_of(make, caplog):
    queue = make_queue(12)
    with serving(refusing_a_fifth) as server:
        async with make(server.url) as client:
            await many(queue, client, 20)
    assert queue.hidden_retries == ()
    assert not caplog.records


@pytest.mark.parametrize(("make", "trusted"), [(openai_client, False), (wrapped, True), (on_transport, True)])
async def test_a_sweep_trusts_its_429_share_if_nothing_was_hidden(make, trusted):
    with serving(refusing_a_fifth) as server:
        async with make(server.url) as client:
            sweep = await llmq.sweep(
                lambda n: ask(client, f"q{n}"), range(50), [1, 2], seconds=0.3, refine=False, on_progress=lambda _: None
            )
    assert any("429 share is not to be trusted" in note for note in sweep.recommend().notes) is not trusted
    assert any(point.refused for point in sweep.points) or not trusted


# Retries handed over.


async def test_a_wrapped_client_leaves_its_retries_to_the_queue():
    queue = make_queue(1)
    with serving(always(429, REFUSAL, AT_ONCE)) as server:
        async with wrapped(server.url) as client:
            with pytest.raises(openai.RateLimitError):
                await queue.submit(lambda: ask(client))
        assert server.requests == 3, "as often as the client would have"
        assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}, "and never by itself"
    assert [(a.attempt, a.resent) for a in queue.records().attempts] == [(1, False), (2, False), (3, False)]
    assert queue.statistics().submitted == 3, "each attempt in a slot of its own"


@pytest.mark.parametrize("attempts", [1, 2, 5])
async def test_a_retry_that_is_given_wins(attempts):
    queue = make_queue(1)
    with serving(always(429, REFUSAL, AT_ONCE)) as server:
        async with wrapped(server.url) as client:
            with pytest.raises(openai.RateLimitError):
                await queue.submit(lambda: ask(client), retry=Retry(attempts, base=0.001))
        assert server.requests == attempts
        assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}


@pytest.mark.parametrize("more", [0, 1, 4])
@pytest.mark.parametrize("how", ["own", "with_options", "copy"])
async def test_as_many_retries_as_the_client_had(more, how):
    queue = make_queue(1)
    with serving(always(429, REFUSAL, AT_ONCE)) as server:
        async with wrapped(server.url, **({"max_retries": more} if how == "own" else {})) as client:
            used = client if how == "own" else getattr(client, how)(max_retries=more)
            with pytest.raises(openai.RateLimitError):
                await queue.submit(lambda: ask(used))
        assert server.requests == more + 1
        assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}


@pytest.mark.parametrize("through", ["directly", "flag_off", "slot", "submit_sync"])
async def test_elsewhere_a_wrapped_client_retries_by_itself_as_ever(through):
    counts = []
    for make in (openai.OpenAI, lambda **o: llmq.wrap(openai.OpenAI(**o))):
        queue = LLMQueue(1)
        with serving(always(429, REFUSAL, AT_ONCE)) as server:
            with make(base_url=server.url, api_key="none") as client:
                with pytest.raises(openai.RateLimitError):
                    if through == "directly":
                        ask(client)
                    elif through == "submit_sync":
                        await asyncio.to_thread(queue.submit_sync, lambda client=client: ask(client))
                    elif through == "slot":
                        async with queue.slot():
                            await asyncio.to_thread(ask, client)
                    else:

                        async def call(client=client):
                            return ask(client)

                        await llmq.submit(call)
            counts.append([h["x-stainless-retry-count"] for h in server.headers])
        if through in ("slot", "submit_sync"):
            attempts = queue.records().attempts
            assert len(attempts) == (1 if len(counts) == 1 else 3), "seen where it is wrapped"
    assert counts == [["0", "1", "2"]] * 2


async def test_a_wrapped_sync_client_in_a_thread_of_a_call_hands_over_too():
    queue = make_queue(1)
    with serving(always(429, REFUSAL, AT_ONCE)) as server:
        with sync_wrapped(server.url) as client:
            with pytest.raises(openai.RateLimitError):
                await queue.submit(lambda: asyncio.to_thread(ask, client))
        assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}
        assert server.requests == 3 == len(queue.records().attempts)


async def test_to_wrap_twice_is_to_wrap_once():
    queue = make_queue(1)
    with serving(always(429, REFUSAL, AT_ONCE)) as server:
        async with wrapped(server.url) as client:
            kind, transport = type(client), client._client._transport
            assert llmq.wrap(client) is client
            assert llmq.wrap(client.copy())._client is client._client
            assert (type(client), client._client._transport) == (kind, transport)
            assert isinstance(client, openai.AsyncOpenAI)
            assert type(client).__name__ == "AsyncOpenAI"
            with pytest.raises(openai.RateLimitError):
                await queue.submit(lambda: ask(client))
        assert server.requests == 3 == len(queue.records().attempts)


@pytest.mark.parametrize("what", [object(), None, "client", httpx2])
def test_what_cannot_be_wrapped_is_told_the_way_out(what):
    with pytest.raises(TypeError, match=r"OpenAI or Anthropic .* llmq\.AsyncTransport .* llmq\.aiohttp_middleware"):
        llmq.wrap(what)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
@pytest.mark.parametrize("how", ["plain", "stream", "stopped stream"])
async def test_a_failure_of_the_callers_own_after_a_good_request_is_not_retried(error, how):
    queue, calls = make_queue(1), []
    with serving(always(200, ANSWER) if how == "plain" else streaming(OPENAI_STREAM)) as server:
        async with wrapped(server.url) as client:

            async def call():
                answer = await ask(client, stream=how != "plain")
                calls.append(1)
                if how == "stream":
                    assert [each async for each in answer]
                elif how == "stopped stream":
                    await anext(aiter(answer))
                    await answer.close()
                raise error("my own database")

            with pytest.raises(error, match="my own"):
                await queue.submit(call)
        assert server.requests == len(calls) == 1
    assert_idle(queue)


async def test_a_wrapped_client_behind_aiohttp_hands_over():
    queue = make_queue(1)
    with serving(always(503, {"error": {"message": "later"}})) as server:
        async with wrapped_on_aiohttp(server.url, max_retries=1) as client:
            with pytest.raises(openai.InternalServerError):
                await queue.submit(lambda: ask(client))
        assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}
        assert server.requests == 2
    assert [(a.status_code, a.limit_type) for a in queue.records().attempts] == [(503, "overload")] * 2


# Anthropic.


@pytest.mark.parametrize(
    ("status", "body", "limit_type"), [(429, {"type": "rate_limit_error"}, "unknown"), (529, None, "overload")]
)
async def test_a_refusal_by_anthropic_is_retried_by_the_queue(status, body, limit_type):
    queue = make_queue(1)

    def answer(number, handler):
        error = OVERLOADED if body is None else {"type": "error", "error": {**body, "message": "slow down"}}
        handler.reply(status, error, AT_ONCE) if number < 3 else handler.reply(200, MESSAGE)

    with serving(answer) as server:
        async with claude(server.url) as client:
            found = await queue.submit(lambda: ask_claude(client))
        assert found.content[0].text == "hi"
        assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}
    *refused, last = queue.records().attempts
    assert [(a.status_code, a.limit_type, a.outcome) for a in refused] == [(status, limit_type, "rejected")] * 2
    assert (last.input_tokens, last.output_tokens, last.response_model) == (3, 4, "m-2")


def test_the_sync_client_of_anthropic_is_seen():
    queue = make_queue(1)
    with serving(lambda n, h: h.reply(529, OVERLOADED, AT_ONCE) if n == 1 else h.reply(200, MESSAGE)) as server:
        with llmq.wrap(anthropic.Anthropic(base_url=server.url, api_key="none")) as client:
            queue.submit_sync(lambda: ask_claude(client))
    assert [(a.status_code, a.outcome, a.resent) for a in queue.records().attempts] == [
        (529, "rejected", False),
        (200, "ok", True),
    ]


# Streams.


def raw_aiohttp(url):
    return aiohttp.ClientSession(middlewares=[llmq.aiohttp_middleware])


class Reader:
    """A way to ask for a stream within a call, and to read it in pieces."""

    def __init__(self, make, pieces=OPENAI_STREAM):
        self.make = make
        self.pieces = pieces

    async def open(self, client, url):
        if self.make is claude:
            return await ask_claude(client, stream=True)
        if self.make is raw_aiohttp:
            return await client.post(f"{url}/chat/completions", json={"stream": True})
        if self.make is raw_httpx2:
            request = client.build_request("POST", f"{url}/chat/completions", json={"stream": True})
            return await client.send(request, stream=True)
        return await ask(client, stream=True)

    def read(self, stream):
        if self.make is raw_aiohttp:
            return aiter(stream.content)
        if self.make is raw_httpx2:
            return stream.aiter_bytes()
        return aiter(stream)

    async def close(self, stream):
        if self.make is raw_aiohttp:
            stream.close()
        elif self.make is raw_httpx2:
            await stream.aclose()
        else:
            await stream.close()

    @asynccontextmanager
    async def half_read(self, queue, **options):
        """A stream that was returned from its call, of which a piece was read: (stream, its iterator, server)."""
        with serving(streaming(self.pieces, waits_after=2, **options)) as server:
            async with self.make(server.url) as client:
                stream = await queue.submit(lambda: self.open(client, server.url))
                pieces = self.read(stream)
                assert await anext(pieces)
                held = [stream, pieces]
                del stream, pieces
                assert (queue.statistics().in_flight, server.in_flight) == (1, 1)
                yield held, server


def raw_httpx2(url):
    return httpx2.AsyncClient(transport=llmq.AsyncTransport())


READERS = [
    Reader(wrapped),
    Reader(on_transport),
    Reader(wrapped_on_aiohttp),
    Reader(claude, ANTHROPIC_STREAM),
    Reader(raw_aiohttp),
    Reader(raw_httpx2),
]
each_reader = pytest.mark.parametrize("reader", READERS, ids=lambda r: r.make.__name__)


@each_reader
async def test_a_slot_lasts_until_the_last_byte_and_usage_is_recorded(reader):
    queue = make_queue(1)
    async with reader.half_read(queue) as (held, server):
        waiting = asyncio.create_task(queue.submit(lambda: asyncio.sleep(0)))
        await asyncio.sleep(0)
        assert (queue.statistics().in_flight, queue.statistics().waiting) == (1, 1)
        assert not queue.records().attempts
        server.go_on.set()
        async for _ in held[1]:
            pass
        await waiting
    assert_idle(queue)
    (attempt,) = [a for a in queue.records().attempts if a.seen]
    assert (attempt.outcome, attempt.status_code) == ("ok", 200)
    assert (attempt.input_tokens, attempt.output_tokens, attempt.response_model) == (3, 4, "m-2")
    assert 0 <= attempt.first_chunk_seconds <= attempt.service_seconds
    assert [o.outcome for o in queue.records().operations] == ["ok", "ok"]


GIVEN_UP = [
    pytest.param(reader, how, id=f"{reader.make.__name__}-{how}")
    for reader in READERS
    for how in ("close", "drop", "cancel")
    # aiohttp itself keeps a response that nobody reads or closes, for as long as its connection lives
    if (reader.make, how) != (raw_aiohttp, "drop")
]


@pytest.mark.parametrize(("reader", "how"), GIVEN_UP)
async def test_a_stream_that_is_given_up_gives_its_slot_back(reader, how):
    queue = make_queue(1)
    async with reader.half_read(queue) as (held, server):
        if how == "close":
            await reader.close(held[0])
        elif how == "drop":
            held.clear()
        else:

            async def read(pieces):
                async for _ in pieces:
                    pass

            task = asyncio.create_task(read(held[1]))
            await asyncio.sleep(0.01)
            assert queue.statistics().in_flight == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await eventually(lambda: queue.statistics().in_flight == 0)
        assert server.in_flight == 1, "the server was not at its end"
        assert_idle(queue)
        (attempt,) = queue.records().attempts
        (operation,) = queue.records().operations
        assert (attempt.outcome, operation.outcome) == ("cancelled", "cancelled")


async def test_a_stream_that_is_left_at_a_break_gives_its_slot_back():
    queue = make_queue(1)
    with serving(streaming(OPENAI_STREAM, waits_after=2)) as server:
        async with wrapped(server.url) as client:

            async def first():
                async for piece in await queue.submit(lambda: ask(client, stream=True)):
                    assert piece.choices[0].delta.content == "one "
                    break

            await first()
            await eventually(lambda: queue.statistics().in_flight == 0)
    assert_idle(queue)
    assert [o.outcome for o in queue.records().operations] == ["cancelled"]


@pytest.mark.parametrize("make", SYNC_CLIENTS)
@pytest.mark.parametrize("how", ["read", "close", "drop"])
def test_a_stream_of_a_sync_client_holds_its_slot_as_long(make, how):
    queue = make_queue(1)
    with serving(streaming(OPENAI_STREAM, waits_after=2)) as server:
        with make(server.url) as client:
            stream = queue.submit_sync(lambda: ask(client, stream=True))
            next(stream)
            assert (queue.statistics().in_flight, server.in_flight) == (1, 1)
            if how == "read":
                server.go_on.set()
                list(stream)
            elif how == "close":
                stream.close()
            del stream
            gc.collect()
            assert_idle(queue)
    (attempt,) = queue.records().attempts
    assert attempt.outcome == ("ok" if how == "read" else "cancelled")
    assert attempt.input_tokens == (3 if how == "read" else None)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ending", ["run", "closed"])
def test_a_stream_whose_loop_ends_gives_its_slot_back(ending):
    queue = make_queue(1)
    kept = []
    with serving(streaming(OPENAI_STREAM, waits_after=2)) as server:

        async def leave_it():
            client = wrapped(server.url)
            stream = await queue.submit(lambda: ask(client, stream=True))
            await anext(aiter(stream))
            kept.extend([client, stream])
            assert queue.statistics().in_flight == 1

        if ending == "run":
            asyncio.run(leave_it())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(leave_it())
            loop.close()

        async def another():
            return 1

        assert asyncio.run(asyncio.wait_for(queue.submit(another), PATIENCE)) == 1
        assert_idle(queue)
        kept.clear()
        gc.collect()
        assert_idle(queue)
        records = queue.records()
        assert len(records.operations) == 2 == len(records.attempts)
        assert sorted(o.outcome for o in records.operations) == ["cancelled", "ok"]


CUT = OPENAI_STREAM[:2]
BROKEN = (openai.APIConnectionError, anthropic.APIError, httpx2.TransportError, aiohttp.ClientError)


@each_reader
async def test_a_stream_that_ends_early_is_a_failure_in_a_call(reader):
    queue = make_queue(1)
    with serving(streaming(reader.pieces[:2])) as server:
        async with reader.make(server.url) as client:

            async def call():
                stream = await reader.open(client, server.url)
                return [piece async for piece in reader.read(stream)]

            with pytest.raises(StreamCutError, match="before its last event"):
                await queue.submit(call, retry=Retry(1))
            stream = await queue.submit(lambda: reader.open(client, server.url))
            with pytest.raises(StreamCutError):
                async for _ in reader.read(stream):
                    pass
            seen = await call()
            assert seen, "outside of a call it passes as it always did"
        assert server.requests == 3
    assert_idle(queue)
    assert [(a.outcome, a.error_type) for a in queue.records().attempts] == [("error", "StreamCutError")] * 2
    assert [o.outcome for o in queue.records().operations] == ["error"] * 2


async def test_a_stream_that_ends_early_is_asked_for_again():
    queue = make_queue(1)
    with serving(lambda n, h: h.stream(CUT if n == 1 else OPENAI_STREAM)) as server:
        async with wrapped(server.url) as client:

            async def call():
                return [piece async for piece in await ask(client, stream=True)]

            assert len(await queue.submit(call)) == 4
    assert [a.outcome for a in queue.records().attempts] == ["error", "ok"]


@each_reader
@pytest.mark.parametrize("inside", [True, False])
async def test_a_connection_that_breaks_within_a_stream_is_a_failure(reader, inside):
    queue = make_queue(1)
    with serving(streaming(reader.pieces[:2], whole=False)) as server:
        async with reader.make(server.url) as client:

            async def call():
                stream = await reader.open(client, server.url)
                return [piece async for piece in reader.read(stream)] if inside else stream

            with pytest.raises(
                (openai.APIConnectionError, anthropic.APIError, httpx2.TransportError, aiohttp.ClientError)
            ):
                stream = await queue.submit(call, retry=Retry(1))
                async for _ in reader.read(stream):
                    pass
    assert_idle(queue)
    assert [a.outcome for a in queue.records().attempts] == ["error"]
    assert [o.outcome for o in queue.records().operations] == ["error"]


async def test_a_simulated_provider_that_cuts_streams_is_seen_to():
    queue = make_queue(4)
    with serve_provider(cut_ratio=0.5, latency_seconds=0.02) as found:
        async with wrapped(found.url, max_retries=0) as client:

            async def call(n):
                return [piece async for piece in await ask(client, f"q{n}", stream=True)]

            results = await asyncio.gather(
                *[queue.submit(lambda n=n: call(n)) for n in range(20)], return_exceptions=True
            )
        cut = sum(isinstance(each, openai.APIConnectionError) for each in results)
        assert 0 < cut < 20
        assert found.stats()["requests"] == 20
    assert Counter(a.outcome for a in queue.records().attempts) == {"ok": 20 - cut, "error": cut}
    assert_idle(queue)


@pytest.mark.parametrize("make", ASYNC_CLIENTS)
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_answers_are_read(make, encoding):
    queue = make_queue(1)

    def packed(data):
        return gzip.compress(data) if encoding == "gzip" else zlib.compress(data)

    stream = packed(b"".join(OPENAI_STREAM))
    pieces = [stream[:20], stream[20:70], stream[70:]]
    headers = {"content-encoding": encoding}

    def answer(number, handler):
        if number == 1:
            handler.reply(200, packed(json.dumps(ANSWER).encode()), headers)
        elif number == 2:
            handler.stream(pieces, headers=headers)
        else:
            handler.reply(429, packed(json.dumps(REFUSAL).encode()), {**headers, **AT_ONCE})

    with serving(answer) as server:
        async with make(server.url, max_retries=0) as client:
            assert (await queue.submit(lambda: ask(client))).choices[0].message.content == "hi"
            stream = await queue.submit(lambda: ask(client, stream=True))
            assert len([piece async for piece in stream]) == 4
            with pytest.raises(openai.RateLimitError, match="slow down"):
                await queue.submit(lambda: ask(client))
    assert [(a.input_tokens, a.output_tokens) for a in queue.records().attempts] == [(3, 4), (3, 4), (None, None)]
    assert queue.records().attempts[-1].limit_type == "requests"
    assert_idle(queue)


async def test_compressed_answers_are_read_behind_aiohttp():
    queue = make_queue(1)
    stream = gzip.compress(b"".join(OPENAI_STREAM))
    headers = {"content-encoding": "gzip"}

    def answer(number, handler):
        if number == 1:
            handler.reply(200, gzip.compress(json.dumps(ANSWER).encode()), headers)
        else:
            handler.stream([stream[:20], stream[20:]], headers=headers)

    with serving(answer) as server:
        async with raw_aiohttp(server.url) as session:

            async def call():
                async with session.post(f"{server.url}/chat/completions", json={}) as response:
                    return await response.text()

            for _ in range(2):
                await queue.submit(call)
    assert [(a.outcome, a.input_tokens) for a in queue.records().attempts] == [("ok", 3), ("ok", 3)]


FAILING_STREAMS = [
    (wrapped, [OPENAI_STREAM[0], event(REFUSAL)], ("rejected", "requests")),
    (wrapped, [OPENAI_STREAM[0], event({"error": {"message": "x", "type": "server_error"}})], ("error", None)),
    (wrapped_on_aiohttp, [OPENAI_STREAM[0], event(REFUSAL)], ("rejected", "requests")),
    (claude, [ANTHROPIC_STREAM[0], event(OVERLOADED, "error")], ("rejected", "overload")),
    (raw_httpx2, [OPENAI_STREAM[0], event(REFUSAL)], ("rejected", "requests")),
    (raw_aiohttp, [OPENAI_STREAM[0], event(REFUSAL)], ("rejected", "requests")),
]


@pytest.mark.parametrize(("make", "pieces", "expected"), FAILING_STREAMS)
@pytest.mark.parametrize("inside", [True, False])
async def test_an_error_within_a_good_stream_is_a_failure_of_its_kind(make, pieces, expected, inside):
    queue, reader = make_queue(1), Reader(make)
    with serving(streaming(pieces)) as server:
        async with make(server.url) as client:

            async def call():
                stream = await reader.open(client, server.url)
                return [piece async for piece in reader.read(stream)] if inside else stream

            async def all_of_it():
                stream = await queue.submit(call, retry=Retry(1))
                if not inside:
                    async for _ in reader.read(stream):
                        pass

            if make in (raw_httpx2, raw_aiohttp):
                await all_of_it()  # who reads it plainly is told nothing
            else:
                with pytest.raises((openai.APIError, anthropic.APIError)):
                    await all_of_it()
    (attempt,) = queue.records().attempts
    content = inside and make in (raw_httpx2, raw_aiohttp)
    assert (attempt.outcome, attempt.limit_type) == expected
    assert queue.records().operations[0].outcome == ("ok" if content else expected[0])
    assert_idle(queue)


# Traces.


@contextmanager
def traced():
    exporter = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    queue = LLMQueue(4, telemetry=Telemetry(tracer_provider=tracers))
    yield queue, tracers.get_tracer("mine"), exporter
    tracers.shutdown()


def assert_traced(exporter, headers, root):
    """Each request carried the id of the span that was made for it, in the caller's trace."""
    attempts = [span for span in exporter.get_finished_spans() if span.kind is trace.SpanKind.CLIENT]
    assert len(attempts) == len(headers) > 0
    contexts = [span.context for span in attempts]
    expected = {f"00-{c.trace_id:032x}-{c.span_id:016x}-{c.trace_flags:02x}" for c in contexts}
    assert {h["traceparent"] for h in headers} == expected
    assert {c.trace_id for c in contexts} == {root.get_span_context().trace_id}


@pytest.mark.parametrize("make", ASYNC_CLIENTS)
async def test_the_trace_goes_on_in_the_request(make):
    with traced() as (queue, tracer, exporter), serving(refusing_a_fifth) as server:
        async with make(server.url) as client:
            with tracer.start_as_current_span("mine") as root:
                await many(queue, client, 20, meta=LLMTaskMeta(model_name="m"))
        assert server.statuses[429] > 0
        assert_traced(exporter, server.headers, root)


@pytest.mark.parametrize("through", ["to_thread", "submit_sync", "aiohttp"])
async def test_the_trace_goes_on_through_threads_and_aiohttp(through):
    with traced() as (queue, tracer, exporter), serving(always(200, ANSWER)) as server:
        with sync_wrapped(server.url) as client, tracer.start_as_current_span("mine") as root:
            if through == "to_thread":
                await queue.submit(lambda: asyncio.to_thread(ask, client))
            elif through == "aiohttp":
                async with raw_aiohttp(server.url) as session:

                    async def post():
                        async with session.post(f"{server.url}/chat/completions", json={}) as response:
                            return await response.read()

                    assert await queue.submit(post)
            else:
                found = []
                context = contextvars.copy_context()
                thread = threading.Thread(
                    target=context.run, args=(lambda: found.append(queue.submit_sync(ask, client)),)
                )
                thread.start()
                await asyncio.to_thread(thread.join)
                assert found[0].choices
        assert_traced(exporter, server.headers, root)


async def test_outside_of_a_call_a_request_is_left_as_it_is():
    with traced() as (_, tracer, _), serving(always(200, ANSWER)) as server:
        async with wrapped(server.url) as client:
            with tracer.start_as_current_span("mine"):
                await ask(client)
        assert "traceparent" not in server.headers[0]


# What it needs.


@pytest.mark.parametrize("missing", ["aiohttp", "anthropic"])
def test_wrap_works_without_what_it_does_not_need(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import llmq, openai\n"
        "client = llmq.wrap(openai.AsyncOpenAI(api_key='none'))\n"
        "print(type(client).__name__, type(client._client._transport).__module__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["AsyncOpenAI", "llmq.wire.httpx2"]


def test_a_queue_works_without_any_http_client():
    code = (
        "import sys\n"
        "for name in ('httpx2', 'aiohttp', 'openai', 'anthropic', 'httpx'): sys.modules[name] = None\n"
        "import asyncio, llmq\n"
        "print(asyncio.run(llmq.LLMQueue(1).submit(lambda: asyncio.sleep(0, 'done'))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "done"


# Several requests in one call, and calls that end before their requests.


@pytest.mark.parametrize("make", [wrapped, on_transport])
async def test_calls_of_several_requests_are_counted_as_the_provider_counts(make):
    """Some are still under way when one of them is refused, and the call ends or is tried again."""
    queue = make_queue(6)
    with serving(refusing_a_fifth) as server:
        async with make(server.url) as client:

            async def three(number):
                return await asyncio.gather(*[ask(client, f"{number} {each}") for each in range(3)])

            calls = [queue.submit(lambda number=number: three(number)) for number in range(40)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(each) for each in results} <= {list, openai.RateLimitError}
            await eventually(lambda: sum(server.statuses.values()) == server.requests)
            await eventually(lambda: len(queue.records().attempts) == server.requests)
        assert_same(queue, server.requests, Counter({str(k): n for k, n in server.statuses.items()}))


async def test_what_a_failed_attempt_left_behind_holds_nobodys_slot():
    queue = make_queue(1)

    def answer(number, handler):
        if number == 1:
            handler.server.go_on.wait(PATIENCE)
        handler.reply(429 if number == 2 else 200, REFUSAL if number == 2 else ANSWER, AT_ONCE)

    with serving(answer) as server:
        async with wrapped(server.url) as client:

            async def two():
                first = asyncio.ensure_future(ask(client, "slow"))
                while server.requests < 1:
                    await asyncio.sleep(0.001)
                await ask(client, "refused once")
                return first

            slow = await queue.submit(lambda: two() if server.requests == 0 else ask(client))
            assert slow.choices
            assert_idle(queue)
            server.go_on.set()
            await eventually(lambda: len(queue.records().attempts) == 3)


async def test_a_call_is_as_its_result_whatever_became_of_the_loser():
    queue = make_queue(1)

    def answer(number, handler):
        if number == 1:
            handler.server.go_on.wait(PATIENCE)
        handler.reply(200, ANSWER)

    with serving(answer) as server:
        async with wrapped(server.url) as client:

            async def hedged():
                slow = asyncio.ensure_future(ask(client))
                while server.requests < 1:
                    await asyncio.sleep(0.001)
                fast = await ask(client)
                slow.cancel()
                return fast

            assert (await queue.submit(hedged)).choices
            server.go_on.set()
            await eventually(lambda: queue.open_operations == 0)
    assert [o.outcome for o in queue.records().operations] == ["ok"]
    assert sorted(a.outcome for a in queue.records().attempts) == ["cancelled", "ok"]


@pytest.mark.parametrize("bound", ["of the caller", "of the queue"])
async def test_a_time_out_is_not_a_failure_of_the_request_to_be_retried(bound):
    queue = make_queue(1, request_timeout=None if bound == "of the caller" else 0.2)
    with serving(lambda number, handler: handler.server.go_on.wait(PATIENCE)) as server:
        async with wrapped(server.url) as client:
            with pytest.raises(TimeoutError):
                seconds = 0.2 if bound == "of the caller" else PATIENCE
                await queue.submit(lambda: asyncio.wait_for(ask(client), seconds))
            assert server.requests == 1
            assert_idle(queue)


@pytest.mark.parametrize("how", ["from", "group"])
async def test_a_refusal_within_an_error_of_the_callers_own_is_retried(how):
    class Own(Exception):
        pass

    queue = make_queue(2)
    with serving(
        lambda n, handler: handler.reply(429 if n == 1 else 200, REFUSAL if n == 1 else ANSWER, AT_ONCE)
    ) as server:
        async with wrapped(server.url) as client:

            async def call():
                try:
                    return await ask(client)
                except openai.APIError as error:
                    if how == "from":
                        raise Own from error
                    raise ExceptionGroup("several", [error]) from None

            assert (await queue.submit(call)).choices
            assert server.requests == 2


def test_a_complete_stream_that_is_collected_in_the_middle_of_anything_takes_no_lock():
    queue = make_queue(1)
    with serving(streaming(OPENAI_STREAM)) as server, sync_wrapped(server.url) as client:
        stream = queue.submit_sync(lambda: ask(client, stream=True))
        for piece in stream:
            if piece.choices and piece.choices[0].finish_reason:
                break
        stream.itself = stream
        del stream, piece

        def collect():
            with queue._lock:  # as a collection within the scheduler
                gc.collect()

        collecting = threading.Thread(target=collect, daemon=True)
        collecting.start()
        collecting.join(PATIENCE / 6)
        assert not collecting.is_alive(), "it waits for the lock that it interrupted"
        assert_idle(queue)


LINES = [b'{"n": 1}\n', b'{"n": 2}\n']


@pytest.mark.parametrize("status", [200, 429])
async def test_a_body_behind_the_middleware_is_read_as_without_it(status):
    queue = make_queue(1)
    body = b"".join(LINES)
    kind = "application/x-ndjson"
    with serving(always(status, body, kind=kind)) as server:
        async with aiohttp.ClientSession(middlewares=[llmq.aiohttp_middleware]) as session:

            async def lines():
                async with session.post(server.url, json={}) as response:
                    return [line async for line in response.content]

            async def pieces():
                async with session.post(server.url, json={}) as response:
                    return b"".join([piece async for piece in response.content.iter_chunked(5)])

            assert await queue.submit(lines) == LINES
            assert await queue.submit(pieces) == body
    assert [a.outcome for a in queue.records().attempts] == ["ok" if status == 200 else "rejected"] * 2
    assert_idle(queue)


async def test_lines_of_a_stream_may_end_as_they_like():
    pieces = [piece.replace(b"\n", b"\r") for piece in OPENAI_STREAM]
    queue = make_queue(1)
    with serving(streaming(pieces)) as server:
        async with httpx2.AsyncClient(transport=llmq.AsyncTransport()) as client:

            async def read():
                return (await client.post(server.url, json={})).content

            assert await queue.submit(read) == b"".join(pieces)
    assert queue.records().attempts[0].output_tokens == 4


async def test_a_refusal_that_the_call_got_over_itself_is_no_reason_to_repeat_its_own_failure():
    queue = make_queue(1)
    with serving(always(500, {})) as server:
        async with wrapped(server.url) as client:

            async def call():
                try:
                    await ask(client)
                except openai.InternalServerError:
                    pass
                raise ConnectionError("of the caller's own")

            with pytest.raises(ConnectionError):
                await queue.submit(call)
            assert server.requests == 1


async def test_an_answer_that_outlives_its_call_and_is_dropped_is_recorded():
    queue = make_queue(1)
    with serving(streaming(OPENAI_STREAM, waits_after=1)) as server:
        async with llmq.AsyncTransport() as transport:
            kept = []

            async def call():
                kept.append(await transport.handle_async_request(httpx2.Request("POST", server.url, json={})))
                raise ValueError("of the caller's own")

            with pytest.raises(ValueError, match="own"):
                await queue.submit(call)
            assert_idle(queue)
            assert not queue.records().attempts, "it is not over"
            kept.clear()
            await eventually(lambda: len(queue.records().attempts) == 1)
    assert queue.records().attempts[0].outcome == "cancelled"
