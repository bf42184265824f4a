"""A function over many items in other processes: results in order, as they come, and a process
that dies costs only the item that killed it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from joblib import Parallel, delayed, parallel_config

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int = 0
) -> Iterator[Result | None]:
    """``function`` of every item, in order; None for an item whose process died.

    Args:
        function: must not raise; with processes, it and the items have to be picklable.
        processes: 0 works in this process, which then dies with the item; else at least 2, each
            with one thread.

    Raises:
        ValueError: one process, or a negative number of them.
    """
    if processes < 0 or processes == 1:
        raise ValueError(f"processes={processes}: give 0 (this process) or at least 2.")
    if processes == 0:
        return map(function, items)
    return _across(function, iter(items), processes)


def _across(
    function: Callable[[Item], Result], source: Iterator[Item], processes: int
) -> Iterator[Result | None]:
    sent: deque[Item] = deque()
    ended = False

    def calls() -> Iterator[object]:
        nonlocal ended
        for item in source:
            sent.append(item)
            yield delayed(function)(item)
        ended = True

    while not ended or sent:
        while sent:  # one of these killed its process: the others get another try
            yield _alone(function, sent.popleft(), processes)
        try:
            result: Result
            for result in _parallel(calls(), processes):
                sent.popleft()
                yield result
        except BrokenProcessPool:
            continue


def _alone(function: Callable[[Item], Result], item: Item, processes: int) -> Result | None:
    try:
        return next(_parallel(iter([delayed(function)(item)]), processes))
    except BrokenProcessPool:
        return None


def _parallel(calls: Iterator[object], processes: int) -> Iterator[Result]:
    # configured for this one run: what other code does with joblib stays as it is
    with parallel_config("loky", n_jobs=processes, inner_max_num_threads=1):
        run = Parallel(return_as="generator")
    results: Iterator[Result] = run(calls)
    return results
