"""The sweep explorer: by its widgets in this process, and once in a real kernel against a real server."""

import asyncio
import re
import threading
import time

import nbclient
import nbformat
import pytest

from llmq import Pipeline
from llmq.errors import ConfigError
from llmq.notebook import explorer, exploring
from llmq.notebook.exploring import NOTHING_TO_PREDICT, PREDICTED
from llmq.notebook.pictures import points_svg
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider, serve_provider
from llmq.tune.guard import Caps
from llmq.tune.standing import Bounds

OPTIONS = {"virtual": True, "calls": 100, "refine": False}


class Asking:
    """A call to a simulated provider that counts."""

    def __init__(self, **spec):
        self.provider = SimulatedProvider(ProviderSpec(**{"latency_seconds": 1, **spec}))
        self.calls = 0

    async def __call__(self, item):
        self.calls += 1
        messages = [{"role": "user", "content": f"{item} {self.calls}"}]
        return await self.provider.complete(ChatRequest("m", messages))


def run(main):
    """On a real loop, as in a kernel."""
    return asyncio.run(main())


async def end_of(found):
    while found.task is not None:
        await asyncio.wait([found.task])


def field(found, label):
    """The widget of that label."""
    left = [found.widget]
    while left:
        widget = left.pop()
        if getattr(widget, "description", None) == label:
            return widget
        left += getattr(widget, "children", ())
    raise LookupError(label)


def test_nothing_is_called_before_the_button_and_then_it_ends_in_the_operating_point():
    ask = Asking()

    async def main():
        found = explorer(ask, range(5), [2, 4], title="the simulated one", **{**OPTIONS, "calls": 600})
        await asyncio.sleep(0)
        assert ask.calls == 0
        assert found.sweep is None
        assert "If a call takes 1 s: up to about" in found._said.value
        assert "the simulated one" in found._repr_html_()
        field(found, "Measure").click()
        assert found._measure_button.disabled
        assert not found._cancel_button.disabled
        await end_of(found)
        return found

    found = run(main)
    assert ask.calls > 200
    assert {point.level for point in found.sweep.points} == {2, 4}
    assert found.error is None
    assert found._progress.value == found._progress.max == len(found.sweep.points)
    assert "all of it uses up to about" in found._said.value
    assert "tokens" in found._said.value
    assert found._status.value == "Done."
    assert "Recommended: 4 calls at once" in found._picture.value
    assert "llm_queue_concurrency: 4" in found._picture.value
    assert "llm_queue_enabled: true" in found._picture.value
    assert "data:image/png;base64," in found._picture.value
    static = found._repr_html_()
    assert "llm_queue_concurrency: 4" in static
    assert "data:image/png" in static
    assert "<script" not in static
    assert not found._measure_button.disabled
    assert found._cancel_button.disabled


def test_the_views_are_of_measured_levels_only():
    async def main():
        found = explorer(Asking(), range(5), [2, 4], **OPTIONS)
        field(found, "Measure").click()
        await end_of(found)
        return found

    found = run(main)
    choice = field(found, "measured")
    assert [label for label, _ in choice.options] == ["2 at once", "4 at once"]
    assert choice.value == 0
    assert "<td>2 calls at once</td>" in found._figures.value, "something is shown before anything is chosen"
    for number, level in ((1, 4), (0, 2)):
        choice.value = number
        assert f"<td>{level} calls at once</td>" in found._figures.value


def test_it_draws_while_it_runs(monkeypatch):
    monkeypatch.setattr("llmq.notebook.exploring.DRAW_SECONDS", 0.0)
    drawn = []

    async def main():
        found = explorer(Asking(), range(5), [1, 2, 4], **OPTIONS)
        found._picture.observe(lambda change: drawn.append(change["new"].count("<circle")), "value")
        field(found, "Measure").click()
        await end_of(found)
        return found

    found = run(main)
    windows = len(found.sweep.points)
    assert [count for count in drawn if count] == list(range(1, windows + 1))


def test_the_form_says_what_is_measured_and_fills_the_guess():
    async def main():
        ask = Asking()
        found = explorer(ask, range(5), [2, 4], caps=Caps(calls=90), **OPTIONS)
        assert field(found, "at most calls").value == "90"
        before = found._said.value
        field(found, "calls at once").value = "1, 3"
        field(found, "at most calls").value = "230"
        assert found._said.value != before
        field(found, "Measure").click()
        await end_of(found)
        assert ask.calls == 230
        assert found._status.value == "The sweep stopped at the cap of 230 calls."
        return found

    levels = {point.level for point in run(main).sweep.points}
    assert levels
    assert levels <= {1, 3}


@pytest.mark.parametrize(
    ("label", "text", "said"),
    [
        ("calls at once", "four", "levels are whole numbers, like 1 2 4 8; got &#x27;four&#x27;"),
        ("calls at once", "0 1", "each at least 1"),
        ("seconds each", "-1", "seconds is a number above 0, or empty; got &#x27;-1&#x27;"),
        ("USD", "much", "the cap on cost is a number above 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_nothing_is_called(label, text, said):
    ask = Asking()

    async def main():
        found = explorer(ask, range(5), [2], **OPTIONS)
        field(found, label).value = text
        field(found, "Measure").click()
        assert found.task is None
        assert said in found._status.value
        assert not found._measure_button.disabled

    run(main)
    assert ask.calls == 0


def test_cancel_ends_all_calls_and_keeps_what_was_measured():
    alive = 0

    async def ask(item):
        nonlocal alive
        alive += 1
        try:
            await asyncio.sleep(1)
        finally:
            alive -= 1

    async def main():
        found = explorer(ask, range(5), [2, 4, 8], virtual=True, calls=100, refine=False)
        first = asyncio.Event()
        found._progress.observe(lambda change: change["new"] >= 1 and first.set(), "value")
        found._options["on_progress"] = lambda progress: progress.done and time.sleep(0.05)
        field(found, "Measure").click()
        await first.wait()
        field(found, "Cancel").click()
        await end_of(found)
        return found

    found = run(main)
    assert alive == 0
    assert found._status.value == "Cancelled."
    assert 1 <= len(found.sweep.points) < 4
    assert "The sweep was cancelled." in str(found.sweep.recommend())
    assert not found._measure_button.disabled


def test_a_click_from_another_thread_runs_on_the_loop_of_the_cell():
    ask = Asking()

    async def main():
        found = explorer(ask, range(5), [2], **OPTIONS)
        ended = asyncio.Event()
        found._status.observe(lambda change: change["new"] == "Done." and ended.set(), "value")
        thread = threading.Thread(target=field(found, "Measure").click)
        thread.start()
        await ended.wait()
        thread.join()
        await end_of(found)
        return found

    assert run(main).sweep.points


def test_an_error_is_one_line_and_is_kept():
    async def broken(item):
        raise TypeError("a <bug>\nover two lines")

    async def main():
        found = explorer(broken, range(5), [2], **OPTIONS)
        field(found, "Measure").click()
        await end_of(found)
        return found

    found = run(main)
    assert found._status.value == "TypeError: a &lt;bug&gt; over two lines"
    assert isinstance(found.error, TypeError)
    assert found.sweep is None
    assert "TypeError: a &lt;bug&gt;" in found._repr_html_()
    assert not found._measure_button.disabled


def test_it_can_be_run_again():
    async def main():
        found = explorer(Asking(), range(5), [2], **OPTIONS)
        for level in (2, 3):
            field(found, "calls at once").value = str(level)
            field(found, "Measure").click()
            await end_of(found)
            assert {point.level for point in found.sweep.points} == {level}

    run(main)


def test_predict_makes_a_few_calls_and_says_what_all_of_it_would_use():
    ask = Asking()

    async def main():
        found = explorer(ask, range(5), [2, 4], **OPTIONS)
        field(found, "Predict").click()
        assert field(found, "Measure").disabled
        await end_of(found)
        assert 0 < ask.calls <= 8 + 4, "some may be under way when eight have ended"
        for shown in (found._said.value, found._repr_html_(), repr(found)):
            assert "all of it uses up to about" in shown
            assert "tokens" in shown
            assert "Nothing has been called yet" not in shown
        assert found._status.value == PREDICTED
        assert (found.sweep, found.error, field(found, "Measure").disabled) == (None, None, False)
        field(found, "Measure").click()
        await end_of(found)
        assert found.sweep.points

    run(main)


def test_predict_touches_no_folder_and_says_where_a_cap_leaves_nothing_to_predict_from(tmp_path):
    async def main():
        found = explorer(Asking(), range(5), [2, 4], caps=Caps(tokens=10), out=tmp_path, **OPTIONS)
        field(found, "Predict").click()
        await end_of(found)
        assert found._status.value == NOTHING_TO_PREDICT
        field(found, "tokens").value = "300000"
        field(found, "Predict").click()
        await end_of(found)
        assert found._status.value == PREDICTED
        field(found, "calls at once").value = "2"
        assert "all of it uses" not in found._said.value, "that was of another form"

    run(main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_ended_before_its_first_step_it_can_be_used_again(end):
    async def main():
        found = explorer(Asking(), range(5), [2], **OPTIONS)
        found.measure()
        getattr(found, end)()
        await asyncio.wait([found.task])
        await asyncio.sleep(0)
        assert found.task is None
        if end == "cancel":
            assert found._status.value == "Cancelled."
            field(found, "Measure").click()
            await end_of(found)
            assert found.sweep.points

    run(main)


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_ended_while_its_last_picture_is_drawn_it_keeps_its_result(end, monkeypatch):
    drawing, going_on = threading.Event(), threading.Event()
    plain = exploring._drawn

    def drawn(found):
        drawing.set()
        going_on.wait(30)
        return plain(found)

    monkeypatch.setattr(exploring, "_drawn", drawn)

    async def main():
        found = explorer(Asking(), range(5), [2], **OPTIONS)
        found.measure()
        assert await asyncio.to_thread(drawing.wait, 30)
        getattr(found, end)()
        assert "<pre>" in found._repr_html_()
        going_on.set()
        await end_of(found)
        assert "data:image/png" in found._repr_html_()
        assert "Done." in found._repr_html_()

    run(main)


def test_a_run_that_measures_nothing_leaves_what_an_earlier_one_has_measured(tmp_path):
    async def main():
        found = explorer(Asking(), range(5), [2], out=tmp_path, **OPTIONS)
        field(found, "Measure").click()
        await end_of(found)
        earlier, picture = found.sweep, found._result
        field(found, "Measure").click()
        await end_of(found)
        assert "holds a sweep already" in found._status.value
        assert (found.sweep, found._result) == (earlier, picture)
        assert "holds a sweep already" in found._repr_html_()

    run(main)


def test_the_guess_heeds_what_is_added_the_clock_and_the_caps():
    found = explorer(Asking(), range(5), [2], calls=100, caps=Caps(calls=500, cost=2.5))
    said = found._expected()
    assert "It stops at 500 calls or 2.50 USD at the latest." in said
    field(found, "add levels and paces as needed").value = False
    field(found, "at most calls").value = field(found, "USD").value = ""
    assert "It stops" not in found._expected()
    assert most_calls(found._expected()) < most_calls(said)
    assert most_calls(explorer(Asking(), range(5), [2], calls=100, virtual=True)._expected()) > most_calls(said)


def most_calls(said):
    return int(re.search(r"up to about (\d+) calls", said)[1])


def test_without_a_loop_it_says_so():
    found = explorer(Asking(), range(5), [2])
    field(found, "Measure").click()
    assert found._status.value.startswith("No event loop is running here")


def test_without_ipywidgets_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("llmq.notebook.exploring.find_spec", lambda name: None)
    found = explorer(Asking(), range(5), [2, 4])
    assert "pip install 'llmq-toolkit[notebook]'" in capsys.readouterr().out
    assert found.widget is None
    found.measure()
    assert "pip install" in capsys.readouterr().out
    assert "If a call takes 1 s" in found._repr_html_()
    assert "text/html" in found._bundle()
    assert not any("widget" in name for name in found._bundle())


def test_closed_it_leaves_the_static_result(capsys):
    async def main():
        found = explorer(Asking(), range(5), [2], **OPTIONS)
        assert "application/vnd.jupyter.widget-view+json" in found._bundle()
        field(found, "Measure").click()
        await end_of(found)
        found.close()
        assert set(found._bundle()) == {"text/plain", "text/html"}
        assert "data:image/png" in found._bundle()["text/html"]
        found.measure()

    run(main)
    assert "This explorer is closed" in capsys.readouterr().out


def test_a_pipeline_is_named_by_its_stages_and_markup_in_names_is_text():
    async def outline(item): ...

    async def draft(item, outline): ...

    found = explorer(Pipeline([outline, draft]), ["a"], [1], title="<b>x</b>")
    assert "outline → draft, &lt;b&gt;x&lt;/b&gt;" in found._repr_html_()


def test_an_option_that_sweep_has_not_is_refused_at_once():
    with pytest.raises(TypeError, match="second"):
        explorer(Asking(), range(5), [1], second=3)
    with pytest.raises(ConfigError, match="more than 0"):
        explorer(Asking(), range(5), [1], caps=Caps(calls=0))
    with pytest.raises(ConfigError, match=r"caps are llmq.tune.guard.Caps\(calls=500, cost=2.0, ...\), got {}"):
        explorer(Asking(), range(5), [1], caps={})
    with pytest.raises(ConfigError, match="the items are a list or an iterator; got None"):
        explorer(Asking(), None, [1])
    with pytest.raises(ConfigError, match="a Pipeline, or an async function of one item; got None"):
        explorer(None, range(5), [1])


def test_the_small_picture_is_hollow_where_a_bound_is_broken():
    async def main():
        found = explorer(Asking(max_concurrency=2), range(5), [2, 8], **OPTIONS)
        field(found, "Measure").click()
        await end_of(found)
        return found.sweep.points

    points = run(main)
    svg = points_svg(points, Bounds())
    assert svg.count('fill="none"') == sum(p.level == 8 for p in points)
    assert points_svg([], Bounds()) == ""


SETUP = """
import asyncio, llmq
from llmq.notebook import explorer
from llmq.notebook.exploring import PREDICTED
from openai import AsyncOpenAI
client = AsyncOpenAI(base_url=URL, api_key="none", max_retries=0)
async def ask(prompt):
    return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
found = explorer(ask, ["tea", "rain"], [1], seconds=1, refine=False)
found
""".strip()
SHOWS = "print(found._measure_button.model_id)"
ENDS = """
while found.task is not None:
    await asyncio.sleep(0.05)
assert found._progress.value == found._progress.max == len(found.sweep.points)
print(found._status.value, found.sweep.recommend())
found
""".strip()


@pytest.mark.filterwarnings("default")  # Jupyter's own start-up on Python 3.11 leaves warnings that are not ours
@pytest.mark.alone
def test_in_a_kernel_a_click_of_the_front_end_measures_and_nothing_is_requested_before(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))

    async def main(provider):
        texts = [f"URL = {provider.url!r}\n{SETUP}", SHOWS, ENDS]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
        client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
        async with client.async_setup_kernel():
            shown, button, ended = notebook.cells
            await client.async_execute_cell(shown, 0)
            await client.async_execute_cell(button, 1)
            before = provider.stats()["requests"]
            click = {"method": "custom", "content": {"event": "click"}}
            content = {"comm_id": button["outputs"][0]["text"].strip(), "data": click}
            client.kc.shell_channel.send(client.kc.session.msg("comm_msg", content))
            await client.async_execute_cell(ended, 2)
        return before, ended

    with serve_provider(latency_seconds=0.05) as provider:
        before, ended = asyncio.run(main(provider))
        after = provider.stats()["requests"]
    assert before == 0
    assert after > 15
    text = "".join(output.get("text", "") for output in ended["outputs"])
    assert re.search(r"Done\. (Recommended: \d|No level can)", text), text
    (display,) = (output for output in ended["outputs"] if output["output_type"] == "display_data")
    assert "image/png" in display["data"]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in display["data"]
    assert "at once" in display["data"]["text/plain"], "the table is text in a kernel, too"


def test_levels_may_be_text_and_are_refused_if_they_are_neither():
    assert field(explorer(Asking(), range(5), "16 32", **OPTIONS), "calls at once").value == "16 32"
    with pytest.raises(ConfigError, match="a list of whole numbers; got 3"):
        explorer(Asking(), range(5), 3, **OPTIONS)
