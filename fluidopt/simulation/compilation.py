"""How the simulators are compiled, and the types of what compiled code reads and writes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit
from numba.core.dispatcher import Dispatcher

AnyArray = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

integer = cast(Callable[[Any], int], np.int64)  # what numba makes of an index; to a type checker, an int


def record(**columns: str) -> np.dtype[np.void]:
    """A record type from column names by format, padded as in C."""
    return np.dtype([(name, kind) for kind, names in columns.items() for name in names.split()], align=True)


def compiled(function: Function) -> Function:
    """Compile a function that is forced inline, as a call would pass some 150 words of array descriptors in memory."""
    return _compiled(function, inline=True)


def compiled_apart(function: Function) -> Function:
    """Compile one that is called: from Python, or by few policies, so that its mere presence would slow the others."""
    return _compiled(function, inline=False)


def _compiled(function: Function, *, inline: bool) -> Function:
    """Without reference counts: nothing compiled here allocates, and atomic counts cost 90 % of the speed."""
    options: dict[str, Any] = {
        "cache": True,
        "nogil": True,
        "error_model": "numpy",
        "forceinline": inline,
        "_nrt": False,
    }
    dispatcher = njit(**options)(function)
    if isinstance(dispatcher, Dispatcher):  # it is the plain function where NUMBA_DISABLE_JIT is set
        _watch_callees(dispatcher)
    return cast(Function, dispatcher)


def _watch_callees(dispatcher: Any) -> None:
    """Let the cache on disk forget a function also when a file changes from which it imports what it calls.

    The machine code holds that of all callees, but numba compares only the file in which the function itself stands.
    These are private names of numba's; in a version that has others, its own comparison is all there is.
    """
    known = [value for value in dispatcher.py_func.__globals__.values() if isinstance(value, Dispatcher)]
    with contextlib.suppress(AttributeError):
        stamps = {repr(each._cache._cache_file._source_stamp) for each in (dispatcher, *known)}
        dispatcher._cache._cache_file._source_stamp = hashlib.sha256("".join(sorted(stamps)).encode()).digest()
