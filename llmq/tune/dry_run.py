"""What can be said of a sweep before anything is called."""

from __future__ import annotations

from collections.abc import Sequence

from llmq.tune.guard import Caps, predict
from llmq.tune.runner import Load
from llmq.tune.sweep import VIRTUAL_CALLS


def guess(
    levels: Sequence[int],
    seconds: float | None,
    calls: int | None,
    *,
    refine: bool = True,
    virtual: bool = False,
    arrivals: float | None = None,
    caps: Caps | None = None,
) -> str:
    """What a sweep over levels might use if a call takes 1 s, and 5 s, on a line each; when more is known; and where it
    stops. The parameters are those of `llmq.sweep`.
    """
    if virtual and seconds is None and calls is None:
        calls = VIRTUAL_CALLS
    load = Load(seconds, calls)
    lines = [
        f"If a call takes {service:g} s: "
        + str(
            predict(
                levels,
                service_seconds=service,
                window_seconds=load.window_seconds(service),
                window_calls=calls or 0,
                rate_per_second=arrivals,
                refine=refine,
                virtual=virtual,
            )
        )
        for service in (1.0, 5.0)
    ]
    if caps is not None and caps != Caps():
        lines.append(f"It stops at {caps} at the latest.")
    return "\n".join([*lines, "After the first few calls it is said anew, with tokens and cost."])
