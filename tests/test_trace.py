"""The file of a run: what is in it, what never is, and what is refused."""

import json
from pathlib import Path

import httpx2
import pytest

import llmq
from llmq.dialects import RateLimitState
from llmq.errors import ConfigError, InputError
from llmq.records import AttemptRecord, RecordList, Records
from llmq.settings import Settings
from llmq.tune.recorder import RunRecorder
from llmq.tune.trace import FORMAT, Trace, most_at_once, records_of, write_trace

PATH = "trace.jsonl"


def attempt(operation=1, number=1, submitted=100.0, started=100.5, ended=102.0, outcome="ok", **more):
    return AttemptRecord(
        operation, number, "draft", "m", "Acme Ltd", "request-77", submitted, started, ended, outcome, **more
    )


def lines():
    return [json.loads(line) for line in Path(PATH).read_text().splitlines()]


def test_a_header_then_a_line_an_attempt_with_what_is_known():
    limits = (RateLimitState("requests", 600.0, 599.0, 0.1),)
    refusal = {"limit_type": "requests", "retry_after_seconds": 2.0, "status_code": 429, "limits": limits}
    attempts = [
        attempt(outcome="rejected", ended=100.6, **refusal),
        attempt(number=2, submitted=100.6, started=102.6, ended=104.0, status_code=200, input_tokens=3, seen=True),
        attempt(2, started=None, outcome="timeout", first_chunk_seconds=0.25),
    ]
    write_trace(PATH, attempts, level=8, note="a night")
    header, *rest = lines()
    assert header == {"format": FORMAT, "llmq": header["llmq"], "level": 8, "note": "a night"}
    same = {"stage": "draft", "model": "m", "service": 0}
    assert rest == [
        {
            **same,
            "operation": 1,
            "submitted": 0.0,
            "started": 0.5,
            "ended": 0.6,
            "outcome": "rejected",
            "status": 429,
            "limit_type": "requests",
            "retry_after_seconds": 2.0,
            "limits": [["requests", 600.0, 599.0, 0.1]],
        },
        {
            **same,
            "operation": 1,
            "attempt": 2,
            "submitted": 0.6,
            "started": 2.6,
            "ended": 4.0,
            "status": 200,
            "input_tokens": 3,
            "seen": True,
        },
        {**same, "operation": 2, "submitted": 0.0, "ended": 2.0, "outcome": "timeout", "first_chunk_seconds": 0.25},
    ]
    found = Trace.read(PATH)
    assert found == Trace.from_records(attempts, 8, "a night")
    assert found.attempts[0].limits == limits
    found.write("again.jsonl")
    assert Path("again.jsonl").read_text() == Path(PATH).read_text()


def test_who_it_was_for_is_a_number_and_nothing_else_of_it_is_told():
    attempts = [attempt(n, error_type="SecretError", response_model="m-7") for n in range(3)]
    attempts[1].service_id, attempts[2].service_id = "Beta Inc", None
    write_trace(PATH, attempts, level=1)
    assert [line.get("service") for line in lines()[1:]] == [0, 1, None]
    text = Path(PATH).read_text()
    for secret in ("Acme", "Beta", "request-77", "SecretError", "m-7"):
        assert secret not in text
    assert [a.service_id for a in Trace.read(PATH).attempts] == ["0", "1", None]


def test_500_calls_are_small():
    limits = tuple(RateLimitState(kind, 600000.0, 599123.0, 12.345) for kind in ("requests", "tokens"))
    many = [
        attempt(
            n,
            submitted=n / 7,
            started=n / 7 + 0.1,
            ended=n / 7 + 1 / 3,
            input_tokens=1234,
            output_tokens=567,
            seen=True,
            limits=limits,
        )
        for n in range(500)
    ]
    write_trace(PATH, many, level=8)
    assert Path(PATH).stat().st_size < 150_000


def test_a_torn_last_line_is_dropped():
    write_trace(PATH, [attempt(1), attempt(2)], level=1)
    text = Path(PATH).read_text()
    Path(PATH).write_text(text[:-10])
    assert [a.operation_id for a in Trace.read(PATH).attempts] == [1]


GOOD = '{"operation":1,"submitted":0.0,"started":0.5,"ended":1.0}'
HEAD = '{"format":"llmq trace 1","llmq":"1","level":2}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{HEAD}\n{GOOD}\n{GOOD[:-1]},"prompt":"x"}}\n', "line 3: prompt"),
        (f"{HEAD}\n" + GOOD.replace("1.0", '"late"') + "\n", "line 2: ended"),
        (f"{HEAD}\n" + GOOD.replace("1.0", "0.1") + "\n", "line 2: .*ended=0.1 is before it began"),
        (f"{HEAD}\n" + GOOD.replace("1.0", "NaN") + "\n", "line 2: ended"),
        (f'{HEAD}\n{GOOD[:-1]},"outcome":"fine"}}\n', "line 2: outcome"),
        (f'{HEAD}\n{GOOD[:-1]},"limits":[["requests",1]]}}\n', "line 2: limits"),
        (f'{HEAD}\n{GOOD[:-1]},"input_tokens":1{"0" * 400}}}\n', "line 2: input_tokens"),
        (f'{HEAD}\n{GOOD[:-1]},"limits":[["requests",NaN,1,1]]}}\n', "line 2: limits"),
        (f"{HEAD}\n" + GOOD.replace("1.0", "1e300") + "\n", "line 2: ended"),
        (f'{HEAD}\n{{"operation":1\n', "line 2: not JSON"),
        (GOOD + "\n", "line 1: format"),
        (HEAD.replace("trace 1", "trace 2") + "\n", "line 1: format"),
        (HEAD.replace("2}", "0}") + "\n", "line 1: level"),
        ("", "holds no trace"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_key(text, said):
    Path(PATH).write_text(text)
    with pytest.raises(InputError, match=f"{PATH}.*{said}"):
        Trace.read(PATH)


def test_what_cannot_be_read_or_written_is_refused():
    with pytest.raises(InputError, match="cannot read"):
        Trace.read("nowhere.jsonl")
    with pytest.raises(ConfigError, match="cannot write"):
        write_trace("no/folder.jsonl", [], level=1)
    with pytest.raises(ConfigError, match="level is calls at once"):
        write_trace(PATH, [], level=0)


def test_operations_are_made_of_their_attempts():
    found = records_of(
        [attempt(1, ended=101.0, outcome="rejected"), attempt(2, ended=103.0), attempt(1, 2, 101.0, 103.0, 104.0)]
    )
    assert isinstance(found, Records)
    assert isinstance(found.operations, RecordList)
    facts = [
        (o.operation_id, o.submitted_at, o.ended_at, o.attempts, o.wait_seconds, o.outcome) for o in found.operations
    ]
    assert facts == [(2, 100.0, 103.0, 1, 0.5, "ok"), (1, 100.0, 104.0, 2, 2.5, "ok")]


@pytest.mark.anyio
@pytest.mark.parametrize("status", [200, 429])
async def test_limits_of_headers_come_into_the_records_of_what_is_seen(anyio_backend, status):
    headers = {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "7"}

    def answer(_):
        return httpx2.Response(status, headers=headers, json={})

    queue = llmq.LLMQueue(1, telemetry=None)
    async with httpx2.AsyncClient(transport=llmq.AsyncTransport(httpx2.MockTransport(answer))) as client:

        async def ask():
            return await client.get("http://provider/")

        await queue.submit(ask)
    (record,) = queue.records().attempts
    assert record.limits == (RateLimitState("requests", 600.0, 7.0, None),)


def test_what_cannot_be_in_a_trace_is_refused_when_it_is_written():
    with pytest.raises(ConfigError, match="a record cannot be written: output_tokens"):
        write_trace(PATH, [attempt(output_tokens=10**10)], level=1)


def recorder(trace, out="out.jsonl"):
    return RunRecorder(Path(trace), Settings(llm_queue_enabled=False), Path(out))


@pytest.mark.parametrize(
    "trace", ["out.jsonl", "OUT.JSONL", "sub/../out.jsonl", *(f"out.jsonl.{end}" for end in
    ("quarantine.jsonl", "calls.jsonl", "report.json", "report.html"))],
)  # fmt: skip
def test_a_trace_is_never_what_the_run_writes(trace):
    Path("sub").mkdir()
    with pytest.raises(ConfigError, match="is, or may be, what the run itself writes"):
        recorder(trace)
    recorder("out.jsonlines")


def test_a_trace_replaces_no_file_that_came_meanwhile():
    found = recorder(PATH)
    found.ledger.add_attempt(attempt())
    Path(PATH).write_text("mine")
    with pytest.raises(ConfigError, match="is there already, so the trace was not written"):
        found.write()
    assert Path(PATH).read_text() == "mine"


def test_a_run_without_calls_leaves_no_trace():
    recorder(PATH).write()
    assert not Path(PATH).exists()


def test_at_once_are_those_that_overlap():
    assert most_at_once([]) == 0
    spans = [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0), (None, 9.0)]
    assert most_at_once([attempt(started=start, ended=end) for start, end in spans]) == 2
