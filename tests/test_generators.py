import itertools
import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import ConfigDict, Field, ValidationError, create_model

from llmq import Outcome, RuntimeEnv, Settings
from llmq.errors import AnswerError, ConfigError, InputError
from llmq.generators.conversation import AnswerCache, ConversationSession, SessionContext, Transcript
from llmq.generators.jsonl import drop_torn_line, read_lines, read_models
from llmq.generators.plateaus import CALLS_PER_SERVICE, PLATEAUS, ServiceItem, _ObjectOf, _Values, plateau_pipeline
from llmq.generators.run import run_services
from llmq.generators.services import Service, read_catalogues, read_services, repeated, sample_services
from llmq.providers.chat import ChatAnswer
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.runtime import using

pytestmark = pytest.mark.anyio

PROJECT = Path(__file__).parent.parent


def records(path):
    return [line for _, line in read_lines(Path(path))]


async def generate(
    out,
    *,
    enabled=False,
    limit=8,
    spec=None,
    services=None,
    resume=False,
    provider=None,
    generator="plateaus",
    **settings,
):
    RuntimeEnv.reset()
    chosen = Settings(llm_queue_enabled=enabled, llm_queue_concurrency=limit, retry_base_seconds=0.1, **settings)
    RuntimeEnv.initialize(chosen)
    provider = provider or SimulatedProvider(ProviderSpec(**(spec or {})))
    report = await run_services(
        sample_services() if services is None else services,
        Path(out),
        client=provider,
        catalogues=read_catalogues(),
        settings=chosen,
        generator=generator,
        resume=resume,
    )
    return report, provider


def calls(provider):
    return sorted((c["stage"], c["service_id"], c["digest"]) for c in provider.stats(calls=True)["calls"])


async def test_flag_off_and_on_give_the_same_records_from_the_same_calls():
    off, provider_off = await generate("off.jsonl")
    on, provider_on = await generate("on.jsonl", enabled=True)
    assert (off.finished, on.finished) == (10, 10)
    by_id = {r["service_id"]: r for r in records("off.jsonl")}
    assert by_id == {r["service_id"]: r for r in records("on.jsonl")}
    assert calls(provider_off) == calls(provider_on)
    assert len(calls(provider_on)) == 10 * CALLS_PER_SERVICE == 210
    assert provider_off.stats()["peak_in_flight"] == 5
    assert provider_on.stats()["peak_in_flight"] == 8


async def test_a_record_has_the_shape_that_was_promised():
    await generate("out.jsonl", services=sample_services()[:1])
    (record,) = records("out.jsonl")
    assert list(record) == ["service_id", "name", "plateaus"]
    assert [p["name"] for p in record["plateaus"]] == list(PLATEAUS)
    known = {name: {item.id for item in items} for name, items in read_catalogues().items()}
    for plateau in record["plateaus"]:
        assert list(plateau) == ["name", "description", "features"]
        assert plateau["features"]
        for feature in plateau["features"]:
            assert list(feature) == ["feature_id", "name", "description", "mappings"]
            assert list(feature["mappings"]) == ["applications", "technologies", "data"]
            for name, ids in feature["mappings"].items():
                assert ids
                assert set(ids) <= known[name]
                assert len(set(ids)) == len(ids)
    ids = [f["feature_id"] for p in record["plateaus"] for f in p["features"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("enabled", [False, True])
async def test_ambitions_are_one_call_a_service(enabled):
    report, provider = await generate("out.jsonl", enabled=enabled, generator="ambitions")
    assert report.calls == 10
    assert {c[0] for c in calls(provider)} == {"ambitions"}
    assert all(record["ambitions"] for record in records("out.jsonl"))


async def test_faults_quarantine_the_same_services_in_both_modes():
    faults = {"error_ratio": 0.02, "cut_ratio": 0.02, "malformed_ratio": 0.02, "seed": 5}
    found = []
    for enabled in (False, True):
        report, _ = await generate(f"{enabled}.jsonl", enabled=enabled, spec=faults)
        quarantined = {r["service_id"] for r in records(report.quarantine)}
        finished = {r["service_id"] for r in records(report.out)}
        assert quarantined.isdisjoint(finished)
        assert len(quarantined | finished) == 10
        found.append((quarantined, finished))
    assert found[0] == found[1]
    assert found[0][0], "the seed plants at least one failure"
    assert found[0][1], "and at least one success"


async def test_a_quarantine_line_tells_why_and_nothing_private():
    report, _ = await generate("out.jsonl", spec={"malformed_ratio": 1.0}, services=sample_services()[:1])
    (line,) = records(report.quarantine)
    assert (line["service_id"], line["error_type"]) == ("LIB-1", "AnswerError")
    assert line["reason"].startswith("descriptions: the answer is not what was asked for")
    report, _ = await generate("b.jsonl", spec={"error_ratio": 1.0}, services=sample_services()[:1], retry_attempts=2)
    (line,) = records(report.quarantine)
    assert (line["error_type"], line["reason"]) == ("ProviderError", "transient, status 500")
    assert report.calls == 1


async def test_flag_on_a_mapping_starts_before_a_slow_unrelated_features_ends_and_flag_off_never():
    for enabled in (False, True):
        _, provider = await generate(
            f"{enabled}.jsonl",
            enabled=enabled,
            spec={"slow_stages": {"features_2": 20}},
            services=sample_services()[:1],
        )
        at = {c["stage"]: c for c in provider.stats(calls=True)["calls"]}
        early = at["mapping_1_data"]["started_at"] < at["features_2"]["ended_at"]
        assert early is enabled or at["mapping_1_data"]["started_at"] < at["features_2"]["started_at"]
        if not enabled:
            spans = sorted((c["started_at"], c["ended_at"]) for c in at.values())
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "one at a time"


async def test_the_makespan_is_what_the_cap_allows():
    import anyio

    services = list(repeated(sample_services(), 4))
    began = anyio.current_time()
    _, provider = await generate("out.jsonl", enabled=True, limit=8, services=services)
    makespan = anyio.current_time() - began
    done = provider.stats(calls=True)["calls"]
    work = sum(c["ended_at"] - c["started_at"] for c in done)
    assert provider.stats()["peak_in_flight"] == 8
    assert makespan <= 1.1 * max(work / 8, 0.6)


async def test_resume_skips_what_is_done_retries_what_failed_and_counts_what_is_paid_twice():
    faults = {"malformed_ratio": 0.01, "seed": 2}
    first, _ = await generate("out.jsonl", spec=faults)
    assert first.quarantined
    with Path("out.jsonl").open("a") as file:
        file.write('{"service_id": "torn')
    with Path("out.jsonl.calls.jsonl").open("a") as file:
        file.write('{"serv')
    with Path("out.jsonl.quarantine.jsonl").open("a") as file:
        file.write('{"service_id": "torn')
    again, _ = await generate("out.jsonl", resume=True)
    assert (again.skipped, again.finished, again.quarantined) == (first.finished, first.quarantined, 0)
    assert sorted(r["service_id"] for r in records("out.jsonl")) == sorted(s.service_id for s in sample_services())
    assert records("out.jsonl.quarantine.jsonl") == []
    sent = records("out.jsonl.calls.jsonl")
    assert again.calls == len(sent)
    assert again.calls_paid_twice == len(sent) - len({(c["service_id"], c["stage"]) for c in sent}) > 0
    idle, provider = await generate("out.jsonl", resume=True)
    assert (idle.finished, idle.skipped, provider.stats()["requests"]) == (0, 10, 0)


async def test_results_are_never_overwritten():
    await generate("out.jsonl", services=sample_services()[:1])
    before = Path("out.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"out\.jsonl is there already; go on with --resume"):
        await generate("out.jsonl")
    assert Path("out.jsonl").read_bytes() == before


async def test_a_second_run_on_the_same_file_is_refused(monkeypatch):
    import fcntl

    with Path("out.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run writes to out.jsonl"):
            await generate("out.jsonl", resume=True)


async def test_what_is_no_record_is_not_resumed():
    Path("out.jsonl").write_text('{"service_id": "a", "plateaus": []}\n' * 2)
    with pytest.raises(InputError, match=r"out\.jsonl, line 2: not a record of plateaus"):
        await generate("out.jsonl", resume=True)
    await generate("other.jsonl", generator="ambitions")
    with pytest.raises(InputError, match=r"other\.jsonl, line 1: not a record of plateaus"):
        await generate("other.jsonl", resume=True)
    Path("notes.txt").write_text("my precious")
    with pytest.raises(InputError, match="left as it is"):
        await generate("notes.txt", resume=True)
    assert Path("notes.txt").read_text() == "my precious"


@pytest.mark.parametrize("settings", [{"cache_mode": "write", "cache_dir": "/proc/x"}, {"transcripts_dir": "/proc/x"}])
async def test_a_folder_that_cannot_be_written_is_told_before_the_first_call(settings):
    provider = SimulatedProvider()
    with pytest.raises(ConfigError, match="cannot write to /proc/x"):
        await generate("out.jsonl", provider=provider, **settings)
    assert provider.stats()["requests"] == 0


@pytest.mark.parametrize("enabled", [False, True])
async def test_the_cache_answers_without_a_slot_or_a_call(enabled):
    options = {"enabled": enabled, "services": sample_services()[:2], "cache_mode": "write"}
    await generate("a.jsonl", **options)
    report, provider = await generate("b.jsonl", **options)
    assert (report.finished, report.calls, provider.stats()["requests"]) == (2, 0, 0)
    assert sorted(records("a.jsonl"), key=str) == sorted(records("b.jsonl"), key=str)
    queue = RuntimeEnv.instance().llm_queue
    assert queue is None or queue.records().operations == []
    options["cache_mode"] = "refresh"
    report, provider = await generate("c.jsonl", **options)
    assert report.calls == 42


async def test_a_malformed_answer_is_not_cached():
    await generate("a.jsonl", spec={"malformed_ratio": 1.0}, services=sample_services()[:1], cache_mode="write")
    assert not list(Path(".llmq/cache").rglob("*.json"))
    report, _ = await generate("a.jsonl", services=sample_services()[:1], cache_mode="write", resume=True)
    assert report.finished == 1


async def test_read_uses_and_never_writes_and_a_torn_file_is_asked_again():
    options = {"services": sample_services()[:1]}
    await generate("a.jsonl", cache_mode="read", **options)
    assert not Path(".llmq/cache").exists()
    await generate("b.jsonl", cache_mode="write", **options)
    torn, null, junk, *_ = sorted(Path(".llmq/cache").rglob("*.json"))
    torn.write_text('{"conte')
    null.write_text('{"content": null}')
    junk.write_text('{"content": "junk"}')
    report, _ = await generate("c.jsonl", cache_mode="read", **options)
    assert (report.finished, report.calls) == (1, 3)


async def test_transcripts_are_the_same_in_both_modes_and_off_by_default():
    await generate("a.jsonl", services=sample_services()[:2])
    assert not Path("transcripts").exists()
    texts = []
    for enabled in (False, True):
        folder = Path(f"transcripts-{enabled}")
        await generate(f"{enabled}.jsonl", enabled=enabled, services=sample_services()[:2], transcripts_dir=folder)
        texts.append({path.name: path.read_text() for path in folder.iterdir()})
    assert texts[0] == texts[1]
    assert set(texts[0]) == {"LIB-1.jsonl", "LIB-2.jsonl"}
    assert len(texts[0]["LIB-1.jsonl"].splitlines()) == 21


@pytest.mark.parametrize("service_id", ["../../evil", "..", ".hidden", "a/b\\c:d", "x" * 500, "Zürich 1"])
async def test_a_transcript_stays_in_its_folder_whatever_the_id(service_id):
    folder = Path("transcripts").resolve()
    Transcript(folder, service_id).write()
    (path,) = folder.iterdir()
    assert path.is_file()
    assert len(path.name) < 200
    assert not path.name.startswith(".")


class Scripted:
    """A client that says what it is told to."""

    def __init__(self, content):
        self.content, self.requests = content, []

    async def complete(self, request):
        self.requests.append(request)
        return ChatAnswer(self.content, 1, 1)


async def test_a_session_alone_asks_for_text():
    client = Scripted("plain words")
    assert await ConversationSession(client, "chat").ask_async("hello") == "plain words"
    assert client.requests[0].messages == [{"role": "user", "content": "hello"}]


async def test_a_session_validates_what_it_gets():
    client = Scripted('{"service_id": "S1", "name": ""}')
    with pytest.raises(
        AnswerError, match=r"chat: the answer is not what was asked for: name: String should have at least"
    ):
        await ConversationSession(client, "chat", SessionContext("s")).ask_async("hello", Service)


async def test_the_schema_of_a_model_is_made_once():
    class Made(Service):
        made: ClassVar[int] = 0

        @classmethod
        def model_json_schema(cls):
            cls.made += 1
            return {}

    session = ConversationSession(Scripted('{"service_id": "S1", "name": "n"}'), "chat")
    for _ in range(3):
        await session.ask_async("hello", Made)
    assert Made.made == 1


KEYS = ["S1-P1-F1", "two_words"]
IDS = Annotated[list[Literal["a", "b"]], Field(min_length=1, max_length=2)]
MODEL = create_model(
    "MappingAnswer",
    __config__=ConfigDict(extra="forbid"),
    **{f"field_{n}": (IDS, Field(alias=key)) for n, key in enumerate(KEYS)},
)
OBJECT = _ObjectOf("MappingAnswer", KEYS, _Values(IDS))


def test_an_object_with_given_keys_is_asked_for_as_a_model_is():
    assert OBJECT.model_json_schema() == MODEL.model_json_schema()


@pytest.mark.parametrize(
    "answer",
    [
        {"S1-P1-F1": ["a"], "two_words": ["b", "a"]},
        {"S1-P1-F1": ["a"]},
        {"S1-P1-F1": ["a"], "two_words": ["c"]},
        {"S1-P1-F1": ["a"], "two_words": []},
        {"S1-P1-F1": ["a"], "two_words": ["a"], "third": ["a"]},
        ["a"],
    ],
)
def test_an_object_with_given_keys_is_parsed_as_a_model_is(answer):
    def parsed(model):
        try:
            found = model.model_validate_json(json.dumps(answer))
        except ValidationError as error:
            return [(each["loc"], each["msg"]) for each in error.errors()]
        return found if isinstance(found, dict) else found.model_dump(by_alias=True)

    assert parsed(OBJECT) == parsed(MODEL)


async def test_with_no_mapping_id_invented():
    client = Scripted('{"features": [{"name": "n", "description": "d"}]}')
    with using(None):
        pipeline = plateau_pipeline(client, read_catalogues())
    async with pipeline.run([ServiceItem(sample_services()[0], SessionContext("s"))]) as outcomes:
        (outcome,) = [o async for o in outcomes]
    assert isinstance(outcome.error, AnswerError)
    assert str(outcome.error).startswith("descriptions")


def test_jsonl_lines_are_refused_with_file_and_number(tmp_path):
    path = tmp_path / "services.jsonl"
    for text, message in [
        (
            '{"service_id": "a", "name": "A"}\n{"service_id": "a", "name": "B"}\n',
            "line 2: service_id 'a' is already on line 1",
        ),
        ('{"service_id": "a", "name": "A"}\n\nnot json\n', "line 3: not JSON"),
        ('["a"]\n', "line 1: expected an object, got list"),
        ('{"service_id": "a"}\n', "line 1: name: Field required"),
        ('{"service_id": "", "name": "A"}\n', "line 1: service_id"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            list(read_models(path, Service, "service_id"))
        assert str(path) in str(caught.value)
    path.write_text("\n")
    with pytest.raises(InputError, match="has no service"):
        read_services(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_services(path)
    with pytest.raises(InputError, match="cannot read"):
        read_services(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("text", "kept", "dropped"),
    [("", "", 0), ("a\n", "a\n", 0), ("a\nb", "a\n", 1), ("torn", "", 4), ("a\n" + "b" * 200_000, "a\n", 200_000)],
)
def test_a_torn_line_is_cut_off(tmp_path, text, kept, dropped):
    path = tmp_path / "file"
    path.write_text(text)
    assert drop_torn_line(path, text[len(kept) :][:3].encode()) == dropped
    assert path.read_text() == kept


def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my precious only line without newline")
    with pytest.raises(InputError, match="left as it is"):
        drop_torn_line(path, b'{"service_id": "')
    assert path.read_text() == "my precious only line without newline"


def test_catalogues_are_checked(tmp_path):
    good = {"items": [{"id": "a", "name": "A"}]}
    for name in ("applications", "technologies", "information"):
        (tmp_path / f"{name}.json").write_text(json.dumps(good))
    assert read_catalogues(tmp_path)["data"][0].id == "a"
    (tmp_path / "information.json").write_text(json.dumps({"items": good["items"] * 2}))
    with pytest.raises(InputError, match=r"information\.json: an id is there twice"):
        read_catalogues(tmp_path)
    (tmp_path / "information.json").write_text("{}")
    with pytest.raises(InputError, match=r"information\.json"):
        read_catalogues(tmp_path)
    (tmp_path / "information.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*information\.json"):
        read_catalogues(tmp_path)


def test_repeated_services_have_fresh_ids():
    services = sample_services()
    found = [s.service_id for s in repeated(services, 3)]
    assert len(found) == len(set(found)) == 30
    assert found[:10] == [s.service_id for s in services]
    assert found[10] == "LIB-1-2"


def test_the_sample_services_of_config_are_those_of_the_package():
    package = PROJECT / "llmq" / "generators" / "samples" / "services.jsonl"
    assert (PROJECT / "config" / "services.jsonl").read_bytes() == package.read_bytes()


def test_a_cache_is_a_folder_of_digests(tmp_path):
    from llmq.providers.chat import ChatRequest

    cache = AnswerCache("write", tmp_path)
    request = ChatRequest("m", [{"role": "user", "content": "secret prompt"}])
    cache.put(request, "answer")
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert path.stem == request.digest()
    assert "secret prompt" not in path.read_text()
    assert cache.get(request) == "answer"


def most_at_once(exchanges):
    """The peak of overlapping (started, ended) times."""
    moments = sorted([(c["ended_at"], -1) for c in exchanges] + [(c["started_at"], 1) for c in exchanges])
    return max(itertools.accumulate(step for _, step in moments))


async def test_caps_and_rates_by_model_and_a_guardrail_by_service():
    limits = [
        {"cap": 6, "by": "model_name", "overrides": {"large": 2}},
        {"cap": 3, "by": "service_id"},
        {"rate": 6000, "by": "model_name", "overrides": {"large": 600}},
        {"rate": 1e6, "of": "tokens", "by": "model_name"},
    ]
    models = {"features": "large"}
    spec = {"latency_seconds": 0.3, "sigma": 0}
    off, _ = await generate("off.jsonl", spec=spec, models=models)
    on, provider = await generate("on.jsonl", enabled=True, limit=32, spec=spec, models=models, llm_queue_limits=limits)
    assert on.finished == off.finished == 10
    assert sorted(map(str, records("on.jsonl"))) == sorted(map(str, records("off.jsonl")))
    found = provider.stats(calls=True)["calls"]
    assert len(found) == 210
    large = [c for c in found if c["stage"].startswith("features")]
    assert len(large) == 50
    assert most_at_once(large) == 2
    assert most_at_once([c for c in found if c not in large]) == 6
    services = {c["service_id"] for c in found}
    assert {most_at_once([c for c in found if c["service_id"] == s]) for s in services} <= {1, 2, 3}
    queue = RuntimeEnv.instance().llm_queue
    assert queue.statistics().by_key["model_name"]["large"].ended[Outcome.SUCCEEDED] == 50
    (tokens,) = [
        r for key, r in queue._scheduler._registry.resources.items() if r.key == "large" and key[0][1] == "tokens"
    ]
    assert tokens.typical > 0, "the usage that was reported settles what was reserved"
