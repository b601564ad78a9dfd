"""An operating point put into a settings file: what changes, what stays, and what is refused."""

from pathlib import Path

import pytest

from llmq import Settings
from llmq.errors import ConfigError
from llmq.tune.apply import apply
from llmq.tune.recommend import OperatingPoint

ANSWER = OperatingPoint(12, "concurrency", "because")
PACED = OperatingPoint(8, "requests", "because", requests_per_minute=297.9)

FILE = """\
# Ours.   Two spaces stay.

retry_attempts: 7      # seven of them
llm_queue_concurrency: 3   # until somebody measures
model: "gpt-x"
llm_queue_limits:
    - {cap: 4, by: agent}   # four spaces deep

# the end
concurrency: 50
"""


@pytest.fixture
def path():
    found = Path("app.yaml")
    found.write_text(FILE, encoding="utf-8")
    return found


def unchanged(path, text=FILE):
    return path.read_text(encoding="utf-8") == text and sorted(p.name for p in Path().iterdir()) == [path.name]


def test_the_level_is_set_and_all_else_stays(path):
    assert apply(ANSWER, path) == {"llm_queue_enabled": True, "llm_queue_concurrency": 12}
    found = Settings(path)
    assert (found.llm_queue_enabled, found.llm_queue_concurrency, found.retry_attempts) == (True, 12, 7)
    lines = path.read_text().splitlines()
    kept = [line for line in FILE.splitlines() if "llm_queue_concurrency" not in line and "cap: 4" not in line]
    assert [line for line in lines if line in kept] == kept, "comments, quotes and order"
    assert "llm_queue_concurrency: 12  # until somebody measures" in " ".join(lines).replace("   #", "  #")
    assert [p.name for p in Path().iterdir()] == ["app.yaml"], "nothing is left beside it"


def test_other_lines_are_kept_byte_by_byte(path):
    """Those of lists too, in whatever style they are."""
    apply(ANSWER, path)
    old = [line for line in FILE.splitlines() if "llm_queue_concurrency" not in line]
    new = [
        line for line in path.read_text().splitlines() if "llm_queue_concurrency" not in line and "enabled" not in line
    ]
    assert new == old


def test_what_is_set_already_is_no_change(path):
    apply(ANSWER, path)
    before = path.read_text()
    assert apply(ANSWER, path) == {}
    assert path.read_text() == before


def test_a_pace_is_set_in_whole_numbers_and_goes_with_its_answer(path):
    changed = apply(PACED, path)
    assert changed == {
        "llm_queue_enabled": True, "llm_queue_concurrency": 8, "llm_queue_requests_per_minute": 297,
    }  # fmt: skip
    assert Settings(path).llm_queue_requests_per_minute == 297
    tokens = OperatingPoint(8, "tokens", "because", tokens_per_minute=30_000.0)
    assert apply(tokens, path) == {"llm_queue_requests_per_minute": None, "llm_queue_tokens_per_minute": 30_000}
    assert apply(ANSWER, path) == {"llm_queue_concurrency": 12, "llm_queue_tokens_per_minute": None}
    found = Settings(path)
    assert (found.llm_queue_requests_per_minute, found.llm_queue_tokens_per_minute) == (None, None)


def test_a_pace_that_is_null_already_stays_as_it_is():
    path = Path("app.yaml")
    path.write_text("llm_queue_requests_per_minute: null  # none\n")
    assert "llm_queue_requests_per_minute" not in apply(ANSWER, path)
    assert path.read_text().splitlines()[0] == "llm_queue_requests_per_minute: null  # none"


def test_services_open_are_set_where_the_pipeline_binds(path):
    answer = OperatingPoint(8, "pipeline", "because", services_open=9)
    assert apply(answer, path)["concurrency"] == 9
    assert Settings(path).concurrency == 9


@pytest.mark.parametrize("text", ["", "# only a comment\n# of two lines\n", "\n\n"])
def test_a_file_without_settings_gets_them(text):
    path = Path("app.yaml")
    path.write_text(text)
    apply(ANSWER, path)
    assert path.read_text().startswith(text.strip("\n"))
    assert Settings(path).llm_queue_concurrency == 12


def test_nothing_recommended_is_not_applied(path):
    with pytest.raises(ConfigError, match="nothing can be applied: too few calls"):
        apply(OperatingPoint(None, "unknown", "too few calls"), path)
    assert unchanged(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "app.yaml is not YAML"),
        ("model: a\nmodel: b\n", "app.yaml, line 2: the key model is there twice"),
        ("- a\n- b\n", "app.yaml: expected `key: value` lines"),
        ("just words\n", "app.yaml: expected `key: value` lines"),
        ("concurency: 5\n", "app.yaml, line 1: .*did you mean concurrency"),
        ("request_timeout: -1\n", "request_timeout .app.yaml.: Input should be greater than 0"),
    ],
)
def test_a_file_that_cannot_be_changed_is_left_as_it_is(text, message):
    path = Path("app.yaml")
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        apply(ANSWER, path)
    assert unchanged(path, text)


def test_bytes_that_are_no_text_are_refused():
    path = Path("app.yaml")
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="app.yaml is not text"):
        apply(ANSWER, path)
    assert path.read_bytes() == b"model: \xff\n"


def test_a_missing_file_or_a_folder_is_refused():
    with pytest.raises(ConfigError, match="cannot read nowhere/app.yaml: .*name the settings file"):
        apply(ANSWER, Path("nowhere/app.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        apply(ANSWER, Path())
    assert list(Path().iterdir()) == []


def test_a_file_that_cannot_be_written_is_told(path, monkeypatch):
    def full(self, *_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="cannot write app.yaml: No space left on device"):
        apply(ANSWER, path)
    assert unchanged(path)


def test_a_file_that_cannot_be_replaced_is_untouched(path, monkeypatch):
    def refuse(self, target):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigError, match="cannot write app.yaml: Permission denied"):
        apply(ANSWER, path)
    assert unchanged(path)


def test_line_ends_stay_as_they_are():
    path = Path("app.yaml")
    path.write_bytes(b"llm_queue_concurrency: 3   # ours\r\n# c\r\n")
    apply(ANSWER, path)
    assert path.read_bytes() == b"llm_queue_concurrency: 12   # ours\r\n# c\r\nllm_queue_enabled: true\r\n"


@pytest.mark.parametrize("key", ["'llm_queue_concurrency'", '"llm_queue_concurrency"', "\ufeffllm_queue_concurrency"])
def test_a_key_in_quotes_or_after_a_byte_order_mark_is_found(key):
    path = Path("app.yaml")
    path.write_text(f"{key}: 3\n", encoding="utf-8")
    assert apply(ANSWER, path)["llm_queue_concurrency"] == 12
    assert path.read_text(encoding="utf-8") == f"{key}: 12\nllm_queue_enabled: true\n"
    assert Settings(path).llm_queue_concurrency == 12


def test_the_mode_of_the_file_and_a_link_to_it_stay(path):
    path.chmod(0o640)
    link = Path("link.yaml")
    link.symlink_to(path)
    apply(ANSWER, link)
    assert link.is_symlink()
    assert Settings(path).llm_queue_concurrency == 12
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("text", ["{llm_queue_concurrency: 3}\n", "llm_queue_concurrency:\n  3\n"])
def test_what_would_not_be_valid_names_the_users_file(text):
    path = Path("app.yaml")
    path.write_text(text)
    with pytest.raises(
        ConfigError, match="app.yaml was not changed, since it would not be valid: .*app.yaml"
    ) as caught:
        apply(ANSWER, path)
    assert ".app.yaml.new" not in str(caught.value)
    assert unchanged(path, text)
