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
# # How many calls should run at once?
#
# You have a few coroutines that call a model, and a list of items to run them over. Too few calls at once, and the run
# takes all night; too many, and the provider answers 429. This notebook measures, and ends with a number.
#
# It needs no key: a simulated provider on this machine stands in for yours. It allows 3,600 requests a minute, takes
# about 0.2 s a call, so 60 calls a second, about **12 at once**, are what there is to be had. The sweep is not told.

# %%
from openai import AsyncOpenAI

import llmq
from llmq.testing import serve_provider

provider = serve_provider(latency_seconds=0.2, requests_per_minute=3600, bucket_seconds=1)
client = AsyncOpenAI(base_url=provider.url, api_key="none-needed", max_retries=0)


async def ask(prompt):
    answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
    return answer.choices[0].message.content


# %% [markdown]
# Three stages. A stage's parameters after the first name the stages that it needs.


# %%
async def outline(topic):
    return await ask(f"Outline an article on {topic}.")


async def draft(topic, outline):
    return await ask(f"Write the article on {topic}: {outline}")


async def title(topic, draft):
    return await ask(f"Find a title for: {draft}")


pipeline = llmq.Pipeline([outline, draft, title])

# %%
sweep = await llmq.sweep(pipeline, ["tea", "rain", "salt", "wool"], [4, 8, 16, 32], seconds=1)
print(sweep.recommend())

# %% [markdown]
# Without a pace, more than 12 at once bring nothing but refusals, since a number of slots alone cannot hold a rate. So
# a pace belongs to the answer, and a few slots in reserve: calls do not all take the same time. (A window of a second
# may show a little more than 60 a second, from what the provider's bucket held.)

# %%
sweep.plot()

# %%
columns = ["level", "requests_per_minute", "goodput", "goodput_low", "goodput_high", "share_429", "service_p95"]
sweep.frame[columns].round(3)

# %% [markdown]
# The claim of this notebook, checked: the recommended level and pace bring most of what the limit allows, and
# no more than one attempt in a hundred is refused. Fewer than 12 at once could not bring it. How many more it takes is
# known only roughly after half a minute, and none of them costs a refusal: the pace holds.

# %%
answer = sweep.recommend()
assert answer.binds == "requests", answer
assert 0.9 * 60 <= answer.goodput <= 1.05 * 60, answer
assert 0.95 * 3600 <= answer.requests_per_minute <= 3600, answer
assert answer.share_429 <= 0.01, answer
assert 12 <= answer.level <= 32, answer

# %%
await client.close()
provider.stop()
