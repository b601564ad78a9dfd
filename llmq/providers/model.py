"""What the simulated provider answers, how long it takes and what goes wrong: pure functions of a seed.

Nothing depends on the order of arrival, so that two runs that send the same requests, however interleaved, get
the same answers and the same faults.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmq.providers.chat import ChatAnswer, ChatRequest, count_tokens
from llmq.providers.spec import ProviderSpec

Fault = Literal["error", "timeout", "cut", "malformed"]

_WORDS = (
    "access",
    "account",
    "adaptive",
    "aligned",
    "assured",
    "automated",
    "capacity",
    "channel",
    "clear",
    "consistent",
    "continuous",
    "customer",
    "data",
    "delivery",
    "demand",
    "design",
    "early",
    "evidence",
    "feedback",
    "flexible",
    "goal",
    "guided",
    "insight",
    "integrated",
    "learning",
    "measured",
    "model",
    "open",
    "outcome",
    "partner",
    "plan",
    "platform",
    "policy",
    "predictive",
    "process",
    "quality",
    "reliable",
    "review",
    "risk",
    "role",
    "secure",
    "service",
    "shared",
    "signal",
    "simple",
    "skill",
    "stable",
    "support",
    "team",
    "timely",
    "tracked",
    "trusted",
    "user",
    "value",
    "verified",
    "workflow",
)
_MAX_DEPTH = 12
_MOST_ANSWERS = 4096
_answers: dict[tuple[int, int, str], ChatAnswer] = {}


class _Generators(threading.local):
    """A thread's own random generator, seeded anew for each use: to make one costs twice as much."""

    def __init__(self) -> None:
        self.one = random.Random()


_generators = _Generators()


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen to one request: seconds at no load, fault or none, and the answer."""

    service_seconds: float
    fault: Fault | None
    answer: ChatAnswer


def plan(spec: ProviderSpec, request: ChatRequest, attempt: int, digest: str | None = None) -> Plan:
    """What happens to the `attempt`-th (from 1) sending of a request; `digest` is the request's, where it is known.

    Latency is log-normal with mean `latency_seconds + seconds_per_token * completion tokens`. The answer is the
    same for every attempt; latency and fault are drawn anew.
    """
    digest = digest or request.digest()
    answer = answer_to(spec, request, digest)
    rng = _generators.one
    rng.seed(_seed(spec.seed, "attempt", digest, attempt))
    mean = spec.latency_seconds + spec.seconds_per_token * answer.completion_tokens
    seconds = mean * math.exp(spec.sigma * rng.gauss(0.0, 1.0) - spec.sigma**2 / 2)
    if request.stage is not None:
        seconds *= spec.slow_stages.get(request.stage, 1.0)
    fault = _fault(spec, rng.random())
    if fault == "malformed":
        answer = ChatAnswer(answer.content[: len(answer.content) // 2], answer.prompt_tokens, answer.completion_tokens)
    return Plan(seconds, fault, answer)


def refused_at_random(spec: ProviderSpec, digest: str, sending: int) -> bool:
    """Whether the `sending`-th (from 1) of a body meets `refusal_ratio`; what limits refuse is not counted."""
    return spec.refusal_ratio > 0 and _rng(spec.seed, "refusal", digest, sending).random() < spec.refusal_ratio


def cold_factor(spec: ProviderSpec, age_seconds: float) -> float:
    """The latency factor of a server `age_seconds` after its first request: from `cold_factor` linearly down to 1."""
    age_seconds = max(0.0, age_seconds)  # threads may come in another order than their clocks were read
    if age_seconds >= spec.cold_seconds:
        return 1.0
    return 1.0 + (spec.cold_factor - 1.0) * (1.0 - age_seconds / spec.cold_seconds)


def answer_to(spec: ProviderSpec, request: ChatRequest, digest: str) -> ChatAnswer:
    """The answer's text: JSON that follows the schema if there is one, else plain words. Kept: sweeps ask again."""
    key = (spec.seed, spec.answer_tokens, digest)
    found = _answers.get(key)
    if found is None:
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        found = _answers[key] = _new_answer(spec, request, digest)
    return found


def _new_answer(spec: ProviderSpec, request: ChatRequest, digest: str) -> ChatAnswer:
    rng = _rng(spec.seed, "answer", digest)
    if request.schema is None:
        length = max(1, round(spec.answer_tokens * rng.uniform(0.5, 1.5)))
        content = _sentence(rng, length)
    else:
        content = json.dumps(_instance(request.schema, request.schema, rng, "", 0))
    prompt = sum(count_tokens(message.get("content", "")) for message in request.messages)
    return ChatAnswer(content, prompt, count_tokens(content))


def _rng(*parts: object) -> random.Random:
    return random.Random(_seed(*parts))


def _seed(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _fault(spec: ProviderSpec, draw: float) -> Fault | None:
    ratios: tuple[tuple[Fault, float], ...] = (
        ("error", spec.error_ratio),
        ("timeout", spec.timeout_ratio),
        ("cut", spec.cut_ratio),
        ("malformed", spec.malformed_ratio),
    )
    for fault, ratio in ratios:
        if draw < ratio:
            return fault
        draw -= ratio
    return None


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words)).capitalize() + "."


def _instance(schema: Any, root: Mapping[str, Any], rng: random.Random, name: str, depth: int) -> Any:
    """A value that follows a JSON schema (of the kind that structured outputs use)."""
    if schema is True or not isinstance(schema, Mapping):
        return _sentence(rng, 3)
    if "$ref" in schema:
        return _instance(_resolve(schema["$ref"], root), root, rng, name, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            choices = schema[union] if depth < _MAX_DEPTH else sorted(schema[union], key=lambda s: "$ref" in s)[:1]
            return _instance(rng.choice(choices), root, rng, name, depth + 1)
    if "allOf" in schema:
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            part = _resolve(part["$ref"], root) if "$ref" in part else part
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged |= part
            merged |= {"properties": properties, "required": required} if properties else {}
        return _instance(merged, root, rng, name, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = rng.choice(kind)
    return _BUILDERS[kind](schema, root, rng, name, depth)


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, name: str, depth: int) -> Any:
    properties = schema.get("properties", {})
    if depth >= _MAX_DEPTH:
        properties = {key: value for key, value in properties.items() if key in schema.get("required", [])}
    return {key: _instance(value, root, rng, key, depth + 1) for key, value in properties.items()}


def _array(schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, name: str, depth: int) -> Any:
    least = schema.get("minItems", 0 if depth >= _MAX_DEPTH else 1)
    length = rng.randint(least, max(least, schema.get("maxItems", least + (0 if depth >= _MAX_DEPTH else 2))))
    items: list[Any] = []
    for _ in range(length * 4):
        if len(items) == length:
            break
        item = _instance(schema.get("items", True), root, rng, name, depth + 1)
        if not (schema.get("uniqueItems") and item in items):
            items.append(item)
    return items


def _string(schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, name: str, depth: int) -> Any:
    if name.endswith("id") or "pattern" in schema:
        text = f"{rng.choice(_WORDS)}-{rng.randrange(16**8):08x}"
    else:
        text = _sentence(rng, 3 if name == "name" else 14)
    text += "." * max(0, schema.get("minLength", 0) - len(text))
    return text[: schema["maxLength"]] if "maxLength" in schema else text


def _integer(schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, name: str, depth: int) -> Any:
    low = math.ceil(schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1))
    high = math.floor(schema.get("maximum", schema.get("exclusiveMaximum", max(low, 99) + 1) - 1))
    step = schema.get("multipleOf", 1)
    return rng.randint(math.ceil(low / step), math.floor(high / step)) * step


def _number(schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, name: str, depth: int) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0.0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 1.0))
    return low + (high - low) * (0.25 + 0.5 * rng.random())


_BUILDERS: dict[str, Any] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": lambda schema, root, rng, name, depth: rng.random() < 0.5,
    "null": lambda schema, root, rng, name, depth: None,
}


def _resolve(ref: str, root: Mapping[str, Any]) -> Any:
    """What a local `#/...` reference of a schema names."""
    found: Any = root
    for part in ref.removeprefix("#").strip("/").split("/"):
        if part:
            found = found[part.replace("~1", "/").replace("~0", "~")]
    return found
