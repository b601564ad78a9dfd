"""Prompts and answers as text for a span; made only where a setting asks for them.

Of a request its messages, of an answer that came as one JSON object what it says. Other fields are left out, headers
are never looked at. Streamed answers are left out too: their pieces are passed on and not kept.
"""

from __future__ import annotations

import json

INPUT = "gen_ai.input.messages"
OUTPUT = "gen_ai.output.messages"


def asked(body: object) -> str | None:
    """The messages of a request, instructions (`system`) first, as JSON; None where none are found."""
    if not isinstance(body, dict):
        return None
    system = body.get("system", body.get("instructions"))
    messages = body.get("messages", body.get("input"))
    if messages is None:
        return None
    told = messages if isinstance(messages, list) else [{"role": "user", "content": messages}]
    return _as_json(told if system is None else [{"role": "system", "content": system}, *told])


def answered(body: object) -> str | None:
    """The messages of an answer, as JSON; None where none are found."""
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    if isinstance(choices, list):
        found = [choice["message"] for choice in choices if isinstance(choice, dict) and "message" in choice]
        return _as_json(found) if found else None
    if "content" in body:
        return _as_json([{"role": body.get("role", "assistant"), "content": body["content"]}])
    return _as_json(body["output"]) if "output" in body else None


def _as_json(found: object) -> str:
    return json.dumps(found, ensure_ascii=False)
