# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What if? Ask a recording
#
# You have a run behind you, and questions that it did not answer: what would more calls at once have brought? What if
# the provider doubled your limit, should you ask for it? You need not pay for the answers. A recording of the run says
# how long calls take and which limits they met; from that llmq makes a model of the provider and runs the same queue
# against it, on a clock that jumps to the next event.
#
# The model cannot know what nobody has seen, and it says so. That is the second half of this notebook.

# %%
REQUESTS_PER_MINUTE = 600
SECONDS_PER_CALL = 1.0
AT_ONCE = 16

# %% [markdown]
# ## A run, recorded
#
# A stand-in for your provider, and a run through a queue with 16 slots.

# %%
import tempfile
from pathlib import Path

import pandas as pd

import llmq
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider, in_virtual_time
from llmq.tune.timelines import plot_timeline
from llmq.tune.trace import Trace, write_trace
from llmq.tune.whatif import what_if


def outlining(requests_per_minute):
    """A coroutine function that asks a provider with this limit."""
    provider = SimulatedProvider(
        ProviderSpec(latency_seconds=SECONDS_PER_CALL, requests_per_minute=requests_per_minute, bucket_seconds=1)
    )

    async def outline(topic):
        question = {"role": "user", "content": f"Outline an article on {topic}."}
        return await provider.complete(ChatRequest(model="m", messages=[question]))

    return outline


async def recorded(at_once, calls=1000):
    """The records of a run over so many topics, in virtual time."""
    queue = llmq.LLMQueue(at_once)

    async def run():
        topics = (f"topic {n}" for n in range(calls))
        async with queue.map(outlining(REQUESTS_PER_MINUTE), topics, retry=llmq.Retry(attempts=20)) as outcomes:
            async for outcome in outcomes:
                outcome.unwrap()

    await in_virtual_time(run)
    return queue.records()


records = await recorded(AT_ONCE)
picture = plot_timeline(records, limit=AT_ONCE)
picture.axes[0].set_xlim(0, 30)
picture

# %% [markdown]
# The first half minute. A run in the red: the ticks at the bottom are refusals.
#
# Of your own run you get the same with `llmq run --trace out/trace.jsonl`, or from any queue with `write_trace`. A
# trace holds times, outcomes, tokens and limits; no prompts, no answers, no names of services.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "trace.jsonl"
write_trace(path, records, level=AT_ONCE)
print(*path.read_text().splitlines()[:3], sep="\n")

# %% [markdown]
# ## What would other numbers of calls at once have brought?

# %%
LEVELS = [4, 8, 16, 32]
trace = Trace.read(path)
as_it_was = await what_if(trace, LEVELS, calls=500, refine=False)
print(as_it_was)

# %% [markdown]
# The model found the limit by itself (`Known`, at the bottom), and states how far it is off: the recorded level is
# simulated, too, and held against what really happened.
#
# ## What if the limit were doubled?

# %%
doubled = await what_if(trace, LEVELS, calls=500, requests_per_minute=2 * REQUESTS_PER_MINUTE)
doubled.plot()

# %%
print(doubled.recommend())

# %% [markdown]
# A number to ask your provider for, and the setting to use on the day when it is granted. Is it right? Here we can look
# it up, since the provider is ours: measure one that really has twice the limit.

# %%
measured = await llmq.sweep(
    outlining(2 * REQUESTS_PER_MINUTE),
    ["tea", "rain", "salt", "wool"],
    LEVELS,
    virtual=True,
    calls=500,
    refine=False,
    on_progress=lambda progress: None,
)


def goodput(sweep):
    """Successful calls a second by level, without a pace."""
    return {point.level: point.goodput for point in sweep.judged() if not point.setting.paced}


both = pd.DataFrame({"what if": goodput(doubled), "measured": goodput(measured)}).loc[LEVELS]
both["error"] = both["what if"] / both["measured"] - 1
both.round(3)

# %%
lines = both[["what if", "measured"]].plot(
    style=["o--", "s-"], xlabel="calls at once", ylabel="successful calls a second"
)
# %% [markdown]
# ## What a recording does not know
#
# A run with 4 calls at once never met the limit. What 16 at once would bring is then anybody's guess, and a guess is
# not what you want to pay for:

# %%
timid = await what_if(Trace.from_records(await recorded(4, 400), 4), LEVELS, calls=500)
print(timid.recommend())

# %% [markdown]
# So record a run that meets its limits, or give those that you know of, as above.
#
# ## What this notebook claims, checked

# %%
assert abs(as_it_was.agreement.goodput_error) < 0.05, as_it_was.agreement
known = goodput(as_it_was)
assert abs(known[32] / known[16] - 1) < 0.06, "the limit was found: more at once bring no more"
assert both["error"].abs().max() < 0.08, "what if, held against what is measured"

# %%
answer = doubled.recommend()
assert answer.binds == "requests", answer
assert 0.95 * 2 * REQUESTS_PER_MINUTE <= answer.requests_per_minute <= 2 * REQUESTS_PER_MINUTE, answer
assert timid.recommend().level is None, "what nobody has seen is not recommended"
assert timid.unknown_levels == (8, 16, 32)

# %%
folder.cleanup()
