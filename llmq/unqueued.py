"""A call with no queue: what `LLMQueue.submit` does with the flag off."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from llmq import waiters
from llmq.core import NO_META, LLMTaskMeta
from llmq.errors import BudgetExceededError
from llmq.ledger import Ledger
from llmq.logs import tell_of_budget
from llmq.records import AttemptRecord, OperationRecord
from llmq.retry import Classify, Kind, Retry, Verdict, classify, error_type_of, judged, outcome_of, timed
from llmq.usage import tokens_of

T = TypeVar("T")

_ids = itertools.count(1)


async def unqueued(
    factory: Callable[[], Awaitable[T]],
    *,
    retry: Retry | None = None,
    request_timeout: float | None = None,
    classify: Classify = classify,
    meta: LLMTaskMeta = NO_META,
    ledger: Ledger | None = None,
) -> T:
    """Await `factory()`: the same time-out, the same retries, no slot. A `ledger` counts it, and keeps its budgets."""
    call = None if ledger is None else _Booked(ledger, meta)
    failed = 0
    while True:
        if call is not None:
            call.begin()  # raises where a budget is used up
        try:
            result = await timed(factory, request_timeout)
        except BaseException as error:
            failed += 1
            verdict = judged(classify, error)
            delay = None if retry is None else retry.delay_seconds(failed, verdict)
            if call is not None:
                call.end(error, verdict, closing=delay is None)
            if delay is None:
                raise
        else:
            if call is not None:
                call.end(None, None, closing=True, result=result)
            return result
        try:
            await anyio.sleep(delay)
        except BaseException as error:
            if call is not None:
                call.close(error, judged(classify, error))
            raise


class _Booked:
    """One call in a ledger."""

    def __init__(self, ledger: Ledger, meta: LLMTaskMeta) -> None:
        self._ledger = ledger
        self._meta = meta
        self._id = next(_ids)
        self._attempts = 0
        self._began_at = self._started_at = waiters.now()

    def begin(self) -> None:
        """An attempt begins, if the budgets let it. Raises `BudgetExceededError`."""
        if (why := self._ledger.check(self._meta)) is not None:
            error = BudgetExceededError(why)
            self.close(error, Verdict(Kind.CALLER))
            raise error
        self._attempts += 1
        self._started_at = waiters.now()

    def end(
        self, error: BaseException | None, verdict: Verdict | None, *, closing: bool, result: object = None
    ) -> None:
        """An attempt has ended, and with `closing` the call."""
        now, meta = waiters.now(), self._meta
        labels = (meta.stage, meta.model_name, meta.service_id, meta.request_id)
        outcome, error_type = outcome_of(error, verdict), error_type_of(error)
        began = self._started_at
        attempt = AttemptRecord(self._id, self._attempts, *labels, began, began, now, outcome, error_type=error_type)
        if verdict is not None:
            attempt.status_code, attempt.limit_type = verdict.status_code, verdict.limit_type
            attempt.retry_after_seconds = verdict.retry_after_seconds
        tokens = tokens_of(result)
        if tokens is not None:
            attempt.input_tokens, attempt.output_tokens = round(tokens.input), round(tokens.output)
        for event in self._ledger.add_attempt(attempt):
            tell_of_budget(event)
        if closing:
            self.close(error, verdict)

    def close(self, error: BaseException | None, verdict: Verdict | None) -> None:
        """The call has ended."""
        meta = self._meta
        self._ledger.add_operation(
            OperationRecord(
                self._id,
                meta.stage,
                meta.model_name,
                meta.service_id,
                meta.request_id,
                self._began_at,
                waiters.now(),
                self._attempts,
                0.0,
                outcome_of(error, verdict),
                error_type_of(error),
            )
        )
