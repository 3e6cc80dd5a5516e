"""What ranks tell each other beside gradients: that someone asked them to stop, and where each of them stands.

Every rank writes where it is to a board (a TCPStore of the first rank) and passes the boundaries between chunks
together. There a stop that any rank was asked for reaches all at the same place, so none waits for another that has
left. A thread beside each rank ends the process where it has stood still for too long, and tells which rank it waited
for: a hung job costs as much as a running one.
"""

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pipeline.runtime.attempt import write_end
from pipeline.runtime.ranks import Ranks, from_first

# Exit codes beside 0 and 2 (something that the user can mend). The first is EX_TEMPFAIL of sysexits.h: run it again.
STOPPED = 75
LOST = 76
NOT_FINITE = 77

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_BOARD_PATIENCE = timedelta(seconds=5)
_LATER_RANKS_WAIT = 2.0  # seconds: the board goes with the first rank, and the others should still have read it


class StopRequested(Exception):
    """Raised on every rank at the same boundary; the message says why."""


@dataclass
class Watch:
    """What a rank's main thread, its signal handlers and its watchdog share."""

    ranks: Ranks
    flags: Any  # a gloo group: flags must not wait for the GPU
    board: dist.TCPStore
    max_stall_seconds: float
    number: int  # boundaries passed
    place: str  # where the run is, in words
    since: float  # when it came there
    asked: str  # why this rank was asked to stop


def start_watch(ranks: Ranks, max_stall_seconds: float) -> Watch:
    """Board, watchdog and handlers of SIGTERM, SIGUSR1 and SIGINT, which from now on ask for a stop at a boundary."""
    host = os.environ["MASTER_ADDR"]
    board = dist.TCPStore(host, 0, is_master=True, timeout=_BOARD_PATIENCE) if ranks.is_first else None
    port = from_first(board.port if board is not None else 0, ranks)
    if board is None:
        board = dist.TCPStore(host, port, is_master=False, timeout=_BOARD_PATIENCE)
    patience = timedelta(seconds=max_stall_seconds + 120)
    flags = dist.new_group(backend="gloo", timeout=patience) if ranks.world_size > 1 else None
    watch = Watch(ranks, flags, board, max_stall_seconds, 0, "", time.monotonic(), "")
    mark(watch, "the start")

    def ask(number: int, frame: Any) -> None:
        watch.asked = f"{signal.Signals(number).name} on rank {ranks.rank}"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    for number in _SIGNALS:
        signal.signal(number, ask)
    threading.Thread(target=_look_out, args=(watch,), daemon=True).start()
    return watch


def stop_watching_signals() -> None:
    """Signals end the process again: it is on its way out."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def mark(watch: Watch, place: str) -> None:
    """Say where this rank is now."""
    watch.place, watch.since = place, time.monotonic()
    watch.board.set(f"rank {watch.ranks.rank}", f"{watch.number}|{place}")


def pass_boundary(watch: Watch, place: str) -> None:
    """Say where this rank is now, and stop here if any rank was asked to. Every rank must call it as often.

    Raises:
        StopRequested: on all ranks at once.
    """
    watch.number += 1
    mark(watch, place)
    asked = torch.tensor([int(bool(watch.asked))])
    if watch.flags is not None:
        dist.all_reduce(asked, group=watch.flags)
    if asked.item():
        reasons = [watch.asked]
        if watch.flags is not None:
            reasons = [""] * watch.ranks.world_size
            dist.all_gather_object(reasons, watch.asked, group=watch.flags)
        raise StopRequested(", ".join(reason for reason in reasons if reason))


def _look_out(watch: Watch) -> None:
    later = 0.0 if watch.ranks.is_first else _LATER_RANKS_WAIT
    while True:
        time.sleep(min(1.0, watch.max_stall_seconds / 20))
        stood = time.monotonic() - watch.since
        if stood > watch.max_stall_seconds + later:
            message = (
                f"error: rank {watch.ranks.rank} has stood at {watch.place} for {stood:.0f} s "
                f"(run.max_stall_seconds={watch.max_stall_seconds:g}); {who_is_behind(watch)}; its stacks:"
            )
            print(message, file=sys.stderr, flush=True)
            write_end(watch.ranks, LOST, None, message)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            os._exit(LOST)


def who_is_behind(watch: Watch) -> str:
    """The ranks that others wait for, and where they were seen last; read from the board."""
    found: list[str] = []

    def read() -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):
            found.extend([watch.board.get(f"rank {rank}").decode() for rank in range(watch.ranks.world_size)])

    # The store's own timeout does not help against a first rank that is there and does nothing.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(2 * _BOARD_PATIENCE.total_seconds())
    if not found:
        return "the first rank does not answer: it has ended or stands still"
    numbers = [int(text.partition("|")[0]) for text in found]
    places = [text.partition("|")[2] for text in found]
    behind = [rank for rank, number in enumerate(numbers) if number < max(numbers)]
    if not behind:
        return "no rank is behind the others"
    shown = "; ".join(f"rank {rank}, last seen at {places[rank]}" for rank in behind[:8])
    return f"the others wait for {shown}" + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")


def end_alone(error: BaseException, ranks: Ranks, watch: Watch | None) -> NoReturn:
    """End this process at once and say why: another rank is gone, or this one alone has failed.

    Leaving in order is not possible: it would talk to ranks that are gone, or wait inside a collective for this one.
    """
    code = 1
    if is_lost_peer(error, ranks):
        where = f" at {watch.place}; {who_is_behind(watch)}" if watch else ""
        print(f"error: rank {ranks.rank} lost another rank{where}; the same command goes on", file=sys.stderr)
        print(f"[rank {ranks.rank}] what failed: {error}", file=sys.stderr)
        code = LOST
    else:
        traceback.print_exception(error)
    write_end(ranks, code, None, f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """End this process with everything that Python has to do at its end, but without unloading C++ libraries.

    Threads of gloo and torch have been seen to abort a rank there (exit code -6) after a run that was whole, and a
    scheduler takes that for a failed job. Only MPI must be told of the end, and is told by the usual way out.
    """
    if "mpi4py.MPI" in sys.modules:
        raise SystemExit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_peer(error: BaseException, ranks: Ranks) -> bool:
    """Whether a collective failed because another rank is gone (gloo and NCCL say so in words only)."""
    text = str(error)
    if ranks.world_size == 1 or "out of memory" in text or "CUDA error" in text:
        return False
    gloo = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out")
    nccl = ("remote process exited", "connection closed", "communicator was aborted")
    unreachable = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
    return unreachable or any(word in text for word in (*gloo, *nccl))
