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
# # Retries: what SDKs hide
#
# A provider that has had enough of you answers **429**, "too many requests". You may never have seen one, since the
# SDKs of most providers try again by themselves, twice by default, without a word. That is kind, and it hides what
# you need to know: how often you are refused, and how much of your speed is real.
#
# This notebook puts a real HTTP server on this machine, which counts what really arrives, and calls it with the
# `openai` SDK in four ways.

# %%
REQUESTS_PER_MINUTE = 2400
CALLS = 150
AT_ONCE = 16

# %%
import asyncio

import pandas as pd
from openai import AsyncOpenAI

import llmq
from llmq.testing import serve_provider
from llmq.tune.timelines import plot_timeline

provider = serve_provider(latency_seconds=0.2, requests_per_minute=REQUESTS_PER_MINUTE, bucket_seconds=1)


async def ask(client, n):
    question = {"role": "user", "content": f"Outline chapter {n}."}
    return await client.chat.completions.create(model="m", messages=[question])


# %% [markdown]
# ## The code that everybody writes
#
# A semaphore, so that no more than a few calls run at once, and `gather`. The client is the SDK's, as it comes. All
# that your code gets to know is whether a call has raised in the end.


# %%
async def with_a_semaphore(client):
    """Ask CALLS times. Returns how many calls raised."""
    semaphore = asyncio.Semaphore(AT_ONCE)

    async def one(n):
        async with semaphore:
            return await ask(client, n)

    answers = await asyncio.gather(*(one(n) for n in range(CALLS)), return_exceptions=True)
    return sum(isinstance(answer, Exception) for answer in answers)


async def account(run):
    """What the code saw of a run, and what the provider counted meanwhile."""
    before = provider.stats()
    errors = await run
    counted = {name: provider.stats()[name] - before[name] for name in ("requests", "refused")}
    return {"calls": CALLS, "errors": errors, **counted}


# %%
seen = {}
async with AsyncOpenAI(base_url=provider.url, api_key="none-needed") as client:
    seen["SDK as it comes"] = await account(with_a_semaphore(client))

bars = pd.DataFrame(seen).plot.bar(rot=0, title="one run, as the code and as the provider saw it", legend=False)
# %% [markdown]
# The two bars on the left are what your code saw, the two on the right what the provider counted. Each call that the
# provider refused was sent again, and again: most refusals never reached you, and requests that you know nothing of
# used up room that other calls needed.
#
# ## "Just raise max_retries"
#
# The errors go away, or nearly so:

# %%
async with AsyncOpenAI(base_url=provider.url, api_key="none-needed", max_retries=20) as client:
    seen["SDK, max_retries=20"] = await account(with_a_semaphore(client))

pd.DataFrame(seen).T

# %% [markdown]
# The code sees hardly an error now, and the provider has been asked far more often than there were questions. Some
# providers count refused requests against your limit, too; and a plot of *your* errors against the number of calls
# at once would show none, whatever that number is.
#
# ## Hand the retries to the queue
#
# `llmq.wrap(client)` lets the queue see each request as it leaves, and retry in place of the SDK. A call that was
# refused gives its slot back while it waits, and where the provider says "come back in 0.3 s" (Retry-After), *all*
# callers stay away for so long, and not just the one who was told.

# %%
queue = llmq.LLMQueue(AT_ONCE)


async def through(queue, client):
    """Ask CALLS times. Returns how many calls raised."""
    errors = 0
    async with queue.map(lambda n: ask(client, n), range(CALLS), retry=llmq.Retry(attempts=20)) as outcomes:
        async for outcome in outcomes:
            errors += outcome.error is not None
    return errors


async with llmq.wrap(AsyncOpenAI(base_url=provider.url, api_key="none-needed")) as client:
    seen["queue"] = await account(through(queue, client))

# %% [markdown]
# Now you know of every request, which call it belonged to, and what was limited:

# %%
attempts = queue.records().attempts.to_pandas()
attempts.groupby(["outcome", "status_code", "limit_type"], dropna=False).agg(
    requests=("attempt", "size"), service_p50=("service_seconds", "median"), most_attempts=("attempt", "max")
).round(3)

# %%
plot_timeline(queue.records(), limit=AT_ONCE)

# %% [markdown]
# Ticks are refusals, hatched is the time for which the provider had said to stay away.
#
# ## Better than a good retry: none
#
# Once you can see refusals you can do something about them. Here the limit is known, so start one call every so often
# (notebooks 00 to 02 show how to find that pace):

# %%
paced = llmq.LLMQueue(AT_ONCE, limits=[llmq.Rate(0.97 * REQUESTS_PER_MINUTE)])

async with llmq.wrap(AsyncOpenAI(base_url=provider.url, api_key="none-needed")) as client:
    seen["queue, paced"] = await account(through(paced, client))

found = pd.DataFrame(seen).T
found

# %%
counted = found.assign(successful=found.requests - found.refused)[["successful", "refused"]]
bars = counted.plot.barh(stacked=True, title="requests, as the provider counted them", color=["#5b9bd5", "#b3261e"])
# %% [markdown]
# ## If you keep your own client
#
# A client that goes on retrying by itself is noticed in its first calls. A warning says so once, a sweep says that its
# share of 429 cannot be trusted, and you can ask:

# %%
import logging

logging.getLogger("llmq").setLevel(logging.ERROR)  # the warning, which repeats what the next line shows

unseen = llmq.LLMQueue(AT_ONCE)
async with AsyncOpenAI(base_url=provider.url, api_key="none-needed") as client:
    await unseen.submit(lambda: ask(client, 1))
unseen.hidden_retries

# %% [markdown]
# ## What this notebook claims, checked
#
# The SDK hides requests and refusals; raising `max_retries` hides more of them; through the queue every request that
# arrived is on record; with a pace hardly any is refused.

# %%
plain, patient, queued, best = (found.loc[name] for name in seen)
assert plain.requests - plain.calls >= 0.2 * CALLS, "requests that the code knows nothing of"
assert plain.errors < plain.refused
assert patient.errors < plain.errors, "fewer errors ..."
assert patient.requests > plain.requests, "... and more requests"

# %%
assert queued.errors == best.errors == 0
assert len(attempts) == queued.requests, "each request is on record"
assert (attempts.outcome == "rejected").sum() == queued.refused, "each refusal, too"
assert queued.refused < patient.refused
assert best.refused <= 0.02 * CALLS
assert unseen.hidden_retries

# %%
provider.stop()
