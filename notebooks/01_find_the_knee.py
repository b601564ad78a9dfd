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
# # Find the knee
#
# Send one call after the other, and most of the time you wait. Send more of them at once, and more get done; but only
# up to a point. Beyond it more calls at once bring nothing, or do harm. That point is the **knee** of the curve, and
# it is the number that you are looking for.
#
# This notebook finds it for a provider that exists only in this process, on a clock of its own: hours pass in a
# second, and nothing is paid. These two numbers say what the provider is like. Change them and run the notebook again.

# %%
REQUESTS_PER_MINUTE = 600
SECONDS_PER_CALL = 1.0

# %%
import llmq
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider

provider = SimulatedProvider(
    ProviderSpec(latency_seconds=SECONDS_PER_CALL, requests_per_minute=REQUESTS_PER_MINUTE, bucket_seconds=1)
)


async def outline(topic):
    question = {"role": "user", "content": f"Outline an article on {topic}."}
    return await provider.complete(ChatRequest(model="m", messages=[question]))


# %% [markdown]
# `llmq.sweep` calls your coroutine with 1, 2, 4 ... calls at once, a thousand calls each, and adds what it finds worth
# knowing in between. The sweep is not told the two numbers above.

# %%
TOPICS = ["tea", "rain", "salt", "wool"]
LEVELS = [1, 2, 4, 8, 16, 32]


def quietly(progress):
    """Without this a sweep shows a bar."""


sweep = await llmq.sweep(outline, TOPICS, LEVELS, virtual=True, calls=1000, on_progress=quietly)
sweep.plot()

# %% [markdown]
# Top left: successful calls a second, which is called **goodput**. It doubles with the number of calls at once, and
# then it stops. Below: from there on the provider answers **429**, "too many requests", and half of all attempts are
# wasted. Right: how long a call takes, and how long it waits for its turn; the wait grows, the call itself does not.
#
# The same in words, with what to put into your settings:

# %%
print(sweep.recommend())

# %% [markdown]
# ## Why it is there
#
# You could have said it beforehand, if you had known the provider's limit and how long a call takes:
#
# > calls in flight = calls a second x seconds a call
#
# This is Little's law (1961). It holds for anything that has a way in and a way out. Seen from the other side, it says
# what a number of calls at once can bring as long as nothing limits it: `level / seconds a call`.

# %%
limit_per_second = REQUESTS_PER_MINUTE / 60
knee = limit_per_second * SECONDS_PER_CALL

frame = sweep.frame
slots = frame[(frame.purpose == "level") & frame.requests_per_minute.isna()].set_index("level")
expected = [min(level / SECONDS_PER_CALL, limit_per_second) for level in slots.index]
slots.assign(expected=expected)[["goodput", "expected", "share_429", "in_flight"]].round(2)

# %% [markdown]
# Two columns, one measured and one computed, and they agree. `in_flight` is how many calls were on their way on
# average: beyond the knee the provider does not let more in, however many you send.
#
# ## Another provider, another knee
#
# Not every provider refuses. One that you run yourself takes everything in and lets it stand in line. Then no call
# fails, goodput has its knee all the same, and what grows beyond it is the *time* a call takes.

# %%
SERVER_SLOTS = 8

provider = SimulatedProvider(ProviderSpec(latency_seconds=SECONDS_PER_CALL, server_slots=SERVER_SLOTS))
in_line = await llmq.sweep(outline, TOPICS, LEVELS, virtual=True, calls=500, on_progress=quietly)
in_line.plot()

# %%
print(in_line.recommend())

# %% [markdown]
# Compare the two answers. Where a *rate* is limited, a number of calls at once is not enough to keep within it, and a
# pace belongs to the answer: notebook 02 shows why. Where a *server* is full, the number alone will do.
#
# ## What this notebook claims, checked
#
# The recommended level lies at the knee that Little's law predicts, at most a few calls above it (service times vary,
# and a few calls in reserve keep the pace); it brings nearly all that the limit allows, and hardly anything is refused.

# %%
answer = sweep.recommend()
assert answer.binds == "requests", answer
assert knee <= answer.level <= 1.3 * knee + 4, answer
assert 0.95 * limit_per_second <= answer.goodput <= 1.02 * limit_per_second, answer
assert 0.95 * REQUESTS_PER_MINUTE <= answer.requests_per_minute <= REQUESTS_PER_MINUTE, answer
assert answer.share_429 <= 0.01, answer

full = in_line.recommend()
assert full.binds == "server", full
assert SERVER_SLOTS <= full.level <= SERVER_SLOTS + 1, full
assert full.requests_per_minute is None, full
