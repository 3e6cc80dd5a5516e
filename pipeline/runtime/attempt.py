"""What the script of a batch job must know of the run that it started, as files of one line.

The script names a folder for every attempt (every start of the job) in BGE_ICL_ATTEMPT; without it nothing is written.

ready   signals are heeded from now on; holds the number of steps done so far
end     exit code, steps done ("-": not known) and the reason; absent where the first rank was killed

A folder an attempt: what a former one left is never taken for this one's, whatever that one did at its end.
"""

import os
from pathlib import Path

from pipeline.files import write_text
from pipeline.runtime.ranks import Ranks

ATTEMPT = "BGE_ICL_ATTEMPT"
READY, END = "ready", "end"


def write_ready(ranks: Ranks, steps: int) -> None:
    """Every rank heeds signals, and `steps` steps are done."""
    _write(ranks, READY, str(steps))


def write_end(ranks: Ranks, code: int, steps: int | None, reason: str) -> None:
    """Why the run ends, with which exit code, after how many steps."""
    _write(ranks, END, f"{code} {'-' if steps is None else steps} {' '.join(reason.split())}")


def _write(ranks: Ranks, name: str, line: str) -> None:
    folder = os.environ.get(ATTEMPT)
    if folder and ranks.is_first:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_text(Path(folder) / name, line + "\n")
        except OSError as error:  # a full disk must not hide why a run ends
            print(f"warning: {Path(folder) / name} cannot be written: {error}", flush=True)
