import itertools
from pathlib import Path

import pytest
import yaml

from llmq import Cap, Depth, FairShare, Policy, Priority, Rate, RuntimeEnv
from llmq.doctor import complain
from llmq.errors import ConfigError
from llmq.settings import Settings

PROJECT = Path(__file__).parent.parent


def write(text, name="config/app.yaml"):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults():
    found = Settings()
    assert (found.llm_queue_enabled, found.llm_queue_concurrency, found.concurrency) == (False, 3, 5)
    assert (found.request_timeout, found.queue_timeout) == (60.0, None)
    assert found.source_of("concurrency") == "default"


def test_the_flag_by_yaml():
    write("llm_queue_enabled: true\nllm_queue_concurrency: 16\n")
    found = Settings()
    assert (found.llm_queue_enabled, found.llm_queue_concurrency) == (True, 16)
    assert found.source_of("llm_queue_enabled") == "config/app.yaml"


def test_the_flag_by_environment(monkeypatch):
    monkeypatch.setenv("SA_LLM_QUEUE_ENABLED", "true")
    monkeypatch.setenv("SA_LLM_QUEUE_CONCURRENCY", "7")
    found = Settings()
    assert (found.llm_queue_enabled, found.llm_queue_concurrency) == (True, 7)
    assert found.source_of("llm_queue_enabled") == "environment SA_LLM_QUEUE_ENABLED"


def test_the_flag_by_code():
    found = Settings(llm_queue_enabled=True)
    assert found.llm_queue_enabled
    assert found.source_of("llm_queue_enabled") == "argument"


def test_argument_beats_environment_beats_yaml_beats_default(monkeypatch):
    write("llm_queue_concurrency: 10\nconcurrency: 10\nretry_attempts: 10\n")
    monkeypatch.setenv("SA_LLM_QUEUE_CONCURRENCY", "20")
    monkeypatch.setenv("SA_CONCURRENCY", "20")
    found = Settings(concurrency=30)
    assert (found.concurrency, found.llm_queue_concurrency, found.retry_attempts) == (30, 20, 10)
    assert found.retry_cap_seconds == 30.0


def test_a_named_file_replaces_the_one_in_the_working_directory():
    write("concurrency: 10\n")
    named = write("retry_attempts: 9\n", "other.yaml")
    found = Settings(named)
    assert (found.concurrency, found.retry_attempts) == (5, 9)
    with pytest.raises(ConfigError, match=r"missing\.yaml is not there"):
        Settings("missing.yaml")


def test_an_empty_file_is_fine():
    write("# nothing\n")
    assert Settings().concurrency == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nllm_queue_enabld: true",
            r"config/app\.yaml, line 2: unknown key llm_queue_enabld \(did you mean llm_queue_en",
        ),
        ("- a\n- b", "expected `key: value`"),
        ("a: [", "is not YAML"),
        ("concurrency: 1\nconcurrency: 2", "line 2: the key concurrency is there twice"),
        ("llm_queue_concurrency: 0", r"llm_queue_concurrency \(config/app.yaml\): .*greater than or equal to 1, got 0"),
        ("llm_queue_concurrency: many", r"llm_queue_concurrency \(config/app.yaml\): .*integer.*got 'many'"),
        ("llm_queue_concurrency: true", r"llm_queue_concurrency \(config/app.yaml\): .*whole number, got True"),
        ("request_timeout: -1", r"request_timeout \(config/app.yaml\)"),
        ("request_timeout: .inf", r"request_timeout \(config/app.yaml\): .*finite"),
        ("cache_mode: sometimes", r"cache_mode \(config/app.yaml\): .*'off'.*got 'sometimes'"),
        ("base_url: ftp://x", r"base_url \(config/app.yaml\): .*http"),
        ("simulate: {latncy: 1}", r"simulate\.latncy \(config/app.yaml\)"),
        ("retry_base_seconds: 50", r"retry_base_seconds=50 \(config/app.yaml\) is more than\s+retry_cap_seconds=30"),
    ],
)
def test_bad_yaml_is_refused_with_file_and_key(text, message):
    write(text)
    with pytest.raises(ConfigError, match=message):
        Settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "SA_LLM_QUEUE_ENABLD",
            "true",
            "unknown environment variable SA_LLM_QUEUE_ENABLD .did you mean SA_LLM_QUEUE_ENABLED",
        ),
        ("SA_LLM_QUEUE_ENABLED", "maybe", r"llm_queue_enabled \(environment SA_LLM_QUEUE_ENABLED\): .*'maybe'"),
        ("SA_LLM_QUEUE_CONCURRENCY", "0", r"llm_queue_concurrency \(environment SA_LLM_QUEUE_CONCURRENCY\)"),
        ("SA_SIMULATE", "{not json", "environment: .*simulate.*JSON"),
    ],
)
def test_a_bad_environment_is_refused_with_its_name(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Settings()


def test_limits_from_yaml_become_the_queues():
    write(
        """
        llm_queue_enabled: true
        llm_queue_limits:
          - {cap: 4, by: agent, overrides: {writer: 1}}
          - {rate: 500, by: model_name}
          - {rate: 20000, per: hour, of: tokens, burst: 100}
          - {max_queued: 50, by: service_id}
        llm_queue_max_queued: 1000
        llm_queue_overflow: reject
        llm_queue_ageing_seconds: null
        llm_queue_strict: [urgent, high]
        llm_queue_fair_share: {by: agent, weights: {writer: 2}}
        """
    )
    queue = RuntimeEnv.initialize(Settings()).llm_queue
    assert queue.policy == Policy(
        3,
        (
            Cap(4, by="agent", overrides={"writer": 1}),
            Rate(500, by="model_name"),
            Rate(20000, per="hour", of="tokens", burst=100),
            Depth(50, by="service_id"),
            Depth(1000),
        ),
        "reject",
        None,
        frozenset({Priority.URGENT, Priority.HIGH}),
        FairShare("agent", weights={"writer": 2}),
    )


def test_paces_are_limits_of_the_queue_in_short():
    write(
        "llm_queue_requests_per_minute: 297\nllm_queue_tokens_per_minute: 30000\nllm_queue_limits: [{cap: 4, by: a}]\n"
    )
    limits = Settings().queue_policy.limits
    assert limits == (Cap(4, by="a"), Rate(297), Rate(30000, of="tokens", burst=125)), "evenly paced, tokens nearly"
    assert Settings(llm_queue_requests_per_minute=None).queue_policy.limits == (Cap(4, by="a"), limits[2])


def test_no_pace_is_the_default():
    found = Settings()
    assert (found.llm_queue_requests_per_minute, found.llm_queue_tokens_per_minute) == (None, None)
    assert found.queue_policy.limits == ()


def test_paces_by_environment_and_null(monkeypatch):
    write("llm_queue_requests_per_minute: 297\n")
    monkeypatch.setenv("SA_LLM_QUEUE_TOKENS_PER_MINUTE", "0.5")
    monkeypatch.setenv("SA_LLM_QUEUE_REQUESTS_PER_MINUTE", "null")
    found = Settings()
    assert (found.llm_queue_requests_per_minute, found.llm_queue_tokens_per_minute) == (None, 0.5)


@pytest.mark.parametrize("name", ["llm_queue_requests_per_minute", "llm_queue_tokens_per_minute"])
@pytest.mark.parametrize(
    ("value", "message"),
    [("0", "greater than 0, got 0"), ("-5", "greater than 0"), (".inf", "finite"), ("true", "."), ("fast", "'fast'")],
)
def test_a_pace_is_more_than_nothing_and_finite(name, value, message):
    write(f"{name}: {value}\n")
    with pytest.raises(ConfigError, match=rf"{name} \(config/app.yaml\): .*{message}"):
        Settings()


def test_a_pace_and_the_same_limit_in_the_list_are_one_too_many():
    write("llm_queue_requests_per_minute: 297\nllm_queue_limits: [{rate: 500}]\n")
    with pytest.raises(ConfigError, match="two limits of the same"):
        Settings()


def test_limits_from_the_environment_are_json(monkeypatch):
    monkeypatch.setenv("SA_LLM_QUEUE_LIMITS", '[{"cap": 2, "by": "model_name"}, {"rate": 5, "per": "second"}]')
    monkeypatch.setenv("SA_LLM_QUEUE_STRICT", '["urgent"]')
    found = Settings()
    assert found.queue_policy.limits == (Cap(2, by="model_name"), Rate(5, per="second"))
    assert found.queue_policy.strict == {Priority.URGENT}
    assert "environment SA_LLM_QUEUE_LIMITS" in found.source_of("llm_queue_limits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm_queue_limits: [{caps: 3}]", r"llm_queue_limits\.0 .*one of the keys cap, rate, max_queued"),
        ("llm_queue_limits: [5]", r"llm_queue_limits\.0 .*one of the keys cap, rate, max_queued"),
        ("llm_queue_limits: {cap: 5}", r"llm_queue_limits \(config/app.yaml\): .*tuple"),
        ("llm_queue_limits: [{cap: 0}]", r"llm_queue_limits\.0\.cap\.cap .*greater than or equal to 1, got 0"),
        ("llm_queue_limits: [{cap: 3, per: minute}]", r"llm_queue_limits\.0\.cap\.per .*not permitted"),
        ("llm_queue_limits: [{rate: -1}]", r"llm_queue_limits\.0\.rate\.rate .*greater than 0"),
        ("llm_queue_limits: [{rate: 5, per: week}]", r"llm_queue_limits\.0\.rate\.per .*'minute'.*got 'week'"),
        ("llm_queue_limits: [{rate: 5, overrides: {m: 3}}]", r"llm_queue_limits\.0\.rate .*no overrides; say by"),
        ("llm_queue_limits: [{cap: 3, by: ''}]", r"llm_queue_limits\.0\.cap .*name of a field or label"),
        ("llm_queue_limits: [{cap: 3}, {cap: 4}]", r"llm_queue_limits \(config/app.yaml\): two limits of the same"),
        ("llm_queue_strict: [critical]", r"llm_queue_strict\.0 .*'urgent'.*got 'critical'"),
        ("llm_queue_fair_share: {by: a, weights: {x: 0}}", r"llm_queue_fair_share\.weights\.x .*greater than 0"),
        ("models: {featres: m}", r"models\.featres.* .*'features'"),
    ],
)
def test_bad_limits_are_refused_with_their_place(text, message):
    write(text)
    with pytest.raises(ConfigError, match=message):
        Settings()


def test_other_variables_are_nobodys_business(monkeypatch):
    monkeypatch.setenv("SA_SOMETHING_ELSE", "1")
    Settings()


def test_null_and_mappings_in_the_environment(monkeypatch):
    monkeypatch.setenv("SA_REQUEST_TIMEOUT", "null")
    monkeypatch.setenv("SA_SIMULATE", '{"latency_seconds": 2}')
    found = Settings()
    assert found.request_timeout is None
    assert found.simulate.latency_seconds == 2


def test_an_unknown_argument_is_refused():
    with pytest.raises(ConfigError, match=r"unknown argument concurency \(did you mean concurrency\?\)"):
        Settings(concurency=1)


def test_the_example_names_every_key_with_its_default_and_a_comment():
    path = PROJECT / "config" / "app.example.yaml"
    shown = yaml.safe_load(path.read_text())
    assert list(shown) == list(Settings.model_fields)
    examples = {name for name in shown if getattr(Settings(path), name) != getattr(Settings(), name)}
    assert examples == {
        "llm_queue_limits",
        "llm_queue_strict",
        "llm_queue_fair_share",
        "llm_prices",
        "llm_budgets",
        "models",
    }
    assert path.read_text().count("Example (default: ") == len(examples)
    assert Settings(path).model_dump(exclude=examples) == Settings().model_dump(exclude=examples)
    assert set(shown["simulate"]) == set(type(Settings().simulate).model_fields)
    lines = [line.strip() for line in path.read_text().splitlines()]
    for before, line in itertools.pairwise(lines):
        if line and not line.startswith("#"):
            assert before.startswith("#"), f"{line!r} has no comment"


def test_the_checked_in_settings_leave_the_queue_off():
    found = Settings(PROJECT / "config" / "app.yaml")
    assert not found.llm_queue_enabled
    assert found.source_of("llm_queue_enabled") == "default"


@pytest.mark.parametrize("pace", ["llm_queue_requests_per_minute", "llm_queue_tokens_per_minute"])
def test_doctor_says_that_a_pace_holds_only_with_the_flag(pace):
    said = f"{pace} is set, and llm_queue_enabled is false: nothing is paced"
    assert said in list(complain(Settings(**{pace: 300})))
    assert said not in list(complain(Settings(**{pace: 300}, llm_queue_enabled=True)))
