"""Transports for httpx2, which note what a client sends: `httpx2.AsyncClient(transport=llmq.AsyncTransport())`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from weakref import finalize

import httpx2

from llmq.wire.sent import Sent, sending


class AsyncTransport(httpx2.AsyncBaseTransport):
    """Notes the requests of calls that run in the queue. `inner` sends them; by default httpx2's own transport."""

    def __init__(self, inner: httpx2.AsyncBaseTransport | None = None) -> None:
        self.inner = httpx2.AsyncHTTPTransport() if inner is None else inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; see `Sent` for what is noted."""
        sent = sending(request.url.host, request.url.path)
        if sent is None:
            return await self.inner.handle_async_request(request)
        _prepare(sent, request)
        try:
            response = await self.inner.handle_async_request(request)
            if response.status_code >= 400:
                assert isinstance(response.stream, httpx2.AsyncByteStream)
                body = b"".join([piece async for piece in response.stream])
                await response.stream.aclose()
                _tell_refusal(sent, response, body)
                return response
        except BaseException as error:
            sent.end(error)
            raise
        sent.answered(response.status_code, response.headers)
        if response.is_closed:
            _read_at_once(sent, response)
        else:
            response.stream = _AsyncRead(response, sent)
        return response

    async def aclose(self) -> None:
        """Close what sends."""
        await self.inner.aclose()


class Transport(httpx2.BaseTransport):
    """`AsyncTransport` for the synchronous client."""

    def __init__(self, inner: httpx2.BaseTransport | None = None) -> None:
        self.inner = httpx2.HTTPTransport() if inner is None else inner

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; see `Sent` for what is noted."""
        sent = sending(request.url.host, request.url.path)
        if sent is None:
            return self.inner.handle_request(request)
        _prepare(sent, request)
        try:
            response = self.inner.handle_request(request)
            if response.status_code >= 400:
                assert isinstance(response.stream, httpx2.SyncByteStream)
                body = b"".join(response.stream)
                response.stream.close()
                _tell_refusal(sent, response, body)
                return response
        except BaseException as error:
            sent.end(error)
            raise
        sent.answered(response.status_code, response.headers)
        if response.is_closed:
            _read_at_once(sent, response)
        else:
            response.stream = _Read(response, sent)
        return response

    def close(self) -> None:
        """Close what sends."""
        self.inner.close()


class _AsyncRead(httpx2.AsyncByteStream):
    """The body of an answer while it is read. Collected unread, it is given up."""

    def __init__(self, response: httpx2.Response, sent: Sent) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._inner = response.stream
        self._sent = sent
        finalize(self, sent.collected).atexit = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = self._sent
        try:
            async for piece in self._inner:
                sent.read(piece)
                yield piece
            sent.last_byte()
        except BaseException as error:
            sent.end(error)
            raise

    async def aclose(self) -> None:
        """Close it; what was not read by then is given up."""
        try:
            await self._inner.aclose()
        finally:
            self._sent.given_up()


class _Read(httpx2.SyncByteStream):
    """`_AsyncRead` for the synchronous client."""

    def __init__(self, response: httpx2.Response, sent: Sent) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self._inner = response.stream
        self._sent = sent
        finalize(self, sent.collected).atexit = False

    def __iter__(self) -> Iterator[bytes]:
        sent = self._sent
        try:
            for piece in self._inner:
                sent.read(piece)
                yield piece
            sent.last_byte()
        except BaseException as error:
            sent.end(error)
            raise

    def close(self) -> None:
        """Close it; what was not read by then is given up."""
        try:
            self._inner.close()
        finally:
            self._sent.given_up()


def _prepare(sent: Sent, request: httpx2.Request) -> None:
    request.headers.update(sent.request_headers)
    if sent.wants_content:
        with contextlib.suppress(httpx2.RequestNotRead):  # a body that is streamed
            sent.asked(request.content)


def _read_at_once(sent: Sent, response: httpx2.Response) -> None:
    """Of an answer that was made whole, as mocks do: nobody will read its stream."""
    assert isinstance(response.stream, httpx2.SyncByteStream)
    sent.read(b"".join(response.stream))
    sent.last_byte()


def _tell_refusal(sent: Sent, response: httpx2.Response, raw: bytes) -> None:
    """Judge a refusal by its whole body, and leave that for the client to read."""
    response.stream = httpx2.ByteStream(raw)
    encoding = response.headers.get("content-encoding")
    try:
        body = httpx2.Response(200, headers={"content-encoding": encoding} if encoding else None, content=raw).content
    except httpx2.DecodingError:
        body = b""
    sent.refused(response.status_code, response.headers, body)
