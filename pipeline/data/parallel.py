"""Independent tasks on processes of this machine, or on the ranks of an MPI job over many nodes.

Under mpiexec or srun the first rank hands out tasks one by one and the others work them off, so fast and slow nodes
both stay busy, and no result depends on their number. Files pass between stages: the build folder must be on a file
system that all nodes see.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")

INTERRUPTED = 130  # exit code after Ctrl-C
_WAITING_PER_PROCESS = 2
_WAITING_BYTES = 1 << 30
_PR_SET_PDEATHSIG = 1


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
    size = communicator().Get_size()
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
    if mpi_size() == 1 or communicator().Get_rank() == 0:
        return False
    from mpi4py.futures import MPICommExecutor

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first rank alone answers it
    with MPICommExecutor(communicator(), root=0):
        pass
    return True


def communicator() -> Any:
    """MPI's communicator of all ranks; ValueError where MPI cannot be loaded."""
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

        with MPICommExecutor(communicator(), root=0) as ranks:
            assert isinstance(ranks, Executor), "only the first rank comes here"
            try:
                yield ranks
            except KeyboardInterrupt:
                print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
                communicator().Abort(INTERRUPTED)
        return
    if processes == 1:
        yield None
        return
    # Spawned, not forked: threads of the libraries loaded here do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent is killed: nobody would be there to end it (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent alone answers it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run_tasks(
    pool: Executor | None,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    title: str,
    bar: bool,
    total: int | None = None,
    size: Callable[[Task], int] = lambda task: 0,
) -> list[Result]:
    """Results of all tasks in their order; tasks are drawn only as fast as they are worked off.

    Args:
        size: bytes that a task carries with it; those of all waiting tasks are bounded.

    Raises:
        ValueError: a process died (mostly: was killed for want of memory), or what a task raises.
    """
    # Not on a terminal (a batch job's log) a line is written now and then instead of many.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, desc=title, disable=not bar, mininterval=interval, unit="part") as progress:
        if pool is None:
            results = []
            for task in tasks:
                results.append(function(task))
                progress.update()
            return results
        waiting: dict[Future[Result], tuple[int, int]] = {}  # place of the result, bytes
        found: dict[int, Result] = {}
        limit = _WAITING_PER_PROCESS * getattr(pool, "_max_workers", 1) + 1

        def collect() -> None:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                place, _ = waiting.pop(future)
                found[place] = future.result()
                progress.update()

        try:
            for place, task in enumerate(tasks):
                waiting[pool.submit(function, task)] = (place, size(task))
                while len(waiting) >= limit or sum(carried for _, carried in waiting.values()) > _WAITING_BYTES:
                    collect()
            while waiting:
                collect()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process died, mostly because memory ran out; run the same command again with fewer --processes: "
                "what is finished is kept"
            ) from error
        finally:
            for future in waiting:
                future.cancel()
        return [found[place] for place in range(len(found))]
