"""Independent tasks on a pool of processes, with a bounded number waiting."""

import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING_PER_PROCESS = 2


@contextmanager
def open_pool(processes: int) -> Iterator[Executor | None]:
    """A pool of fresh processes; None for one process: tasks then run in this one."""
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    if processes == 1:
        yield None
        return
    # Spawned, not forked: threads of the libraries loaded here do not survive a fork.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_tasks(
    pool: Executor | None,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    title: str,
    bar: bool,
    total: int | None = None,
) -> list[Result]:
    """Results of all tasks in their order; tasks are drawn only as fast as they are worked off.

    Raises:
        ValueError: a process died (mostly: was killed for want of memory), or what a task raises.
    """
    # Not on a terminal (a batch job's log) a line is written now and then instead of many.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    results: list[Result] = []
    with tqdm(total=total, desc=title, disable=not bar, mininterval=interval, unit="part") as progress:
        if pool is None:
            for task in tasks:
                results.append(function(task))
                progress.update()
            return results
        waiting: deque[Future[Result]] = deque()
        limit = _WAITING_PER_PROCESS * getattr(pool, "_max_workers", 1) + 1
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= limit:
                    results.append(waiting.popleft().result())
                    progress.update()
            while waiting:
                results.append(waiting.popleft().result())
                progress.update()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process died, mostly because memory ran out; run the same command again with fewer --processes: "
                "what is finished is kept"
            ) from error
    return results
