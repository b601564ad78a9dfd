"""A middleware for aiohttp that notes what is sent: `ClientSession(middlewares=[llmq.aiohttp_middleware])`.

A response that is neither read to its end nor closed keeps its slot: aiohttp itself holds on to it for as long
as its connection lives, so it is never collected. Use `async with`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import finalize

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.payload import BytesPayload
from aiohttp.streams import AsyncStreamIterator, ChunkTupleAsyncStreamIterator

from llmq.wire.sent import Sent, sending


async def aiohttp_middleware(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    """Note the requests of calls that run in the queue; see `Sent`. Only refusals are read before the caller reads."""
    sent = sending(request.url.host or "", request.url.path)
    if sent is None:
        return await handler(request)
    request.headers.update(sent.request_headers)
    if sent.wants_content and isinstance(request.body, BytesPayload):
        sent.asked(request.body.decode().encode())
    try:
        response = await handler(request)
        if response.status >= 400:
            body = await response.read()
            response.content = _whole(body)
            sent.refused(response.status, _lowered(response), body)
            return response
        sent.answered(response.status, {**_lowered(response), "content-encoding": "identity"})  # it is decoded
        if response.content.at_eof():
            sent.last_byte()
        else:
            response.content = _Watched(response.content, sent)  # type: ignore[assignment]
    except BaseException as error:
        sent.end(error)
        raise
    return response


def _whole(body: bytes) -> StreamReader:
    """A body that was read already, to be read again."""
    loop = asyncio.get_running_loop()
    content = StreamReader(BaseProtocol(loop), limit=2**16, loop=loop)
    content.feed_data(body)
    content.feed_eof()
    return content


def _lowered(response: ClientResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


class _Watched:
    """The body of an answer while it is read, by whatever method. Collected unread, it is given up."""

    def __init__(self, content: Any, sent: Sent) -> None:
        self._content = content
        self._sent = sent
        finalize(self, sent.collected).atexit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    def __aiter__(self) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(self.readline)

    def iter_any(self) -> AsyncStreamIterator[bytes]:
        """As `StreamReader.iter_any`; so the others."""
        return AsyncStreamIterator(self.readany)

    def iter_chunked(self, n: int) -> AsyncStreamIterator[bytes]:
        """In pieces of at most n bytes."""
        return AsyncStreamIterator(lambda: self.read(n))

    def iter_chunks(self) -> ChunkTupleAsyncStreamIterator:
        """As they were sent."""
        return ChunkTupleAsyncStreamIterator(self)  # type: ignore[arg-type]  # it only calls readchunk

    async def read(self, n: int = -1) -> bytes:
        """As `StreamReader.read`; so the others."""
        return await self._watch(self._content.read, n)

    async def readany(self) -> bytes:
        return await self._watch(self._content.readany)

    async def readexactly(self, n: int) -> bytes:
        return await self._watch(self._content.readexactly, n)

    async def readline(self, **limits: Any) -> bytes:
        return await self._watch(self._content.readline, **limits)

    async def readuntil(self, separator: bytes = b"\n", **limits: Any) -> bytes:
        return await self._watch(self._content.readuntil, separator, **limits)

    async def readchunk(self) -> tuple[bytes, bool]:
        found: list[tuple[bytes, bool]] = []

        async def data() -> bytes:
            found.append(await self._content.readchunk())
            return found[0][0]

        await self._watch(data)
        return found[0]

    def read_nowait(self, n: int = -1) -> bytes:
        data: bytes = self._content.read_nowait(n)
        self._sent.read(data)
        return data

    def set_exception(self, *error: Any) -> None:
        """The response was closed."""
        self._content.set_exception(*error)
        self._sent.given_up()

    async def _watch(self, read: Callable[..., Awaitable[bytes]], *args: Any, **limits: Any) -> bytes:
        sent = self._sent
        try:
            data = await read(*args, **limits)
            sent.read(data)
            if self._content.at_eof() and sent.ended_at is None:
                sent.last_byte()
        except BaseException as error:
            sent.end(error)
            raise
        return data
