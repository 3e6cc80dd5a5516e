"""Independent tasks on processes of this machine, or on the ranks of an MPI job over many nodes.

Under mpiexec or srun the first rank hands out tasks one by one and the others work them off, so fast and slow nodes
both stay busy, and no result depends on their number. Files pass between stages: the build folder must be on a file
system that all nodes see.
"""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING_PER_PROCESS = 2


def mpi_size() -> int:
    """Ranks of the MPI job that this process belongs to; 1 without one, where mpi4py is not imported.

    Raises:
        ValueError: several processes were started that would each take themselves for the only one.
    """
    wanted = next((int(os.environ[n]) for n in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE") if n in os.environ), None)
    if wanted is None and "PMIX_RANK" in os.environ:
        wanted = int(os.environ.get("SLURM_STEP_NUM_TASKS", "2"))
    if wanted is None:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            raise ValueError(f"srun started {tasks} tasks that cannot find each other; use srun --mpi=pmi2")
        return 1
    if wanted == 1:
        return 1
    size = _communicator().Get_size()
    if size != wanted:
        raise ValueError(
            f"{wanted} ranks were started, but MPI sees {size}: mpi4py found the library of another MPI than the one "
            "that started them; load the module that belongs to it, or pip install 'bge-icl-train[mpi]'"
        )
    return size


def serve_first_rank() -> bool:
    """On a rank of an MPI job other than the first: work off what that one hands out, until it ends.

    Returns:
        whether this process was such a rank, and so has nothing left to do.
    """
    if mpi_size() == 1 or _communicator().Get_rank() == 0:
        return False
    from mpi4py.futures import MPICommExecutor

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with MPICommExecutor(_communicator(), root=0):
        pass
    return True


def _communicator() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"this process was started as a rank of an MPI job, but MPI cannot be loaded: {error}; load your site's "
            "MPI module, or pip install 'bge-icl-train[mpi]'"
        ) from error
    return MPI.COMM_WORLD


@contextmanager
def open_pool(processes: int) -> Iterator[Executor | None]:
    """Fresh processes, or the other ranks of an MPI job; None for one process: tasks then run in this one."""
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    # One thread a process: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if mpi_size() > 1:
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(_communicator(), root=0) as ranks:
            assert isinstance(ranks, Executor), "only the first rank comes here"
            yield ranks
        return
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
        finally:
            for future in waiting:
                future.cancel()
    return results
