"""Calls for sweeps."""

import asyncio
from types import SimpleNamespace

from llmq.providers.chat import ChatRequest


def caller(provider, tells=True):
    """Asks it something new each time; its answer `tells` the tokens."""
    count = 0

    async def call(item):
        nonlocal count
        count += 1
        answer = await provider.complete(ChatRequest("m", [{"role": "user", "content": f"{item} {count}"}]))
        return answer if tells else None

    return call


class InternalServerError(Exception):
    """As the openai SDK raises it after two retries of its own."""

    status_code = 500
    response = SimpleNamespace(headers={}, request=SimpleNamespace(headers={"x-stainless-retry-count": "2"}))


def hiding_retries():
    """A call whose client retries by itself, and gives up once in twenty."""
    calls = 0

    async def now_and_then(item):
        nonlocal calls
        calls += 1
        mine = calls
        await asyncio.sleep(0.1)
        if mine % 20 == 0:
            raise InternalServerError

    return now_and_then
