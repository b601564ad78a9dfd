"""Clients that retry by themselves where nobody sees it: found by looking at what a call is made of.

A heuristic, for a warning: from a function to what it refers to (closure, globals that its code names, partial
arguments, the object whose method it is), a few steps deep. Only `__dict__`s are read, so nothing is run by it.
"""

from __future__ import annotations

import functools
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

MOST_OBJECTS = 200
MOST_STEPS = 7


def code_of(call: object) -> CodeType | None:
    """The code that a call runs first, if it is a Python function's."""
    while isinstance(call, functools.partial):
        call = call.func
    return getattr(call, "__code__", None)


def retrying_client(call: object) -> str | None:
    """A client that the call seems to use and that retries unseen, in words; None: none was found."""
    seen: set[int] = set()
    nearest: list[object] = [call]
    for _ in range(MOST_STEPS):
        further: list[object] = []
        for each in nearest:
            if id(each) in seen or len(seen) >= MOST_OBJECTS:
                continue
            seen.add(id(each))
            if (found := _described(each)) is not None:
                return found
            further += _neighbours(each)
        nearest = further
    return None


def _described(thing: object) -> str | None:
    own = _attributes(thing)
    retries = own.get("max_retries")
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 1 or "_client" not in own:
        return None
    if hasattr(type(thing), "_llmq_wrapped") or _is_seen(own["_client"]):
        return None
    return f"{type(thing).__name__} (max_retries={retries})"


def _is_seen(http_client: object) -> bool:
    transport = _attributes(http_client).get("_transport")
    return type(transport).__module__.startswith("llmq.wire.")


def _neighbours(thing: object) -> list[object]:
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, FunctionType):
        named = (thing.__globals__.get(name) for name in _names(thing.__code__))
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        return [each for each in (*named, *cells, *(thing.__defaults__ or ())) if _is_of_interest(each)]
    return [each for each in _attributes(thing).values() if _is_of_interest(each)]


def _names(code: CodeType) -> set[str]:
    inner = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where nothing is in it yet
    except ValueError:
        return False
    return True


def _is_of_interest(thing: object) -> bool:
    if isinstance(thing, (type, ModuleType, str, bytes, int, float, bool, type(None))):
        return False
    return isinstance(thing, (FunctionType, MethodType, functools.partial)) or bool(_attributes(thing))


def _attributes(thing: object) -> dict[str, Any]:
    if isinstance(thing, (type, ModuleType, FunctionType)):
        return {}
    try:
        found = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}
