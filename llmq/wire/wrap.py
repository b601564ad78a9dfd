"""`llmq.wrap(client)`: what an SDK's client sends is seen, and its retries are the queue's."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from llmq.wire.sent import current

C = TypeVar("C")


def wrap(client: C) -> C:
    """Let the queue see what `client` sends, and retry for it. Changes the client itself, and returns it.

    `client` is one of the SDKs of OpenAI or Anthropic, or another made alike (`max_retries`, riding on httpx2), async
    or sync. In a call of `submit` its own retries are off: the queue retries the call as often as the client would
    have, unless `submit` was given a `retry`, each attempt in a new slot; it repeats all that the call does. Everywhere
    else, and with the flag off, the client behaves as before. In a `slot()` of a queue with `telemetry=None` nothing is
    seen: that goes the short way. Raises TypeError for what cannot be wrapped.
    """
    http_client = getattr(client, "_client", None)
    if not hasattr(client, "max_retries") or not hasattr(http_client, "_transport"):
        raise TypeError(
            f"wrap() takes a client of the OpenAI or Anthropic SDK, got {type(client).__name__}; for others there are "
            "llmq.AsyncTransport and llmq.Transport (httpx2) and llmq.aiohttp_middleware"
        )
    _watch(http_client)
    if not hasattr(type(client), "_llmq_wrapped"):
        client.__class__ = _handing_over(type(client))  # type: ignore[arg-type]  # a class is hashable
    return client


def _watch(http_client: Any) -> None:
    import httpx2

    from llmq.wire.httpx2 import AsyncTransport, Transport

    def watched(transport: Any) -> Any:
        if transport is None or isinstance(transport, (AsyncTransport, Transport)):
            return transport
        if isinstance(transport, httpx2.AsyncBaseTransport):
            return AsyncTransport(transport)
        if isinstance(transport, httpx2.BaseTransport):
            return Transport(transport)
        raise TypeError(
            f"wrap() knows clients that ride on httpx2; this is on {type(transport).__module__.partition('.')[0]}"
        )

    http_client._transport = watched(http_client._transport)
    http_client._mounts = {pattern: watched(transport) for pattern, transport in http_client._mounts.items()}


@functools.cache
def _handing_over(kind: type[Any]) -> type[Any]:
    """The client's class, but that it leaves retries to the queue in calls that the queue can repeat."""

    def request(self: Any, cast_to: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        operation = current()
        if operation is not None and operation.repeatable:
            retries = options.get_max_retries(self.max_retries)
            operation.handed_retries = max(operation.handed_retries, retries)
            options = options.model_copy(update={"max_retries": 0})
        return kind.request(self, cast_to, options, *args, **kwargs)

    wrapped = type(kind.__name__, (kind,), {"request": request, "_llmq_wrapped": True, "__module__": kind.__module__})
    wrapped.__qualname__ = kind.__qualname__
    return wrapped
