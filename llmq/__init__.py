"""How many LLM calls should run at once? Measured, and kept in force.

import llmq

sweep = await llmq.sweep(my_coroutine, items)      # measure at several levels
print(sweep.recommend())                           # a number, and why
answer = await llmq.submit(lambda: client.ask(...))  # through the one queue, if the flag is on
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq import notebook
    from llmq.changes import Change, Changes
    from llmq.core import (
        Cap,
        Counts,
        Depth,
        Drop,
        FairShare,
        LLMTaskMeta,
        Outcome,
        Policy,
        Priority,
        Rate,
        Statistics,
    )
    from llmq.errors import (
        AnswerError,
        BudgetExceededError,
        ConfigError,
        InputError,
        LLMQError,
        OutOfQuotaError,
        ProviderError,
        QueueCancelledError,
        QueueClosedError,
        QueueDrainingError,
        QueueDroppedError,
        QueueError,
        QueueFullError,
        QueueHaltedError,
        QueueTimeout,
        RequestTimeout,
        RuntimeInUseError,
        StreamCutError,
    )
    from llmq.items import ItemOutcome
    from llmq.ledger import Budget, Ledger, Price
    from llmq.operations import Slot
    from llmq.pipeline import Pipeline, Stage
    from llmq.queue import LLMQueue
    from llmq.records import AttemptRecord, OperationRecord, Records
    from llmq.retry import Kind, Retry, Verdict, classify
    from llmq.runtime import RuntimeEnv, limiter, submit, using
    from llmq.settings import Settings
    from llmq.summary import RunSummary
    from llmq.telemetry import Telemetry, configure_logfire, serve_metrics
    from llmq.tune.sweep import Sweep, sweep
    from llmq.wire.aiohttp import aiohttp_middleware
    from llmq.wire.httpx2 import AsyncTransport, Transport
    from llmq.wire.sent import report_tokens
    from llmq.wire.wrap import wrap

_HOME = {
    "llmq.changes": ("Change", "Changes"),
    "llmq.core": (
        "Cap",
        "Counts",
        "Depth",
        "Drop",
        "FairShare",
        "LLMTaskMeta",
        "Outcome",
        "Policy",
        "Priority",
        "Rate",
        "Statistics",
    ),
    "llmq.errors": (
        "AnswerError",
        "BudgetExceededError",
        "ConfigError",
        "InputError",
        "LLMQError",
        "OutOfQuotaError",
        "ProviderError",
        "QueueCancelledError",
        "QueueClosedError",
        "QueueDrainingError",
        "QueueDroppedError",
        "QueueError",
        "QueueFullError",
        "QueueHaltedError",
        "QueueTimeout",
        "RequestTimeout",
        "RuntimeInUseError",
        "StreamCutError",
    ),
    "llmq.items": ("ItemOutcome",),
    "llmq.ledger": ("Budget", "Ledger", "Price"),
    "llmq.operations": ("Slot",),
    "llmq.pipeline": ("Pipeline", "Stage"),
    "llmq.queue": ("LLMQueue",),
    "llmq.records": ("AttemptRecord", "OperationRecord", "Records"),
    "llmq.retry": ("Kind", "Retry", "Verdict", "classify"),
    "llmq.runtime": ("RuntimeEnv", "limiter", "submit", "using"),
    "llmq.settings": ("Settings",),
    "llmq.summary": ("RunSummary",),
    "llmq.telemetry": ("Telemetry", "configure_logfire", "serve_metrics"),
    "llmq.tune.sweep": ("Sweep", "sweep"),
    "llmq.wire.aiohttp": ("aiohttp_middleware",),
    "llmq.wire.httpx2": ("AsyncTransport", "Transport"),
    "llmq.wire.sent": ("report_tokens",),
    "llmq.wire.wrap": ("wrap",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name == "notebook":
        return import_module("llmq.notebook")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
