"""The public names, the layers, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmq

ROOT = Path(llmq.__file__).parent

PUBLIC = [
    "AnswerError",
    "AsyncTransport",
    "AttemptRecord",
    "Budget",
    "BudgetExceededError",
    "Cap",
    "Change",
    "Changes",
    "ConfigError",
    "Counts",
    "Depth",
    "Drop",
    "FairShare",
    "InputError",
    "ItemOutcome",
    "Kind",
    "LLMQError",
    "LLMQueue",
    "LLMTaskMeta",
    "Ledger",
    "OperationRecord",
    "OutOfQuotaError",
    "Outcome",
    "Pipeline",
    "Policy",
    "Price",
    "Priority",
    "ProviderError",
    "QueueCancelledError",
    "QueueClosedError",
    "QueueDrainingError",
    "QueueDroppedError",
    "QueueError",
    "QueueFullError",
    "QueueHaltedError",
    "QueueTimeout",
    "Rate",
    "Records",
    "RequestTimeout",
    "Retry",
    "RunSummary",
    "RuntimeEnv",
    "RuntimeInUseError",
    "Settings",
    "Slot",
    "Stage",
    "Statistics",
    "StreamCutError",
    "Sweep",
    "Telemetry",
    "Transport",
    "Verdict",
    "aiohttp_middleware",
    "classify",
    "configure_logfire",
    "limiter",
    "report_tokens",
    "serve_metrics",
    "submit",
    "sweep",
    "using",
    "wrap",
]

# A module may import from its own layer and from those above it in this list.
LAYERS = [
    {"errors", "core", "pages", "cards", "words"},
    {"waiters", "started"},
    {"records", "virtual", "alarms", "changes", "dialects", "summary", "interrupt"},
    {"retry", "telemetry", "providers", "ledger", "usage", "logs"},
    {"progress"},
    {"settings", "items", "refusals", "unqueued"},
    {"queue", "operations", "wire"},
    {"runtime"},
    {"pipeline"},
    {"generators"},
    {"tune"},
    {"notebook"},
    {"doctor", "testing"},
    {"cli"},
    {"__main__"},
]
HEAVY = ["pandas", "matplotlib", "ipywidgets", "httpx2", "aiohttp", "openai", "opentelemetry", "logfire", "trio"]
HEAVY += ["pydantic", "typer", "rich", "yaml"]


def modules():
    return sorted(ROOT.rglob("*.py"))


def imports(path):
    """What a file imports from llmq, as dotted names without the `llmq.`; the whole file, types included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llmq":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmq"):
            yield node.module.removeprefix("llmq").removeprefix(".")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("llmq.") for a in node.names if a.name.startswith("llmq."))


def layer_of(name):
    return next((n for n, names in enumerate(LAYERS) if name.split(".")[0] in names), None)


def test_public_names_are_pinned_and_there():
    assert llmq.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(llmq, name) is not None
        assert name in dir(llmq)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmq.nothing


def test_imports_run_downwards_only():
    wrong = []
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name == "__init__":
            continue
        mine = layer_of(name)
        assert mine is not None, f"{name} stands in no layer"
        wrong += [
            f"{name} imports {other}" for other in imports(path) if layer_of(other) is None or layer_of(other) > mine
        ]
    assert wrong == []


def test_the_core_is_plain_synchronous_python():
    for path in (ROOT / "core").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        names |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert names <= set(sys.stdlib_module_names) | {"llmq"}
        assert not names & {"asyncio", "time", "threading", "random"}
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.AsyncFunctionDef, ast.Await))]


def test_only_telemetry_knows_opentelemetry_and_nobody_the_old_httpx():
    for path in modules():
        names = {
            (n.module if isinstance(n, ast.ImportFrom) else a.name) or ""
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, (ast.Import, ast.ImportFrom))
            for a in n.names
        }
        roots = {name.split(".")[0] for name in names}
        assert "httpx" not in roots, path
        if path.name != "telemetry.py":
            assert not roots & {"opentelemetry", "logfire"}, path


def test_the_providers_know_no_generator():
    for path in (ROOT / "providers").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("generators")]


def test_importing_llmq_is_light():
    code = f"import sys, llmq; print([n for n in {HEAVY} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_a_queue_alone_loads_no_heavy_part():
    code = f"import sys, llmq; llmq.LLMQueue(3); print([n for n in {HEAVY} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_it_is_typed():
    assert (ROOT / "py.typed").exists()
