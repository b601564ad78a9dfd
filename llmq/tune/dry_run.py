"""What can be said of a sweep before anything is called."""

from __future__ import annotations

from collections.abc import Sequence

from llmq.tune.guard import predict
from llmq.tune.runner import Load


def guess(levels: Sequence[int], seconds: float | None, calls: int | None) -> str:
    """What a sweep over levels might use if a call takes 1 s, and 5 s, on a line each, and when more is known.

    `seconds` and `calls` are those of `llmq.sweep`.
    """
    load = Load(seconds, calls)
    lines = [
        f"If a call takes {service:g} s: "
        + str(
            predict(
                levels, service_seconds=service, window_seconds=load.window_seconds(service), window_calls=calls or 0
            )
        )
        for service in (1.0, 5.0)
    ]
    return "\n".join([*lines, "After the first few calls it is said anew, with tokens and cost."])
