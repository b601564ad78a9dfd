"""A chat completion as llmq's own parts ask for it and get it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(slots=True)
class ChatRequest:
    """`schema`: the JSON schema that the answer must follow, or None for free text.

    `stage` and `service_id` are labels; they are no part of the body.
    """

    model: str
    messages: list[dict[str, str]]
    schema: Mapping[str, Any] | None = None
    stage: str | None = field(default=None, compare=False)
    service_id: str | None = field(default=None, compare=False)

    def digest(self) -> str:
        """SHA-256 of the body, in hex: equal for equal requests."""
        body = {"model": self.model, "messages": self.messages, "schema": self.schema}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class ChatAnswer:
    """The text of an answer, and what it used."""

    content: str
    prompt_tokens: int
    completion_tokens: int


class ChatClient(Protocol):
    """One attempt a call: no retries of its own, failures as exceptions that `llmq.classify` can read."""

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """Ask once."""


def count_tokens(text: str) -> int:
    """Tokens of a text, by the rule of thumb of four characters a token; at least 1."""
    return max(1, len(text) // 4)
