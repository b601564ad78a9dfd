"""Answers as providers send them (shortened; ids are made up), and what llmq makes of them."""

import json
from email.utils import formatdate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmq.dialects import (
    Kind,
    RateLimitState,
    Usage,
    Verdict,
    is_known_event,
    is_last_event,
    judge_response,
    rate_limit_state,
    usage_of,
)
from llmq.retry import classify, describe

NOW = 1_711_483_199.0  # 2024-03-26T19:59:59Z


def openai(message, kind=None, code=None):
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic(kind, message, **more):
    return {"type": "error", "error": {"type": kind, "message": message, **more}, "request_id": "req_011C"}


def gemini(code, status, message="Resource has been exhausted (e.g. check quota).", *details):
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def violations(*quotas):
    found = [{"quotaMetric": f"generativelanguage.googleapis.com/{metric}", "quotaId": name} for metric, name in quotas]
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": found}


def retry_info(delay):
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


ON_TPM = "Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Used 29937, "
OPENAI = [
    (429, {}, openai(ON_TPM + "Requested 385. Please try again in 644ms.", "tokens", "rate_limit_exceeded"),
     Kind.RATE, "tokens", 0.644),
    (429, {"retry-after": "1"}, openai(ON_TPM + "Requested 5. Please try again in 9s.", "tokens"),
     Kind.RATE, "tokens", 1.0),
    (429, {}, openai("Rate limit reached for m on requests per day (RPD): Limit 200, Used 200, Requested 1. "
                     "Please try again in 7m12s.", "requests", "rate_limit_exceeded"), Kind.RATE, "requests", 432.0),
    (429, {}, openai("Rate limit reached for 10KTPM-200RPM in organization org-x on tokens per min. Limit: 10000 / "
                     "min. Please try again in 6ms."), Kind.RATE, "tokens", 0.006),
    (429, {}, openai("Rate limit reached for requests"), Kind.RATE, "requests", None),
    (429, {}, openai("Rate limit reached for m on images per min: Limit 5", None, "rate_limit_exceeded"),
     Kind.RATE, "unknown", None),
    (429, {}, openai("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 30601.", "tokens",
                     "rate_limit_exceeded"), Kind.CALLER, None, None),
    (429, {}, openai("You exceeded your current quota, please check your plan and billing details.",
                     "insufficient_quota", "insufficient_quota"), Kind.QUOTA, "quota", None),
    (429, {}, openai("No credits.", None, "credit_balance_exhausted"), Kind.QUOTA, "quota", None),
    (429, {}, openai("Limit.", None, "project_spend_limit_exceeded"), Kind.QUOTA, "quota", None),
    (429, {}, openai("Limit.", None, "organization_usage_limit_exceeded"), Kind.QUOTA, "quota", None),
    (429, {"retry-after": "3"}, openai("Slow down.", "rate_limit_error", "slow_down"), Kind.RATE, "unknown", 3.0),
    (503, {}, openai("Slow down.", "service_unavailable_error", "slow_down"), Kind.OVERLOAD, "overload", None),
    (429, {}, openai("That model is currently overloaded with other requests.", "server_error"),
     Kind.OVERLOAD, "overload", None),
    (500, {}, openai("The server had an error while processing your request.", "server_error"),
     Kind.TRANSIENT, None, None),
    (400, {}, openai("Our servers are busy.", "service_unavailable_error", "server_is_overloaded"),
     Kind.OVERLOAD, "overload", None),
    (400, {}, openai("This model's maximum context length is 8192 tokens.", "invalid_request_error",
                     "context_length_exceeded"), Kind.CALLER, None, None),
    (400, {}, openai("Invalid value: 'overloaded; your credit balance is too low'", "invalid_request_error"),
     Kind.CALLER, None, None),
    (401, {}, openai("Incorrect API key provided", "invalid_request_error", "invalid_api_key"),
     Kind.CALLER, None, None),
    (429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s",
           "x-ratelimit-remaining-tokens": "149984", "x-ratelimit-reset-tokens": "8ms"}, None,
     Kind.RATE, "requests", 360.0),
    (429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s",
           "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, None, Kind.RATE, "unknown", 1.0),
    (429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s",
           "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, openai("", "tokens"),
     Kind.RATE, "tokens", 0.02),
    (429, {"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "59s"}, openai("", "tokens"),
     Kind.RATE, "tokens", None),
    (200, {}, openai("Slow down.", "service_unavailable_error", "slow_down"), Kind.OVERLOAD, "overload", None),
    (200, {}, openai("Sorry.", "server_error"), Kind.TRANSIENT, None, None),
    (200, {}, openai("Sorry.", "invalid_request_error"), Kind.CALLER, None, None),
]  # fmt: skip

AZURE_OLD = "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21 have exceeded "
AZURE = [
    (429, {}, openai(AZURE_OLD + "token rate limit of your current AIServices S0 pricing tier. Please retry after "
                     "86400 seconds.", None, "429"), Kind.RATE, "tokens", 86400.0),
    (429, {"retry-after-ms": "2500", "Retry-After": "3"},
     openai(AZURE_OLD + "call rate limit of your current OpenAI S0 pricing tier.", None, "RateLimitReached"),
     Kind.RATE, "requests", 2.5),
    (429, {}, openai("Your requests to gpt-4.1-nano in Sweden Central have exceeded the token rate limit for your "
                     "tier. Please retry after 45 seconds.", "too_many_requests", "too_many_requests"),
     Kind.RATE, "tokens", 45.0),
    (429, {}, {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 4 seconds."},
     Kind.RATE, "unknown", 4.0),
    (429, {}, openai("Too many.", "too_many_requests", "too_many_requests"), Kind.RATE, "unknown", None),
    (429, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "17",
           "x-ratelimit-remaining-requests": "3"}, openai("Rate limit is exceeded.", None, "429"),
     Kind.RATE, "tokens", 17.0),
    (429, {"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"},
     openai("Rate limit is exceeded.", None, "429"), Kind.RATE, "unknown", None),
    (429, {}, openai("The system is currently experiencing high demand and cannot process your request. Please retry "
                     "after 20 seconds.", None, "429"), Kind.OVERLOAD, "overload", 20.0),
    (408, {}, openai("The operation was timeout.", None, "Timeout"), Kind.TRANSIENT, None, None),
]  # fmt: skip

WOULD_EXCEED = (
    "This request would exceed the rate limit for your organization (0dcc) of {} per minute. You can see the "
)
WOULD_EXCEED += "response headers for current usage. Please reduce the prompt length or the maximum tokens requested."
ANTHROPIC = [
    (429, {"retry-after": "16"}, anthropic("rate_limit_error", WOULD_EXCEED.format("30,000 input tokens")),
     Kind.RATE, "tokens", 16.0),
    (429, {}, anthropic("rate_limit_error", WOULD_EXCEED.format("8,000 output tokens")), Kind.RATE, "tokens", None),
    (429, {}, anthropic("rate_limit_error", WOULD_EXCEED.format("50 requests")), Kind.RATE, "requests", None),
    (429, {}, anthropic("rate_limit_error", "Number of concurrent connections has exceeded your rate limit. Please "
                        "try again later or contact sales."), Kind.RATE, "concurrency", None),
    (429, {}, openai(WOULD_EXCEED.format("20,000 input tokens"), "invalid_request_error", "rate_limit_error"),
     Kind.RATE, "tokens", None),
    (429, {"anthropic-ratelimit-input-tokens-remaining": "0",
           "anthropic-ratelimit-input-tokens-reset": "2024-03-26T20:01:02Z",
           "anthropic-ratelimit-output-tokens-remaining": "80000",
           "anthropic-ratelimit-requests-remaining": "4000",
           "anthropic-ratelimit-tokens-remaining": "80000"}, anthropic("rate_limit_error", "Rate limited"),
     Kind.RATE, "tokens", 63.0),
    (429, {"anthropic-ratelimit-requests-remaining": "0",
           "anthropic-ratelimit-requests-reset": "2024-03-26T20:00:00Z",
           "anthropic-ratelimit-tokens-remaining": "16000"}, anthropic("rate_limit_error", "Rate limited"),
     Kind.RATE, "requests", 1.0),
    (429, {}, anthropic("rate_limit_error", "Limit.", details={"error_code": "enforced_spend_limit_reached"}),
     Kind.QUOTA, "quota", None),
    (400, {}, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
     Kind.QUOTA, "quota", None),
    (400, {}, anthropic("invalid_request_error", "You have reached your specified workspace API usage limits."),
     Kind.QUOTA, "quota", None),
    (402, {}, anthropic("billing_error", "There's an issue with your billing."), Kind.QUOTA, "quota", None),
    (529, {}, anthropic("overloaded_error", "Overloaded"), Kind.OVERLOAD, "overload", None),
    (500, {}, anthropic("api_error", "Internal server error"), Kind.TRANSIENT, None, None),
    (504, {}, anthropic("timeout_error", "Timed out"), Kind.TRANSIENT, None, None),
    (413, {}, anthropic("request_too_large", "Request exceeds the maximum size"), Kind.CALLER, None, None),
    (400, {}, anthropic("invalid_request_error", "prompt is too long: 9 tokens > 8"), Kind.CALLER, None, None),
    (200, {}, anthropic("overloaded_error", "Overloaded"), Kind.OVERLOAD, "overload", None),
    (200, {}, anthropic("rate_limit_error", WOULD_EXCEED.format("8,000 output tokens")), Kind.RATE, "tokens", None),
    (200, {}, anthropic("api_error", "Internal server error"), Kind.TRANSIENT, None, None),
    (200, {}, anthropic("timeout_error", "Timed out"), Kind.TRANSIENT, None, None),
]  # fmt: skip

GROQ_ON = "Rate limit reached for model `llama-3.3-70b-versatile` in organization `org_x` service tier `on_demand` on "
GROQ = [
    (429, {"retry-after": "2"}, openai(GROQ_ON + "tokens per minute (TPM): Limit 12000, Used 4437, Requested 9854. "
                                       "Please try again in 11.455s.", "tokens"), Kind.RATE, "tokens", 2.0),
    (429, {}, openai(GROQ_ON + "tokens per day (TPD): Limit 100000, Used 97050, Requested 3619. Please try again in "
                     "9m38.016s. Need more tokens?", None, "rate_limit_exceeded"), Kind.RATE, "tokens", 578.016),
    (429, {}, openai(GROQ_ON + "requests per day (RPD): Limit 1000. Please try again in 1.5s. Need more tokens?",
                     None, "rate_limit_exceeded"), Kind.RATE, "requests", 1.5),
    (413, {}, openai("Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 12328",
                     "tokens", "rate_limit_exceeded"), Kind.CALLER, None, None),
    (498, {}, openai("Flex is full.", None, "capacity_exceeded"), Kind.OVERLOAD, "overload", None),
    (429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2m59.56s",
           "x-ratelimit-remaining-tokens": "17997", "x-ratelimit-reset-tokens": "7.66s"}, None,
     Kind.RATE, "requests", 179.56),
]  # fmt: skip

PER_MINUTE = ("generate_content_free_tier_requests", "GenerateRequestsPerMinutePerProjectPerModel-FreeTier")
PER_DAY = ("generate_content_free_tier_requests", "GenerateRequestsPerDayPerProjectPerModel-FreeTier")
INPUT = ("generate_content_free_tier_input_token_count", "GenerateContentInputTokensPerModelPerMinute-FreeTier")
YOUR_QUOTA = "You exceeded your current quota, please check your plan and billing details."
GEMINI = [
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED", YOUR_QUOTA, violations(PER_MINUTE), retry_info("34s")),
     Kind.RATE, "requests", 34.0),
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED", YOUR_QUOTA, violations(PER_DAY, PER_MINUTE), retry_info("34.07s")),
     Kind.RATE, "requests", 34.07),
    (429, {}, [gemini(429, "RESOURCE_EXHAUSTED", YOUR_QUOTA, violations(INPUT), retry_info("59s"))],
     Kind.RATE, "tokens", 59.0),
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED", YOUR_QUOTA, violations(PER_DAY, INPUT)), Kind.RATE, "unknown", None),
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED", YOUR_QUOTA + "\n* Quota exceeded for metric: generativelanguage."
                     "googleapis.com/generate_content_free_tier_requests, limit: 5\nPlease retry in 25.465784708s."),
     Kind.RATE, "requests", 25.465784708),
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED", "Quota exceeded.", {"reason": "RATE_LIMIT_EXCEEDED", "metadata": {
        "quota_metric": "aiplatform.googleapis.com/x", "quota_limit": "ConcurrentRequestsPerRegion"}}),
     Kind.RATE, "concurrency", None),
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED"), Kind.RATE, "unknown", None),
    (503, {}, gemini(503, "UNAVAILABLE", "The model is overloaded."), Kind.OVERLOAD, "overload", None),
    (500, {}, gemini(500, "INTERNAL", "An internal error has occurred."), Kind.TRANSIENT, None, None),
    (504, {}, gemini(504, "DEADLINE_EXCEEDED", "Deadline expired."), Kind.TRANSIENT, None, None),
    (400, {}, [gemini(400, "INVALID_ARGUMENT", "API key not valid.")], Kind.CALLER, None, None),
    (403, {}, gemini(403, "PERMISSION_DENIED", "No billing.", {"reason": "BILLING_DISABLED"}),
     Kind.QUOTA, "quota", None),
    (429, {}, gemini(429, "RESOURCE_EXHAUSTED", "* Quota exceeded for metric: generativelanguage.googleapis.com/"
                     "generate_content_free_tier_input_token_count, limit: 0"), Kind.RATE, "tokens", None),
    (200, {}, gemini(503, "UNAVAILABLE", "Later."), Kind.OVERLOAD, "overload", None),
    (200, {}, gemini(429, "RESOURCE_EXHAUSTED"), Kind.RATE, "unknown", None),
    (200, {}, gemini(500, "INTERNAL", "An internal error has occurred."), Kind.TRANSIENT, None, None),
]  # fmt: skip

OTHERS = [
    (429, {}, {"error": {"message": "Your account org-e<ak-f> request reached max organization concurrency: 1, please "
                         "try again after 1 seconds", "type": "rate_limit_reached_error"}},
     Kind.RATE, "concurrency", 1.0),  # Moonshot
    (429, {}, {"error": {"message": "Your account request reached organization max RPM: 3, please try again after 1 "
                         "seconds", "type": "rate_limit_reached_error"}}, Kind.RATE, "requests", 1.0),
    (429, {}, openai("Balance.", "exceeded_current_quota_error"), Kind.QUOTA, "quota", None),
    (429, {}, openai("The engine is busy", "engine_overloaded_error"), Kind.OVERLOAD, "overload", None),
    (429, {}, openai("Your current concurrency is 40, which exceeds your concurrency limit of 39 based on your "
                     "remaining balance."), Kind.RATE, "concurrency", None),  # DeepSeek
    (402, {}, openai("Insufficient Balance", "unknown_error", "invalid_request_error"), Kind.QUOTA, "quota", None),
    (402, {}, {"error": {"message": "This request requires more credits", "code": 402}},
     Kind.QUOTA, "quota", None),  # OpenRouter
    (500, {}, openai("Billing is down.", "billing_error"), Kind.TRANSIENT, None, None),
    (429, {}, {"error": {"message": "", "code": 429, "status": "Insufficient Quota"}}, Kind.QUOTA, "quota", None),
    (429, {}, {"error": "Too many concurrent requests for this model"}, Kind.RATE, "concurrency", None),  # Ollama
    (429, {}, {"message": "Requests rate limit exceeded"}, Kind.RATE, "requests", None),  # Mistral
    (429, {}, {"object": "error", "type": "service_tier_capacity_exceeded", "code": "3505"},
     Kind.OVERLOAD, "overload", None),
    (429, {}, {"message": "Too many tokens, please wait before trying again."}, Kind.RATE, "tokens", None),  # Bedrock
    (429, {}, {"message": "Too many requests, please wait before trying again."}, Kind.RATE, "unknown", None),
    (429, {}, "Too Many Requests", Kind.RATE, "unknown", None),
    (403, {}, {"error": {"errors": [{"reason": "rateLimitExceeded"}]}}, Kind.RATE, "unknown", None),
    (429, {}, {"error": {"code": "concurrent_requests_limit"}}, Kind.RATE, "concurrency", None),
    (429, {}, None, Kind.RATE, "unknown", None),
    (429, {"retry-after": formatdate(NOW + 100, usegmt=True)}, None, Kind.RATE, "unknown", 100.0),
    (429, {"retry-after": formatdate(NOW - 100, usegmt=True)}, None, Kind.RATE, "unknown", 0.0),
    (429, {"retry-after": "soon"}, {"message": "retry after 2 minutes"}, Kind.RATE, "unknown", 120.0),
    (429, {}, {"message": "retry in 5 moons"}, Kind.RATE, "unknown", None),
    (503, {"retry-after": "5"}, "<html>", Kind.OVERLOAD, "overload", 5.0),
    (502, {}, "<html>", Kind.TRANSIENT, None, None),
    (500, {}, {"message": "retry in 5s"}, Kind.TRANSIENT, None, None),
    (404, {}, {"detail": "Not Found"}, Kind.CALLER, None, None),
    (422, {}, {"detail": [{"type": "missing", "loc": ["body"]}]}, Kind.CALLER, None, None),
]  # fmt: skip

ANSWERS = [
    pytest.param(*row, id=f"{name}-{n}")
    for name, rows in [
        ("openai", OPENAI), ("azure", AZURE), ("anthropic", ANTHROPIC), ("groq", GROQ), ("gemini", GEMINI),
        ("others", OTHERS),
    ]
    for n, row in enumerate(rows)
]  # fmt: skip


@pytest.mark.parametrize(("status", "headers", "body", "kind", "limit_type", "seconds"), ANSWERS)
def test_what_an_answer_means(status, headers, body, kind, limit_type, seconds):
    verdict = judge_response(status, headers, body, NOW)
    assert (verdict.kind, verdict.limit_type, verdict.status_code) == (kind, limit_type, status)
    assert verdict.retry_after_seconds == (None if seconds is None else pytest.approx(seconds))


class SDKError(Exception):
    """Shaped as openai's and anthropic's: openai's `body` is what stands in `error`, anthropic's is the whole."""

    def __init__(self, status, headers, body):
        super().__init__("a prompt")
        self.status_code = status
        self.headers = headers
        self.body = body


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("status", "headers", "body", "kind", "limit_type", "seconds"), ANSWERS)
def test_an_exception_that_keeps_the_body_or_its_inner_error_says_the_same(
    status, headers, body, kind, limit_type, seconds, inner
):
    kept = body["error"] if inner and isinstance(body, dict) and "error" in body else body
    verdict = classify(SDKError(status, headers, kept))
    assert (verdict.kind, verdict.limit_type, verdict.status_code) == (kind, limit_type, status)


def test_an_error_in_a_stream_is_judged_without_a_status():
    error = SDKError(None, {}, {"type": "server_error", "code": "server_is_overloaded"})
    assert classify(error) == Verdict(Kind.OVERLOAD, None, "overload")
    assert classify(SDKError(None, {}, {"type": "tokens"})) == Verdict(Kind.CALLER)


def test_google_s_own_client_keeps_a_number_as_code_and_the_body_as_details():
    error = Exception("429 RESOURCE_EXHAUSTED")
    error.code = 429
    error.details = gemini(429, "RESOURCE_EXHAUSTED", YOUR_QUOTA, violations(INPUT), retry_info("12s"))
    assert classify(error) == Verdict(Kind.RATE, 429, "tokens", 12.0)


def test_the_message_is_kept_nowhere():
    body = openai("Rate limit reached on tokens per min. SECRET. Please try again in 2s.", "SECRET", "SECRET")
    verdict = judge_response(429, {}, body)
    assert (verdict.limit_type, verdict.retry_after_seconds) == ("tokens", 2.0)
    assert "SECRET" not in repr(verdict) + describe(SDKError(429, {}, body))


def test_a_body_that_contains_itself():
    body = {"error": {"type": "tokens"}}
    body["error"]["details"] = [body, body]
    assert judge_response(429, {}, body).limit_type == "tokens"


@pytest.mark.parametrize(
    ("headers", "states"),
    [
        ({"content-type": "application/json", "x-request-id": "req_1"}, []),
        ({"X-RateLimit-Limit-Requests": "500", "x-ratelimit-limit-tokens": "30000",
          "x-ratelimit-remaining-requests": "499", "x-ratelimit-remaining-tokens": "29996",
          "x-ratelimit-reset-requests": "120ms", "x-ratelimit-reset-tokens": "6m0s"},
         [RateLimitState("requests", 500, 499, 0.12), RateLimitState("tokens", 30000, 29996, 360)]),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "17"},
         [RateLimitState("tokens", None, 0, 17)]),
        ({"x-ratelimit-limit-tokens": "-1", "x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"}, []),
        ({"anthropic-ratelimit-output-tokens-limit": "80000",
          "anthropic-ratelimit-output-tokens-reset": "2024-03-26T20:00:09Z",
          "anthropic-ratelimit-input-tokens-remaining": "7",
          "anthropic-ratelimit-input-tokens-reset": "2024-03-26T21:00:00+01:00",
          "anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-reset": "2024-03-26T19:00:00Z",
          "anthropic-ratelimit-tokens-limit": "9", "anthropic-ratelimit-tokens-reset": "?"},
         [RateLimitState("requests", 50, None, 0), RateLimitState("tokens", 9, None, None),
          RateLimitState("input_tokens", None, 7, 1), RateLimitState("output_tokens", 80000, None, 10)]),
        ({"x-ratelimit-limit-requests": "5", "x-ratelimit-reset-requests": str(int(NOW) + 30)},
         [RateLimitState("requests", 5, None, 30)]),
        ({"x-ratelimit-limit-requests": "nan", "x-ratelimit-remaining-requests": "4, 4"}, []),
    ],
)  # fmt: skip
def test_the_limits_that_headers_tell(headers, states):
    assert rate_limit_state(headers, NOW) == states


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"object": "chat.completion", "model": "gpt-4o", "choices": [],
          "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}, Usage(9, 2, "gpt-4o")),
        ({"object": "chat.completion.chunk", "model": "gpt-4o", "choices": [{}], "usage": None}, None),
        ({"object": "list", "model": "emb", "usage": {"prompt_tokens": 8, "total_tokens": 8}}, Usage(8, None, "emb")),
        ({"object": "response", "model": "gpt-5", "usage": {"input_tokens": 36, "output_tokens": 87}},
         Usage(36, 87, "gpt-5")),
        ({"type": "response.completed", "response": {"model": "gpt-5", "usage": {"input_tokens": 3,
                                                                                 "output_tokens": 4}}},
         Usage(3, 4, "gpt-5")),
        ({"type": "message", "model": "claude", "usage": {"input_tokens": 12, "cache_read_input_tokens": 5,
                                                          "output_tokens": 6}}, Usage(12, 6, "claude")),
        ({"type": "message_start", "message": {"model": "claude", "usage": {"input_tokens": 25, "output_tokens": 1}}},
         Usage(25, 1, "claude")),
        ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}},
         Usage(None, 15, None)),
        ({"candidates": [], "usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 10,
                                              "thoughtsTokenCount": 20, "totalTokenCount": 34},
          "modelVersion": "gemini-2.5-flash"}, Usage(4, 30, "gemini-2.5-flash")),
        ({"usageMetadata": {"promptTokenCount": 4}}, Usage(4, None, None)),
        ({"model": "llama", "choices": [], "x_groq": {"id": "req", "usage": {"prompt_tokens": 1,
                                                                             "completion_tokens": 2}}},
         Usage(1, 2, "llama")),
        ({"usage": {"prompt_tokens": True, "completion_tokens": "2"}}, None),
        ({"usage": {"prompt_tokens": -1, "input_tokens": 0}}, Usage(0, None, None)),
        ({"model": "m"}, None),
        ([], None),
        (None, None),
    ],
)  # fmt: skip
def test_the_usage_of_a_response(body, usage):
    assert usage_of(body) == usage


def chunk(finish_reason, content="", **more):
    choice = {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": finish_reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    } | more


def candidate(text="", **more):
    return {"candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, **more}]}


FORGED = '"finish_reason":"stop" "type":"message_stop" "finishReason": "STOP" "error":{} response.completed [DONE]'
CALL = {"functionCall": {"name": "f", "args": {"finishReason": "STOP", "type": "message_stop", "error": "x"}}}
EVENTS = [  # event, whether last, whether known
    (chunk(None, "Hi"), False, True),
    (chunk(None, FORGED), False, True),
    (chunk(None, "finish_reason"), False, True),
    (chunk("stop"), True, True),
    (chunk("length", FORGED), True, True),
    (chunk("", "Hi"), False, True),
    (chunk(None, "x", choices=[], usage={"prompt_tokens": 1}), False, True),
    ({"choices": [], "prompt_filter_results": []}, False, True),
    ({"object": "text_completion", "choices": [{"text": "a", "finish_reason": "stop"}]}, True, True),
    ({"error": {"message": "Overloaded", "code": 503}}, True, True),
    ({"error": "out of memory"}, True, True),
    ({"error": None, "choices": []}, False, True),
    ({"type": "message_start", "message": {"stop_reason": None}}, False, True),
    ({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": FORGED}}, False, True),
    ({"type": "content_block_start", "content_block": {"type": "tool_use", "input": {"type": "message_stop"}}},
     False, True),
    ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}, False, True),
    ({"index": 0, "type": "message_stop"}, True, True),
    ({"type": "ping"}, False, True),
    ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, True, True),
    ({"type": "error", "code": "server_error", "message": "x", "sequence_number": 2}, True, True),
    ({"type": "response.created", "response": {"status": "in_progress", "error": None}}, False, True),
    ({"type": "response.output_text.delta", "delta": FORGED}, False, True),
    ({"type": "response.completed", "response": {"status": "completed"}}, True, True),
    ({"response": {"status": "incomplete"}, "type": "response.incomplete"}, True, True),
    ({"type": "response.failed", "response": {"error": {"code": "server_error"}}}, True, True),
    (candidate("Hi"), False, True),
    (candidate(FORGED), False, True),
    (candidate("Hi", finishReason="STOP") | {"usageMetadata": {}}, True, True),
    ({"candidates": [{"content": {"parts": [CALL]}}]}, False, True),
    ({"usageMetadata": {"promptTokenCount": 1}, "candidates": [{"finishReason": "MAX_TOKENS"}]}, True, True),
    ({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 2}}, True, True),
    ([gemini(503, "UNAVAILABLE")], True, True),
    ({"token": {"text": FORGED}, "generated_text": None}, False, False),
    ({"type": "content-delta", "delta": {"text": '{"choices":[]}'}}, False, False),
    ({"event": {"type": "message_stop", "choices": [], "error": "x"}}, False, False),
    ({"type": "message_stops"}, False, False),
    ({}, False, False),
]  # fmt: skip


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), None])
@pytest.mark.parametrize(("event", "last", "known"), EVENTS)
def test_the_end_of_a_stream(event, last, known, separators):
    data = json.dumps(event, separators=separators, indent=None if separators else 2, ensure_ascii=False).encode()
    assert (is_last_event(data), is_known_event(data)) == (last, known)


@pytest.mark.parametrize("data", [b"[DONE]", b" [DONE]\r"])
def test_the_word_done_ends_a_stream(data):
    assert is_last_event(data)
    assert is_known_event(data)


@pytest.mark.parametrize("data", [b"", b"hello", b"[]", b"[DONE", b'"[DONE]"', b'{"error":', b'{"type": "error"\xff'])
def test_what_is_no_event_ends_nothing(data):
    assert not is_last_event(data)
    assert not is_known_event(data)


@given(st.text())
def test_generated_text_cannot_end_a_stream(text):
    for event in (chunk(None, text), candidate(text), {"type": "response.output_text.delta", "delta": text}):
        for data in (json.dumps(event), json.dumps(event, ensure_ascii=False)):
            assert not is_last_event(data.encode("utf-8", "surrogatepass"))


WORDS = [
    "error", "type", "code", "message", "details", "violations", "quotaId", "retryDelay", "usage", "prompt_tokens",
    "usageMetadata", "promptTokenCount", "response", "choices", "candidates", "finish_reason", "finishReason",
    "promptFeedback", "blockReason", "model", "status", "metadata", "x_groq", "message_stop", "tokens",
]  # fmt: skip
NAMES = ["retry-after", "retry-after-ms", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]
NAMES += ["anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"]
WAITS = ["9" * 400 + "s", "0", "1e400", "-1", "6m0s", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "٣", "5 µs"]
WAITS += ["Mon, 01 Jan 0001 00:00:00 GMT", "Fri, 99 Zzz 99999 99:99:99 -9999", "try again in " + "1m" * 2000 + "!"]
strings = st.text() | st.sampled_from(WORDS + WAITS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(), inner, max_size=6),
    max_leaves=25,
)
header_values = st.dictionaries(st.sampled_from(NAMES) | st.text(), strings)


@given(st.integers(-1, 1000) | st.sampled_from([200, 400, 429, 503]), header_values, json_values)
@example(429, {"retry-after": "Mon, 01 Jan 0001 00:00:00 +2359"}, {"message": WAITS[-1]})
def test_nothing_that_is_sent_makes_these_raise(status, headers, body):
    verdict = judge_response(status, headers, body)
    assert verdict.status_code == status
    assert verdict.refused == (verdict.limit_type is not None)
    assert 0 <= (verdict.retry_after_seconds or 0) < float("inf")
    assert classify(SDKError(status, headers, body)).kind is verdict.kind
    assert all(0 <= (state.reset_seconds or 0) < float("inf") for state in rate_limit_state(headers))
    usage = usage_of(body)
    assert usage is None or (usage.input_tokens, usage.output_tokens) != (None, None)
    data = json.dumps(body).encode()
    assert is_known_event(data) or not is_last_event(data)


@given(st.binary())
@example(b'{"error":' * 5000)
@example(b'{"error":' + b"[" * 100_000)
def test_no_bytes_make_these_raise(data):
    assert is_known_event(data) or not is_last_event(data)
