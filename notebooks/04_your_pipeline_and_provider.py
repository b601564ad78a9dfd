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
# # Your pipeline, your provider
#
# The other notebooks use a simulated provider. This one is the template for yours: your own coroutines, your endpoint,
# your key, and a guard on what the measurement may cost. As it stands it needs no key: while `BASE_URL` is None, a
# stand-in answers, on a clock that does not wait.

# %%
BASE_URL = None  # "https://api.example.com/v1"
API_KEY_ENV = "OPENAI_API_KEY"  # the name of the environment variable; never put a key into a notebook
MODEL = "small"
USD_PER_MILLION_INPUT_TOKENS, USD_PER_MILLION_OUTPUT_TOKENS = 0.15, 0.60
MAX_CALLS = 20_000
MAX_USD = 2.00
MAX_MINUTES = 30
LEVELS = [4, 8, 16, 32]

# %% [markdown]
# ## Your client
#
# `llmq.wrap` lets llmq see each request: refusals that the SDK would hide, and the tokens that each answer used. A
# client that cannot be wrapped tells its tokens by `llmq.report_tokens`, as the stand-in does.

# %%
import os
import tempfile
from pathlib import Path

from openai import AsyncOpenAI

import llmq
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider
from llmq.tune.guard import Caps, predict

STAND_IN = ProviderSpec(latency_seconds=0.5, requests_per_minute=1800, bucket_seconds=1)
stand_in = SimulatedProvider(STAND_IN)
client = None if BASE_URL is None else llmq.wrap(AsyncOpenAI(base_url=BASE_URL, api_key=os.environ[API_KEY_ENV]))


async def ask(prompt):
    messages = [{"role": "user", "content": prompt}]
    if client is None:
        answer = await stand_in.complete(ChatRequest(MODEL, messages))
        llmq.report_tokens(answer.prompt_tokens, answer.completion_tokens)
        return answer.content
    answer = await client.chat.completions.create(model=MODEL, messages=messages)
    return answer.choices[0].message.content


# %% [markdown]
# ## Your pipeline
#
# Coroutines, as stages: each is given the item, and the results of the stages that it comes after. The name of the
# model is for the limits and prices that go by it. If your work is a single call, give that to `llmq.sweep` in place of
# the pipeline.


# %%
async def outline(topic):
    return await ask(f"Outline an article on {topic}.")


async def draft(topic, outline):
    return await ask(f"Write the article on {topic}: {outline}")


pipeline = llmq.Pipeline(
    [
        llmq.Stage("outline", outline, model_name=MODEL),
        llmq.Stage("draft", draft, after=("outline",), model_name=MODEL),
    ]
)
ITEMS = ["tea", "rain", "salt", "wool"]

# %% [markdown]
# Does it work at all? One item, before anything is measured:

# %%
async with pipeline.run(ITEMS[:1]) as outcomes:
    async for outcome in outcomes:
        print({stage: f"{len(text)} characters" for stage, text in outcome.unwrap().items()})

# %% [markdown]
# ## What will it cost? Three answers, each better than the last
#
# **Before any call**, from a guess of how long a call takes. (`llmq tune --dry-run` prints the same.)

# %%
for seconds in (0.5, 1.0, 5.0):
    print(f"if a call takes {seconds:g} s:", predict(LEVELS, service_seconds=seconds, window_seconds=20.0))

# %% [markdown]
# **After eight calls**, from what they took and used. The sweep tells it to `on_plan`, and goes on only if that returns
# True. Here it never does: a dry run.

# %%
prices = {MODEL: llmq.Price(USD_PER_MILLION_INPUT_TOKENS, USD_PER_MILLION_OUTPUT_TOKENS)}
folder = tempfile.TemporaryDirectory()
out = Path(folder.name) / "sweep"
how = {"virtual": True, "calls": 500} if client is None else {}


def quietly(progress):
    """Without this a sweep shows a bar."""


async def measured(caps, **options):
    global stand_in
    stand_in = SimulatedProvider(STAND_IN)  # each sweep in virtual time begins at 0
    return await llmq.sweep(
        pipeline, ITEMS, LEVELS, prices=prices, caps=caps, on_progress=quietly, seed=1, **how, **options
    )


dry = await measured(Caps(MAX_CALLS, cost=MAX_USD, minutes=MAX_MINUTES), on_plan=lambda prediction: False)
print(dry.predicted)
print("The sweep", dry.stopped + ".")

# %% [markdown]
# **A hard stop.** A prediction can be wrong, a cap cannot: no call starts beyond it. What was measured by then is
# kept, on disk too (`out=`), and you get the answer that it allows.

# %%
TIGHT = 2500
tight = await measured(Caps(calls=TIGHT), out=out)
print("The sweep", tight.stopped + ".")
tight.frame[["level", "goodput", "share_429", "attempts", "cost"]]

# %% [markdown]
# ## The measurement
#
# `resume=True` goes on with the points in the folder. `on_plan` says what is coming, and agrees if that is within the
# budget.

# %%
kept = len(tight.points)


def agrees(prediction):
    print("This will use", prediction)
    return prediction.cost is None or prediction.cost <= MAX_USD


sweep = await measured(Caps(MAX_CALLS, cost=MAX_USD, minutes=MAX_MINUTES), out=out, resume=True, on_plan=agrees)
sweep.plot()

# %%
print(sweep.recommend())

# %%
spent = sweep.frame.cost.sum()
print(f"{sweep.frame.attempts.sum()} attempts in what was measured, {spent:.4f} USD")

# %% [markdown]
# ## Keep it in force
#
# `sweep.apply` writes the answer into your settings file and leaves all else there as it was.

# %%
settings = Path(folder.name) / "app.yaml"
settings.write_text("# settings of the night run\nconcurrency: 40  # services open at once\n")
if sweep.recommend().level is not None:
    sweep.apply(settings)
print(settings.read_text())

# %% [markdown]
# From then on `answer = await llmq.submit(lambda: ask(...))` keeps to it, wherever in the process it is called.
#
# ## What this notebook claims, checked

# %%
assert dry.points == []
assert dry.predicted.calls > 0
assert dry.predicted.cost > 0
assert tight.frame.attempts.sum() <= TIGHT
assert f"{TIGHT} calls" in tight.stopped, tight.stopped
assert [p.level for p in sweep.points[:kept]] == [p.level for p in tight.points], "nothing was lost"
assert 0 < spent <= MAX_USD

# %%
assert "# services open at once" in settings.read_text(), "comments are left alone"
if client is None:
    answer, most = sweep.recommend(), STAND_IN.requests_per_minute
    assert answer.binds == "requests", answer
    assert 0.95 * most <= answer.requests_per_minute <= most, answer
    assert f"llm_queue_concurrency: {answer.level}" in settings.read_text()

# %%
if client is not None:
    await client.close()
folder.cleanup()
