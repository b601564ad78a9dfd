"""Changes of a queue's state on the logger `llmq`, with fields for whoever writes logs as JSON.

INFO: paused, resumed, resized, reconfigured, draining, closed, and held (a model's waiters, as the provider asked).
WARNING: breaker (held for refusing on and on), quota, budget at 80 %, hidden_retries, leaked. ERROR: budget used up.
The fields are `event`, those of the event, and `trace_id` and `span_id` where a span is current. Never prompts, keys
or messages of exceptions. Single calls are not told; for those there are `changes()` and `records()`.
"""

from __future__ import annotations

import logging

from llmq.ledger import BudgetEvent
from llmq.telemetry import current_ids

logger = logging.getLogger("llmq")


def tell(level: int, event: str, text: str, *values: object, **fields: object) -> None:
    """Log `text % values`. Costs next to nothing where nobody listens."""
    if logger.isEnabledFor(level):
        logger.log(level, text, *values, extra={"event": event, **fields, **current_ids()})


def tell_of_budget(event: BudgetEvent) -> None:
    """Log that a budget is nearly, or all, used up."""
    tell(logging.ERROR if event.share >= 1.0 else logging.WARNING, "budget", "%s", event, share=event.share)
