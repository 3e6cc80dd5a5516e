"""What the topics of prove.py share: rows of their tables, and commands run outside the process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
WORK = REPOSITORY / "runs" / "prove" / "work"
RUN = REPOSITORY / "runs" / "quickstart"
Row = dict[str, Any]


def row(claim: str, target: str, measured: str, holds: bool | None) -> Row:
    # Said at once: a proof that takes an hour may be ended before its table is printed.
    print(f"  {claim} | {target} | {measured} | {holds}", flush=True)
    return {"claim": claim, "target": target, "measured": measured, "holds": holds}


# Large tensors are mapped, and unmapped when freed: the peak of the process is then the peak of live tensors. It costs
# time, so nothing that is timed runs like this.
PRECISE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def call(command: Sequence[str], accepted: Sequence[int] = (0,), **variables: str) -> None:
    print("$", " ".join(command), flush=True)
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    environment = os.environ | {"PATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | variables
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if result.returncode not in accepted:
        raise SystemExit(f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}\nfailed: {' '.join(command)}")
