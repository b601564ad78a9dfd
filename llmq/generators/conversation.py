"""One place through which every call of the generators goes: cache, queue, validation, transcript."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, overload
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from llmq.core import LLMTaskMeta
from llmq.errors import AnswerError
from llmq.ledger import Ledger
from llmq.providers.chat import ChatAnswer, ChatClient, ChatRequest, count_tokens
from llmq.retry import Retry
from llmq.runtime import active_queue
from llmq.unqueued import unqueued

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)

ANSWER_TOKENS = 300
"""Of an answer, as a first estimate; a rate of tokens is settled by what was really used."""

CacheMode = Literal["off", "read", "refresh", "write"]


class AnswerModel(Protocol[A_co]):
    """What an answer must be: a pydantic model, or what is asked and parsed as one."""

    def model_json_schema(self) -> dict[str, Any]:
        """The JSON schema that is sent."""

    def model_validate_json(self, json_data: str, /) -> A_co:
        """The answer. Raises pydantic's `ValidationError`."""


class AnswerCache:
    """Validated answers by what was asked, a file each.

    off: neither read nor written. read: use what is there. write: the same, and add what was not.
    refresh: ask anew and overwrite.
    """

    def __init__(self, mode: CacheMode, folder: Path) -> None:
        self.mode = mode
        self._folder = folder

    def get(self, request: ChatRequest) -> str | None:
        """The answer kept for a request, if it may be used."""
        if self.mode not in ("read", "write"):
            return None
        try:
            found = json.loads(self._path(request).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # not there, or torn by a crash: ask again
        content = found.get("content") if isinstance(found, dict) else None
        return content if isinstance(content, str) else None

    def put(self, request: ChatRequest, content: str) -> None:
        """Keep an answer, whole or not at all."""
        if self.mode not in ("write", "refresh"):
            return
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".answer-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"content": content}, file)
        os.replace(temporary, path)

    def _path(self, request: ChatRequest) -> Path:
        digest = request.digest()
        return self._folder / digest[:2] / f"{digest}.json"


@dataclass
class Transcript:
    """What was asked and answered for one service, written when the service is over. Holds prompts."""

    folder: Path
    service_id: str
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, stage: str, request: ChatRequest, content: str, cached: bool) -> None:
        """Note one answered call."""
        self.entries.append({"stage": stage, "messages": request.messages, "answer": content, "cached": cached})

    def write(self) -> None:
        """One line a call, in the order of the stages' labels, so that it is the same in both modes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(entry, ensure_ascii=False) for entry in sorted(self.entries, key=lambda e: str(e["stage"]))]
        path = self.folder / f"{_file_name(self.service_id)}.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class SessionContext:
    """What the calls of one service share. `models` names another model for a kind of stage (`features`, `mapping`).
    `ledger` counts what is sent without a queue. `rank`
    puts older services first; `sending` hears of each call just before it is sent, once however often it is
    retried."""

    service_id: str | None = None
    model: str = "simulated-1"
    models: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    cache: AnswerCache | None = None
    transcript: Transcript | None = None
    retry: Retry | None = None
    request_timeout: float | None = None
    sending: Callable[[str], None] | None = None
    ledger: Ledger | None = None


class ConversationSession:
    """The calls of one stage of one service."""

    def __init__(self, client: ChatClient, stage: str, context: SessionContext | None = None) -> None:
        self._client = client
        self._stage = stage
        self._context = context or SessionContext()

    @overload
    async def ask_async(self, prompt: str, answer: AnswerModel[A]) -> A: ...

    @overload
    async def ask_async(self, prompt: str, answer: None = None) -> str: ...

    async def ask_async(self, prompt: str, answer: AnswerModel[A] | None = None) -> A | str:
        """Ask, through the queue if it is on. Returns the answer as an `answer`, or its text where that is None.

        A cached answer takes no slot. A malformed one raises `AnswerError` and is not asked for again.
        """
        context = self._context
        request = ChatRequest(
            context.models.get(self._stage.partition("_")[0], context.model),
            [{"role": "user", "content": prompt}],
            None if answer is None else _schema(answer),
            self._stage,
            context.service_id,
        )
        found = self._cached(request, answer)
        if found is None:
            content = (await self._send(request)).content
            parsed = content if answer is None else _parse(answer, content, self._stage)
            if context.cache is not None:
                context.cache.put(request, content)
        else:
            content, parsed = found
        if context.transcript is not None:
            context.transcript.add(self._stage, request, content, found is not None)
        return parsed

    def _cached(self, request: ChatRequest, answer: AnswerModel[A] | None) -> tuple[str, A | str] | None:
        """The kept answer, as text and as an `answer`; None where there is none that is still of use."""
        content = None if self._context.cache is None else self._context.cache.get(request)
        if content is None:
            return None
        try:
            return content, content if answer is None else _parse(answer, content, self._stage)
        except AnswerError:
            return None

    async def _send(self, request: ChatRequest) -> ChatAnswer:
        context = self._context
        unsent = True

        async def call() -> ChatAnswer:
            nonlocal unsent
            if unsent and context.sending is not None:
                context.sending(self._stage)
            unsent = False
            return await self._client.complete(request)

        tokens = sum(count_tokens(message["content"]) for message in request.messages) + ANSWER_TOKENS
        meta = LLMTaskMeta(self._stage, request.model, context.service_id, rank=context.rank, tokens=tokens)
        queue = active_queue()
        if queue is not None:
            return await queue.submit(call, meta=meta, retry=context.retry)
        return await unqueued(
            call, retry=context.retry, request_timeout=context.request_timeout, meta=meta, ledger=context.ledger
        )


def _schema(answer: AnswerModel[Any]) -> dict[str, Any]:
    return _schema_of_model(answer) if isinstance(answer, type) else answer.model_json_schema()


@functools.lru_cache(maxsize=64)
def _schema_of_model(answer: type[BaseModel]) -> dict[str, Any]:
    """Kept for the models in use: pydantic takes half a millisecond to make one."""
    return answer.model_json_schema()


def _parse(answer: AnswerModel[A], content: str, stage: str) -> A:
    try:
        return answer.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise AnswerError(f"{stage}: the answer is not what was asked for: {place}: {first['msg']}") from None


def _file_name(service_id: str) -> str:
    """A file name for any id: no separators, no dots in front, and short enough."""
    name = quote(service_id, safe=" ")
    if name.startswith("."):
        name = "%2E" + name[1:]
    return name if len(name) <= 120 else name[:100] + hashlib.sha256(service_id.encode()).hexdigest()[:16]
