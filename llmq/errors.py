"""Every exception that llmq raises itself.

    LLMQError
    ├── ConfigError            (ValueError)    a setting, key or option that cannot be used
    ├── InputError             (ValueError)    a line of an input file that cannot be used
    ├── QueueError
    │   ├── QueueTimeout       (TimeoutError)  waited longer than queue_timeout for a slot
    │   ├── QueueDrainingError                 the queue refuses new calls since drain()
    │   ├── QueueClosedError                   the queue was closed
    │   ├── QueueFullError                     refused on arrival: too many wait already
    │   ├── QueueDroppedError                  made room for a newer call in a full queue
    │   ├── QueueCancelledError                cancelled by queue.cancel() before it started
    │   ├── QueueHaltedError                   nothing more is started, so there is no use in going on
    │   │   ├── BudgetExceededError            what may be spent is spent
    │   │   └── OutOfQuotaError                the provider says that there is no money left
    │   └── RuntimeInUseError                  the process's queue cannot be replaced now
    ├── RequestTimeout         (TimeoutError)  ran longer than request_timeout in its slot
    ├── ProviderError                          a provider's answer that is not a success
    │   └── StreamCutError                     a streamed answer that ended before its last event
    ├── AnswerError            (ValueError)    an answer that is not what was asked for
    └── VirtualTimeError       (RuntimeError)  sockets, processes or threads under a virtual clock

What a caller's own function raises passes through the queue unchanged and is none of these.
"""

from collections.abc import Mapping


class LLMQError(Exception):
    """Base of all errors raised by llmq."""


class ConfigError(LLMQError, ValueError):
    """A setting, key or option is unknown or has a value that cannot be used; the message names it."""


class InputError(LLMQError, ValueError):
    """A line of an input file cannot be used; the message gives file and line."""


class QueueError(LLMQError):
    """Base of what the queue itself refuses."""


class QueueTimeout(QueueError, TimeoutError):
    """The call waited longer than `queue_timeout` for a slot and was never started."""


class QueueDrainingError(QueueError):
    """The queue refuses new calls since `drain()`; `resume()` opens it again."""


class QueueClosedError(QueueError):
    """The queue was closed: it takes no calls, and those that waited were turned away."""


class QueueFullError(QueueError):
    """The call was refused on arrival: as many wait as may, and the overflow is to reject."""


class QueueDroppedError(QueueError):
    """The call waited in a full queue and was dropped to make room for a newer one."""


class QueueCancelledError(QueueError):
    """The call was cancelled by `queue.cancel()` while it waited; it was never started."""


class QueueHaltedError(QueueError):
    """Nothing more is started, and will not be soon: whoever makes calls from a list should stop."""


class BudgetExceededError(QueueHaltedError):
    """A budget of tokens or money is used up; the message gives the figures. The call was never started."""


class OutOfQuotaError(QueueHaltedError):
    """The provider said that the quota is used up. The call was never started."""


class RuntimeInUseError(QueueError):
    """The process's queue cannot be replaced: it was set up otherwise, or calls are open."""


class RequestTimeout(LLMQError, TimeoutError):
    """The call held its slot longer than `request_timeout`."""


class ProviderError(LLMQError):
    """A provider answered with an error, or not to the end.

    `status_code` is None where no status came (a connection cut, a hang). `headers` are lower-case. The
    shape (`status_code`, `response.headers`, `body`) is the one that `llmq.classify` reads from any SDK.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        connection_lost: bool = False,
    ) -> None:
        super().__init__(message)
        self.connection_lost = connection_lost
        self.status_code = status_code
        self.headers: Mapping[str, str] = headers or {}
        self.body = body

    @property
    def response(self) -> "ProviderError":
        """The error itself: it has the `headers` that SDK errors keep on their response."""
        return self


class StreamCutError(ProviderError):
    """A streamed answer ended as if it were whole, but its last event never came."""


class AnswerError(LLMQError, ValueError):
    """An answer arrived but is not what was asked for (not JSON, or not of the asked schema)."""


class VirtualTimeError(LLMQError, RuntimeError):
    """Something was asked of a virtual clock that runs in real time: a socket, a process, a worker thread."""
