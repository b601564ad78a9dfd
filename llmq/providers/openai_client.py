"""A client for any OpenAI-compatible endpoint: the `openai` SDK with its own retries off.

The SDK rides on httpx2 by default. Its aiohttp transport is used here where it is installed (the extra `openai`
brings it): `benchmarks/test_http_client.py` compares both at 64 concurrent calls.
"""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

import openai

from llmq.errors import AnswerError, ConfigError
from llmq.providers.chat import ChatAnswer, ChatRequest, count_tokens

MAX_CONNECTIONS = 1024


class OpenAICompatibleClient:
    """`complete` sends one request and raises what the SDK raises.

    The key comes from the environment variable `api_key_env` and from nowhere else; a loopback endpoint needs none.
    Stage and service go along as headers to a loopback endpoint only, never to anybody else.
    """

    def __init__(self, base_url: str | None = None, *, api_key_env: str = "OPENAI_API_KEY") -> None:
        self.is_loopback = _is_loopback(base_url)
        key = os.environ.get(api_key_env)
        if not key and not self.is_loopback:
            raise ConfigError(
                f"the environment variable {api_key_env} is not set; {base_url or 'the OpenAI endpoint'} needs a key. "
                "Set it, or name another one with the setting api_key_env"
            )
        # A loopback endpoint gets no real key, whatever is in the environment.
        self._client = openai.AsyncOpenAI(
            api_key="none-needed" if self.is_loopback else key,
            base_url=base_url,
            max_retries=0,
            timeout=None,  # the queue's request_timeout is the one that counts
            http_client=_http_client(),
        )
        if self.is_loopback:  # nor the other things that the SDK takes from the environment
            self._client.organization = self._client.project = None
            self._client._custom_headers = {}

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """Ask once. Raises the SDK's errors, and `AnswerError` where there is no text."""
        options: dict[str, Any] = {}
        if request.schema is not None:
            options["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema},
            }
        if self.is_loopback:
            labels = {"x-llmq-stage": request.stage, "x-llmq-service": request.service_id}
            options["extra_headers"] = {name: _ascii(value) for name, value in labels.items() if value is not None}
        answer = await self._client.chat.completions.create(
            model=request.model,
            messages=request.messages,  # type: ignore[arg-type]  # plain role/content mappings
            **options,
        )
        content = answer.choices[0].message.content if getattr(answer, "choices", None) else None
        if content is None:
            raise AnswerError("the answer has no text (a refusal, a tool call, or not a chat completion)")
        usage = answer.usage
        return ChatAnswer(
            content,
            usage.prompt_tokens if usage else sum(count_tokens(m.get("content", "")) for m in request.messages),
            usage.completion_tokens if usage else count_tokens(content),
        )

    async def aclose(self) -> None:
        """Close its connections."""
        await self._client.close()


def _http_client() -> Any:
    import httpx2

    limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
    try:
        return openai.DefaultAioHttpClient(limits=limits, timeout=None)
    except RuntimeError:  # aiohttp is not installed
        return openai.DefaultAsyncHttpx2Client(limits=limits, timeout=None)


def _is_loopback(base_url: str | None) -> bool:
    host = urlsplit(base_url).hostname if base_url else None
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ascii(value: str) -> str:
    return value.encode("ascii", "backslashreplace").decode()
