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
# # Rate-limit lab: what concurrency cannot buy
#
# Most providers sell you a **rate**: so many requests a minute, so many tokens a minute. A rate is not a number of
# calls at once, and no number of calls at once turns into a higher rate. This notebook lets you see what happens
# when somebody tries: first with many calls at once, then with a pace, then with the things that do help.
#
# The provider is simulated, on a clock of its own, so nothing is paid and hours take seconds. Its limit:

# %%
REQUESTS_PER_MINUTE = 600
SECONDS_PER_CALL = 1.0

# %%
import llmq
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider
from llmq.tune.plots import plot_goodput, plot_outcomes
from llmq.tune.timelines import plot_timeline

TOPICS = ["tea", "rain", "salt", "wool"]


def new_provider(requests_per_minute=REQUESTS_PER_MINUTE, seconds_per_call=SECONDS_PER_CALL, bucket_seconds=1):
    return SimulatedProvider(
        ProviderSpec(
            latency_seconds=seconds_per_call, requests_per_minute=requests_per_minute, bucket_seconds=bucket_seconds
        )
    )


def outlining(provider):
    """A coroutine function that asks this provider."""

    async def outline(topic):
        question = {"role": "user", "content": f"Outline an article on {topic}."}
        return await provider.complete(ChatRequest(model="m", messages=[question]))

    return outline


def quietly(progress):
    """Without this a sweep shows a bar."""


# %% [markdown]
# ## More and more calls at once
#
# `refine=False`: measure these levels and nothing else. No pace, just slots, as a semaphore would do it.

# %%
LEVELS = [4, 8, 16, 32]
slots_only = await llmq.sweep(
    outlining(new_provider()), TOPICS, LEVELS, virtual=True, calls=1000, refine=False, on_progress=quietly
)
plot_outcomes(slots_only)

# %% [markdown]
# Beyond the knee one attempt in two is refused. Here is what somebody sees who counts *answers* instead of
# *successes*: `attempt_rate` goes on growing and looks like speed. `goodput`, successful calls a second, is what you
# have at the end of the day.

# %%
table = slots_only.frame.query("purpose == 'level'").set_index("level")
table[["attempt_rate", "goodput", "share_429", "wait_p50", "service_p50"]].round(2)

# %% [markdown]
# `wait_p50` is what the surplus buys: calls that stand in your own queue, or come back from a refusal.
#
# Close up, ten seconds at the highest level. There are many slots, but no more calls in flight than at the knee: the
# others wait. Each red tick is a refusal, and hatched is the time for which the provider said to stay away
# (Retry-After), which llmq obeys for all callers alike. Without that there would be many times as many ticks.

# %%
crowd = int(table.index.max())
picture = plot_timeline(slots_only.records[table.order[crowd]], limit=crowd)
picture.axes[0].set_xlim(10, 20)
picture

# %% [markdown]
# ## Fewer slots do not mend it
#
# So take fewer? Just below the knee nothing is refused, but the limit is not used up either, as calls do not all take
# equally long. A rate is met by a **pace**: start a call every so often, however many are still under way. A sweep
# that is left to itself finds that out:

# %%
sweep = await llmq.sweep(outlining(new_provider()), TOPICS, LEVELS, virtual=True, calls=1000, on_progress=quietly)
answer = sweep.recommend()
print(answer)

# %% [markdown]
# Diamonds were paced; hollow marks had too many refusals. The dotted line is what all attempts together would promise.

# %%
plot_goodput(sweep)

# %% [markdown]
# ## The first minute lies
#
# Limits are often kept as a **bucket**: what you do not use is saved up, for a minute perhaps, and you can spend it
# in one go. So a first try of a minute brings about twice what the limit allows, and whoever writes that number down
# will be refused from the second minute on. Below: 32 at once, no pace, a bucket that holds a minute's worth.
#
# `in_virtual_time` runs a coroutine on a clock that jumps to the next event instead of waiting for it.

# %%
from llmq.testing import in_virtual_time


async def five_minutes_worth():
    provider = new_provider(bucket_seconds=60)
    queue = llmq.LLMQueue(32, max_records=0)
    topics = (f"{TOPICS[n % len(TOPICS)]}, part {n}" for n in range(5 * REQUESTS_PER_MINUTE))
    async with queue.map(outlining(provider), topics, retry=llmq.Retry(attempts=100)) as outcomes:
        async for outcome in outcomes:
            outcome.unwrap()
    return provider.stats(calls=True)["calls"]


# %%
import pandas as pd

calls = pd.DataFrame(await in_virtual_time(five_minutes_worth))
calls["minute"] = (calls.ended_at // 60 + 1).astype(int)
by_minute = calls.groupby("minute").status.value_counts().unstack(fill_value=0)
by_minute.rename(columns={200: "successful", 429: "refused"})

# %%
bars = by_minute[200].plot.bar(title="successful calls by minute", xlabel="minute", rot=0)
# %% [markdown]
# A sweep therefore empties the bucket before it measures, and says so of a limit that it cannot have seen.
#
# ## What does help
#
# Two things to change, one at a time. Do calls that take half as long bring more? Does a limit that is twice as high?

# %%
tried = {
    "as it is": new_provider(),
    "calls take half as long": new_provider(seconds_per_call=SECONDS_PER_CALL / 2),
    "twice the limit": new_provider(requests_per_minute=2 * REQUESTS_PER_MINUTE),
}
answers = {
    name: (
        await llmq.sweep(outlining(provider), TOPICS, LEVELS, virtual=True, calls=1000, on_progress=quietly)
    ).recommend()
    for name, provider in tried.items()
}
found = pd.DataFrame(
    {name: (a.level, a.requests_per_minute, a.goodput) for name, a in answers.items()},
    index=["calls at once", "requests a minute", "goodput"],
).T
found.round(1)

# %% [markdown]
# Faster calls bring no more calls a second: they need fewer slots for the same rate. Only the limit moves the goodput.
# What you can do about the limit: ask for a higher one, spread the work over models that have limits of their own, put
# several questions into one call if requests are what is limited, or say less if it is tokens.
#
# ## What this notebook claims, checked

# %%
limit_per_second = REQUESTS_PER_MINUTE / 60
beyond = table[table.index > 1.2 * limit_per_second * SECONDS_PER_CALL]
assert len(beyond) >= 2
assert beyond.goodput.between(0.93 * limit_per_second, 1.05 * limit_per_second).all(), "more slots, the same goodput"
assert (beyond.share_429 > 0.3).all(), "more slots, more refusals"
assert beyond.wait_p50.is_monotonic_increasing, "more slots, longer waits"

# %%
assert 0.95 * REQUESTS_PER_MINUTE <= answer.requests_per_minute <= REQUESTS_PER_MINUTE, answer
assert 0.95 * limit_per_second <= answer.goodput <= 1.02 * limit_per_second, answer
assert answer.share_429 <= 0.01, answer

# %%
first, *later = by_minute[200]
assert first > 1.5 * REQUESTS_PER_MINUTE, "the first minute has the bucket's content on top"
assert all(count <= 1.02 * REQUESTS_PER_MINUTE for count in later[1:]), "and from then on the limit holds"

# %%
goodput = found["goodput"]
assert abs(goodput["calls take half as long"] / goodput["as it is"] - 1) < 0.05
assert abs(goodput["twice the limit"] / goodput["as it is"] - 2) < 0.1
