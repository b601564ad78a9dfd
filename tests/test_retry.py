import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.core import Outcome
from llmq.errors import ProviderError, QueueTimeout, RequestTimeout
from llmq.retry import Kind, Retry, Verdict, classify, describe
from llmq.unqueued import unqueued


class SDKError(Exception):
    """Shaped like an SDK's error: status_code, response.headers, body."""

    def __init__(self, status_code, body=None, headers=None, **more):
        super().__init__("message")
        self.status_code = status_code
        self.body = body
        self.response = SimpleNamespace(headers=headers or {})
        for name, value in more.items():
            setattr(self, name, value)


class APIConnectionError(Exception):
    """Like openai's and anthropic's: no status."""


class ClientResponseError(Exception):
    """Like aiohttp's: `status` and `headers`."""

    status = 429
    headers = {"Retry-After": "7"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("error", "kind", "limit_type"),
    [
        (SDKError(429, {"code": "rate_limit_exceeded", "type": "requests"}), Kind.RATE, "requests"),
        (SDKError(429, {"code": "rate_limit_exceeded", "type": "tokens"}), Kind.RATE, "tokens"),
        (SDKError(429, {"error": {"type": "concurrency_limit"}}), Kind.RATE, "concurrency"),
        (SDKError(429), Kind.RATE, "unknown"),
        (SDKError(429, {"error": {"type": "rate_limit_error"}}), Kind.RATE, "unknown"),
        (SDKError(429, {"code": "insufficient_quota"}), Kind.QUOTA, "quota"),
        (SDKError(429, code="insufficient_quota"), Kind.QUOTA, "quota"),
        (SDKError(529, {"error": {"type": "overloaded_error"}}), Kind.OVERLOAD, "overload"),
        (SDKError(503), Kind.OVERLOAD, "overload"),
        (SDKError(500), Kind.TRANSIENT, None),
        (SDKError(504), Kind.TRANSIENT, None),
        (SDKError(408), Kind.TRANSIENT, None),
        (SDKError(400), Kind.CALLER, None),
        (SDKError(401), Kind.CALLER, None),
        (ClientResponseError(), Kind.RATE, "unknown"),
        (APIConnectionError(), Kind.TRANSIENT, None),
        (ConnectionResetError(), Kind.TRANSIENT, None),
        (TimeoutError(), Kind.TRANSIENT, None),
        (RequestTimeout(), Kind.TRANSIENT, None),
        (ProviderError("cut", connection_lost=True), Kind.TRANSIENT, None),
        (QueueTimeout(), Kind.CALLER, None),
        (FileNotFoundError(), Kind.CALLER, None),
        (ValueError(), Kind.CALLER, None),
        (KeyboardInterrupt(), Kind.CANCELLED, None),
    ],
)
def test_classify_reads_the_shape(error, kind, limit_type):
    verdict = classify(error)
    assert (verdict.kind, verdict.limit_type) == (kind, limit_type)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "60"}, 1.5),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_its_forms(headers, seconds):
    assert classify(SDKError(429, headers=headers)).retry_after_seconds == seconds


def test_retry_after_as_a_date():
    found = classify(SDKError(429, headers={"retry-after": formatdate(time.time() + 100, usegmt=True)}))
    assert 95 < found.retry_after_seconds <= 100
    past = classify(SDKError(429, headers={"retry-after": formatdate(0, usegmt=True)}))
    assert past.retry_after_seconds == 0.0


def test_only_refusals_count_against_a_limit():
    assert classify(SDKError(429)).outcome is Outcome.REJECTED
    assert classify(SDKError(529)).outcome is Outcome.REJECTED
    assert classify(SDKError(400)).outcome is Outcome.IGNORED
    assert classify(KeyboardInterrupt()).outcome is Outcome.IGNORED


def test_httpx2_keeps_its_status_on_the_response():
    import httpx2

    request = httpx2.Request("GET", "http://127.0.0.1")
    with pytest.raises(httpx2.HTTPStatusError) as caught:
        httpx2.Response(429, headers={"Retry-After": "3"}, request=request).raise_for_status()
    assert (classify(caught.value).kind, classify(caught.value).retry_after_seconds) == (Kind.RATE, 3.0)


def test_a_bad_retry_after_ms_does_not_hide_a_good_retry_after():
    assert classify(SDKError(429, headers={"retry-after-ms": "x", "RETRY-AFTER": "3"})).retry_after_seconds == 3.0


def test_what_is_said_of_a_failure_holds_no_message():
    assert describe(SDKError(429, {"type": "tokens"})) == "rate, status 429, limit on tokens"
    assert describe(ProviderError("sk-secret", status_code=401)) == "caller, status 401"
    assert describe(PermissionError(13, "Permission denied", "/secret/path")) == "Permission denied"
    assert describe(RequestTimeout("ran longer")) == "ran longer"


@given(st.integers(-1, 1000), st.none() | st.text() | st.dictionaries(st.text(), st.text() | st.integers()), st.text())
def test_classify_never_raises(status, body, header):
    assert isinstance(classify(SDKError(status, body, {"retry-after": header})), Verdict)


TRANSIENT = Verdict(Kind.TRANSIENT, 500)


def test_back_off_doubles_up_to_the_cap_with_full_jitter():
    retry = Retry(10, base=1, cap=8)
    assert [retry.delay_seconds(n, TRANSIENT, draw=1.0) for n in range(1, 7)] == [1, 2, 4, 8, 8, 8]
    assert retry.delay_seconds(3, TRANSIENT, draw=0.0) == 0
    assert 0 <= retry.delay_seconds(3, TRANSIENT) <= 4


def test_retry_after_is_a_lower_bound_with_a_little_jitter():
    verdict = Verdict(Kind.RATE, 429, "requests", retry_after_seconds=20)
    retry = Retry(4, base=0.5, cap=30)
    assert retry.delay_seconds(1, verdict, draw=0.0) == 20
    assert retry.delay_seconds(3, verdict, draw=1.0) == 20 + 2.0
    assert retry.delay_seconds(1, Verdict(Kind.RATE, 429, "requests", 0.0), draw=1.0) == pytest.approx(0.05)


def test_gives_up_after_its_attempts_or_when_nothing_can_help():
    assert Retry(3).delay_seconds(3, TRANSIENT) is None
    assert Retry(3).delay_seconds(1, Verdict(Kind.CALLER, 400)) is None
    assert Retry(3).delay_seconds(1, Verdict(Kind.QUOTA, 429, "quota", 1.0)) is None


@pytest.mark.parametrize("options", [{"attempts": 0}, {"base": -1}, {"base": 5, "cap": 1}])
def test_unusable_policies_are_refused(options):
    with pytest.raises(ValueError, match="at least 1|base <= cap"):
        Retry(**options)


@pytest.mark.anyio
async def test_unqueued_retries_and_times_out_as_the_queue_does():
    calls = []

    async def call():
        calls.append(1)
        if len(calls) < 3:
            raise ProviderError("no", status_code=500)
        return "answer"

    assert await unqueued(call, retry=Retry(3, base=1, cap=1), request_timeout=5) == "answer"
    assert len(calls) == 3

    import anyio

    async def hang():
        calls.append(1)
        await anyio.sleep(100)

    with pytest.raises(RequestTimeout):
        await unqueued(hang, retry=Retry(2, base=1, cap=1), request_timeout=5)
    assert len(calls) == 5
