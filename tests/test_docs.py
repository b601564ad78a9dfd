"""The docs and the README: every code block is run or checked, every name exists, every link leads somewhere.

A page may say in comments, which its readers do not see:

    <!-- given: ask, topics -->      what its Python blocks find: the functions of that name in `Given`
    <!-- compiled: the reason -->    above a Python block that is compiled only
    <!-- needs: MODULE -->           above a Python block that is run where MODULE is there, else compiled only

The Python blocks of a page are one program, with `await` outside of functions as in a notebook. They run in virtual
time against the simulated provider; with `given: own_process`, for what sets the whole process up, in one of their own.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import typer

import llmq
from llmq.cli import app
from llmq.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(
    r"(?:^<!-- (?P<how>compiled|needs): (?P<what>[^>]+) -->\n\n?)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
SHOWN = {"text"}  # what something printed
SHELL = {"export", "cd", "git", "curl", "source"}


class Block(NamedTuple):
    """A code block: its text, the line it begins in, and what its page says of it."""

    language: str
    text: str
    line: int
    how: str | None
    what: str | None


def blocks(page, language=None):
    text = page.read_text(encoding="utf-8")
    found = [
        Block(
            m["language"],
            "\n".join(line.removeprefix(m["indent"]) for line in m["text"].splitlines()) + "\n",
            text.count("\n", 0, m.start("text")) + 1,
            m["how"],
            m["what"],
        )
        for m in FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def with_blocks(language):
    return [pytest.param(page, id=name) for page, name in zip(PAGES, IDS, strict=True) if blocks(page, language)]


def test_every_block_has_a_language_that_is_checked():
    checked = {"python", "console", "yaml", *SHOWN}
    wrong = [f"{page}:{b.line} {b.language!r}" for page in PAGES for b in blocks(page) if b.language not in checked]
    assert wrong == []


def test_every_fence_is_seen():
    """What the pattern for blocks does not match would be checked by nobody."""
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), page


# Python


class Given:
    """What pages may take for granted, by the name they take it by. `names` is a page's namespace."""

    @staticmethod
    def own_process(names):
        """See above."""

    @staticmethod
    def ask(names):
        """`await ask(prompt)`: a call to a provider that takes 4 at once."""
        from llmq.providers.chat import ChatRequest
        from llmq.testing import ProviderSpec, SimulatedProvider

        spec = ProviderSpec(latency_seconds=0.2, max_concurrency=4, refusal_seconds=0.2)
        provider = SimulatedProvider(spec)

        async def ask(prompt):
            return (await provider.complete(ChatRequest("m", [{"role": "user", "content": prompt}]))).content

        names["ask"] = ask

    @staticmethod
    def call(names):
        """`await call()`: what is sent by it is not said."""
        Given.ask(names)
        names["call"] = lambda item="hello": names["ask"](str(item))

    @staticmethod
    def pipeline(names):
        """`pipeline` of two stages over `topics`."""
        Given.ask(names)
        Given.topics(names)

        async def outline(topic):
            return await names["ask"](f"Outline: {topic}")

        async def draft(topic, outline):
            return await names["ask"](f"Draft {topic}: {outline}")

        names["pipeline"] = llmq.Pipeline([outline, draft])

    @staticmethod
    def topics(names):
        names["topics"] = ["tea", "rain", "salt", "wool"]
        names["prompts"] = [f"Outline an article on {topic}." for topic in names["topics"]]

    @staticmethod
    def openai(names):
        """The SDK of OpenAI, on a simulated provider in this process instead of a network."""
        import httpx2
        import openai

        from llmq.providers.server import create_app
        from llmq.testing import ProviderSpec, SimulatedProvider

        class AsyncOpenAI(openai.AsyncOpenAI):
            def __init__(self, **options):
                transport = httpx2.ASGITransport(create_app(SimulatedProvider(ProviderSpec())))
                http_client = httpx2.AsyncClient(transport=transport)
                base_url = options.pop("base_url", "http://provider/v1")
                super().__init__(**{"api_key": "k", **options}, base_url=base_url, http_client=http_client)
                self._platform = "Linux"  # asked for in a thread otherwise

        names["_patch"].setattr(openai, "AsyncOpenAI", AsyncOpenAI)
        names["AsyncOpenAI"] = AsyncOpenAI
        names["client"] = AsyncOpenAI()
        names["model"] = "your-model"
        names["messages"] = [{"role": "user", "content": "Outline an article on tea."}]

    @staticmethod
    def queue(names):
        """`queue`, with some calls behind it."""
        Given.call(names)
        names["queue"] = queue = llmq.LLMQueue(4)

        async def work():
            meta = llmq.LLMTaskMeta(stage="outline", model_name="small-model", service_id="s")
            await asyncio.gather(*(queue.submit(names["call"], meta=meta) for _ in range(20)))

        names["_runner"].run(work())

    @staticmethod
    def flag_on(names):
        """The queue is on, at 8."""
        llmq.RuntimeEnv.initialize(Settings(llm_queue_enabled=True, llm_queue_concurrency=8))

    @staticmethod
    def config(names):
        """The settings file of a working directory."""
        Path("config").mkdir()
        Path("config/app.yaml").write_text("concurrency: 5\n")

    @staticmethod
    def any_port(names):
        """A port that is free, for metrics."""
        import functools

        names["_patch"].setattr(llmq, "serve_metrics", functools.partial(llmq.serve_metrics, 0))


def given(page):
    return re.findall(r"\w+", " ".join(re.findall(r"<!-- given: (.*?) -->", page.read_text("utf-8"))))


def run_page(page, patch):
    """Run a page's Python blocks, one after the other, in one namespace."""
    from llmq.virtual import VirtualLoop

    names = {"__name__": "__main__", "_patch": patch}
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        names["_runner"] = runner
        for name in given(page):
            getattr(Given, name)(names)
        for block in blocks(page, "python"):
            code = compiled(block, page)
            if block.how == "compiled" or (block.how == "needs" and not is_there(block.what)):
                continue
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(eval(code, names))
            else:
                exec(code, names)


def compiled(block, page):
    return compile("\n" * (block.line - 1) + block.text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def is_there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("OPENAI_API_KEY", "none-needed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if "own_process" in given(page):
        command = [sys.executable, "-W", "error", __file__, page]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stdout + found.stderr
    else:
        run_page(page, monkeypatch)


@pytest.mark.parametrize("page", with_blocks("python"))
def test_imports_of_a_page_are_of_public_modules(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmq"):
                assert not any(name.name.startswith("_") for name in node.names), f"{page}:{block.line}"


# Commands


def words_of(line):
    """The words of a command, and the settings that stand before it."""
    words = shlex.split(line, comments=True)
    before = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        before.append(words.pop(0))
    return before, words


def commands(block):
    text = block.text.replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in text.splitlines() if line.strip() and not line.startswith("#")]


def parse(words):
    """Let the command line of llmq read the words, without running anything. Raises what click raises."""
    command = typer.main.get_command(app)
    context = command.make_context("llmq", list(words))
    while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def complaint(line):
    """What is wrong with a command, or None."""
    before, words = words_of(line)
    for assignment in before:
        name = assignment.partition("=")[0]
        if name.startswith(ENV_PREFIX) and name.removeprefix(ENV_PREFIX).lower() not in Settings.model_fields:
            return f"no setting is named {name}"
    if not words or words[0] in SHELL:
        return None
    tool, *rest = words
    if tool == "llmq":
        try:
            parse(rest)
        except Exception as error:
            return str(error) or type(error).__name__
        return None
    if tool == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in rest if "=" not in word]
        return None if set(wanted) <= targets else f"no target {set(wanted) - targets}"
    if tool == "pip":
        extras = re.findall(r"llmq-toolkit\[(.*?)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return next((f"no extra {name}" for found in extras for name in found.split(",") if name not in known), None)
    if tool in ("python", "pytest", "prometheus", "jupyter"):
        paths = [word.partition("=")[2] or word for word in rest if "/" in word]
        return next((f"{path} is not there" for path in paths if not (ROOT / path).exists()), None)
    return f"{tool} is not known to this test"


@pytest.mark.parametrize("page", with_blocks("console"))
def test_the_commands_of_a_page_exist(page):
    found = {line: complaint(line) for block in blocks(page, "console") for line in commands(block)}
    assert {line: wrong for line, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    "line",
    [
        "llmq tunes",
        "llmq tune --no-such-option",
        "llmq tune --seconds many",
        "llmq provider server",
        "llmq compare out/monday",
        "make nothing",
        "pip install 'llmq-toolkit[nothing]'",
        "SA_LLM_QUEUE_ENABLE=true llmq doctor",
        "pytest tests/test_nothing.py",
        "nonsense",
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    assert complaint(line)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_options_named_in_the_text_exist(page):
    command = typer.main.get_command(app)
    for line in re.findall(r"`llmq ([a-z][a-z-]*(?: [^`]*)?)`", prose(page)):
        name, *rest = line.split()
        assert name in command.commands, f"llmq {line}"
        known = {option for parameter in command.commands[name].params for option in parameter.opts}
        for sub in getattr(command.commands[name], "commands", {}).values():
            known |= {option for parameter in sub.params for option in parameter.opts}
        known.add("--help")
        assert {word for word in rest if word.startswith("--")} <= known, f"llmq {line}"


# Settings and names


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_yaml_of_a_page_is_accepted_as_settings(page, tmp_path):
    for block in blocks(page, "yaml"):
        path = tmp_path / "app.yaml"
        path.write_text(block.text)
        Settings(path)


TELEMETRY = set(re.findall(r'"(llm_queue[\w.]*)"', (ROOT / "llmq/telemetry.py").read_text()))
PROMETHEUS = r"(_seconds)?(_total|_bucket|_sum|_count)?$"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_settings_and_metrics_named_in_the_text_exist(page):
    known = {*Settings.model_fields, *TELEMETRY, "llm_queue"}
    for name in re.findall(r"`(llm_\w+)", prose(page)):
        assert name in known or re.sub(PROMETHEUS, "", name) in known, name
    for name in re.findall(r"`SA_(\w+)", prose(page)):
        assert name.lower() in Settings.model_fields or name in ("", "LLM_"), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_names_of_llmq_in_the_text_exist(page):
    for dotted in re.findall(r"(?:`|^::: )llmq\.([\w.]+)", prose(page), re.MULTILINE):
        if not dotted.startswith("notebook") or is_there("llmq.notebook"):
            assert resolves(dotted), f"llmq.{dotted}"


def resolves(dotted):
    found = llmq
    path = "llmq"
    for name in dotted.rstrip(".").split("."):
        path = f"{path}.{name}"
        if hasattr(found, name):
            found = getattr(found, name)
        elif name in getattr(found, "__dataclass_fields__", {}) or name in getattr(found, "__slots__", ()):
            return True
        elif is_there(path):
            found = importlib.import_module(path)
        else:
            return False
    return True


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(r"^::: llmq\.(\w+)$", text, re.MULTILINE))
    errors = {name for name in llmq.__all__ if getattr(llmq, name).__module__ == "llmq.errors"}
    assert set(llmq.__all__) - errors <= shown
    assert "::: llmq.errors\n" in text


# Links


def anchors(page):
    """The anchors of a page's headings, by GitHub's rule and by that of the site where those differ."""
    found = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = re.sub(r"[^\w\- ]", "", plain)
        on_github, in_site = kept.replace(" ", "-"), re.sub(r"[-\s]+", "-", kept)
        if on_github == in_site:
            found.add(in_site)
    return found


def links(page):
    return re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}; there are {sorted(anchors(target))}"


def test_every_page_of_the_docs_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / ".mkdocs.yml").read_text())) - {"CHANGELOG.md"}
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


if __name__ == "__main__":
    run_page(Path(sys.argv[1]), pytest.MonkeyPatch())
    sys.stdout.flush()
    os._exit(0)  # exporters would wait for a receiver that is not there
