"""The simulated provider as an OpenAI-compatible HTTP server, on loopback unless told otherwise.

`POST /v1/chat/completions` (plain and streamed), `GET /v1/models`, `GET /stats` (add `?calls=true` for each request).
The labels of a request come in the headers `x-llmq-stage` and `x-llmq-service`; they are no part of its body.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmq.errors import ConfigError
from llmq.providers.chat import ChatRequest
from llmq.providers.model import Plan
from llmq.providers.simulated import Exchange, SimulatedProvider
from llmq.providers.spec import ProviderSpec

STAGE_HEADER = "x-llmq-stage"
SERVICE_HEADER = "x-llmq-service"
_STREAM_PIECES = 8
_LISTENING = "listening on "
_CLIENT_GONE = 499  # nobody is there to read it


class _Cut(Exception):
    """Raised within a response: uvicorn then closes the connection in the middle of it."""


def _not_planned(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[0] is _Cut)


def create_app(provider: SimulatedProvider) -> Starlette:
    """The ASGI application around a provider."""

    async def completions(request: Request) -> Response:
        try:
            body = await request.json()
            chat = _chat_request(body, request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return _error(400, f"cannot read the request: {error!r}", "invalid_request_error")
        try:
            exchange = provider.begin(chat, time.monotonic())
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            return _error(400, f"cannot follow the schema: {error!r}", "invalid_request_error")
        headers = exchange.headers(time.time())
        if exchange.refused is not None:
            await asyncio.sleep(exchange.seconds)
            provider.end(exchange, 429, time.monotonic())
            return JSONResponse({"error": exchange.body_of_refusal}, 429, headers=headers)
        assert exchange.plan is not None
        if body.get("stream") and exchange.plan.fault not in ("error", "timeout"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            events = _stream(provider, exchange, exchange.plan, usage=usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        if not await _sleep_while_connected(request, exchange.seconds):
            provider.end(exchange, 0, time.monotonic())
            return Response(status_code=_CLIENT_GONE)
        response = _response(exchange, exchange.plan, headers)
        provider.end(exchange, response.status_code, time.monotonic())
        return response

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "simulated-1", "object": "model", "owned_by": "llmq"}]})

    async def stats(request: Request) -> Response:
        return JSONResponse(provider.stats(calls=request.query_params.get("calls") == "true"))

    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/stats", stats),
        ]
    )


def serve(spec: ProviderSpec, host: str = "127.0.0.1", port: int = 0, *, until_stdin_closes: bool = False) -> None:
    """Serve until interrupted. Prints `listening on URL` when it can be called; port 0 takes a free one.

    With `until_stdin_closes` also until whoever started this process is gone, however it went.
    """
    # The protocol is named because asyncio sets TCP_NODELAY only where it is; without it answers take 40 ms more.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            create_app(SimulatedProvider(spec)),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=120,
        )
        print(f"{_LISTENING}http://{host}:{port}/v1", flush=True)
        logging.getLogger("uvicorn.error").addFilter(_not_planned)
        server = uvicorn.Server(config)
        if until_stdin_closes:
            threading.Thread(target=_stop_with_stdin, args=(server,), daemon=True).start()
        server.run(sockets=[listener])


def _stop_with_stdin(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True


class ServedProvider:
    """A server in a process of its own, on a free loopback port: `url`, `stats()`, `stop()`.

    In a process of its own so that it does not compete with the client for the interpreter. It ends with `stop`,
    with the `with` block, or with this process.
    """

    def __init__(self, spec: ProviderSpec) -> None:
        command = [sys.executable, "-m", "llmq", "provider", "serve", "--port", "0"]
        self._process = subprocess.Popen(
            [*command, "--spec-json", spec.model_dump_json(), "--until-stdin-closes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt is for the client, which then stops this
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line.startswith(_LISTENING):
            self.stop()
            raise ConfigError(f"the simulated provider did not start: {line or 'it says why above'}")
        self.url = line.removeprefix(_LISTENING)

    def stats(self, *, calls: bool = False) -> dict[str, Any]:
        """The server's own truth, see `SimulatedProvider.stats`."""
        address = f"{self.url.removesuffix('/v1')}/stats?calls={'true' if calls else 'false'}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.communicate()

    def __enter__(self) -> ServedProvider:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _chat_request(body: Any, request: Request) -> ChatRequest:
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in body["messages"]]
    response_format = body.get("response_format") or {}
    schema = None
    if response_format.get("type") == "json_schema":
        schema = response_format["json_schema"]["schema"]
    elif response_format.get("type") == "json_object":
        schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    return ChatRequest(
        str(body["model"]), messages, schema, request.headers.get(STAGE_HEADER), request.headers.get(SERVICE_HEADER)
    )


async def _sleep_while_connected(request: Request, seconds: float) -> bool:
    """Sleep; False as soon as the client has gone away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(gone())
    done, _ = await asyncio.wait({watcher}, timeout=seconds)
    watcher.cancel()
    return not done


def _response(exchange: Exchange, plan: Plan, headers: dict[str, str]) -> Response:
    match plan.fault:
        case "error":
            return _error(500, "injected by error_ratio", "server_error", headers)
        case "timeout":
            return _error(504, "injected by timeout_ratio", "server_error", headers)
    content = json.dumps(_completion(exchange, plan)).encode()
    headers = {**headers, "content-type": "application/json"}
    if plan.fault == "cut":
        return StreamingResponse(_cut(content), headers={**headers, "content-length": str(len(content))})
    return Response(content, headers=headers)


async def _cut(content: bytes) -> AsyncIterator[bytes]:
    """Half of what was announced, then the end of the connection."""
    yield content[: len(content) // 2]
    raise _Cut


async def _stream(provider: SimulatedProvider, exchange: Exchange, plan: Plan, *, usage: bool) -> AsyncIterator[bytes]:
    """The answer in pieces, spread over its service time; with `usage` a last chunk that tells the tokens."""
    status = 0
    try:
        text = plan.answer.content
        size = max(1, -(-len(text) // _STREAM_PIECES))
        pieces = [text[start : start + size] for start in range(0, len(text), size)] or [""]
        for number, piece in enumerate(pieces):
            await asyncio.sleep(exchange.seconds / len(pieces))
            if plan.fault == "cut" and number >= len(pieces) // 2:
                status = 200
                raise _Cut
            role = {} if number else {"role": "assistant"}
            yield _event(_chunk(exchange, {**role, "content": piece}))
        yield _event(_chunk(exchange, {}, finish_reason="stop"))
        if usage:
            yield _event({**_chunk(exchange, {}), "choices": [], "usage": _usage(plan)})
        yield b"data: [DONE]\n\n"
        status = 200
    finally:
        provider.end(exchange, status, time.monotonic())


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _chunk(exchange: Exchange, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{exchange.digest[:24]}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": exchange.request.model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def _completion(exchange: Exchange, plan: Plan) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{exchange.digest[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": exchange.request.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": plan.answer.content},
                "finish_reason": "stop",
            }
        ],
        "usage": _usage(plan),
    }


def _usage(plan: Plan) -> dict[str, int]:
    answer = plan.answer
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _error(status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers=headers)
