"""What SLURM says of jobs, by squeue and scontrol alone: many sites have no sacct."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 15  # seconds for an answer of SLURM
MAX_JOBS = 20  # the newest ones that squeue is asked for
MAX_ENDED = 3  # the newest of those that it does not list, a chain: scontrol takes a call for each
FORMAT = "%i|%j|%T|%M|%l|%D|%R"
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING")
GONE = "gone"  # SLURM no longer knows the job: it ended some minutes ago, or is another cluster's; or was not asked for
FAULTS = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
# REVOKED is not among them: another cluster of the federation has the job then.
OVER = ("COMPLETED", "CANCELLED", "PREEMPTED", *FAULTS, GONE)


@dataclass(frozen=True)
class QueuedJob:
    """A job, or a task of an array, as the queue has it or had it."""

    id: str
    name: str
    state: str  # SLURM's word, or gone
    detail: str


def ask_slurm(ids: Sequence[str]) -> tuple[tuple[QueuedJob, ...], str]:
    """(the jobs as SLURM has them, why its word is missing or "").

    Args:
        ids: job ids, oldest first; of an array's task (`12_3`) the whole array is asked for.
    """
    wanted = list(dict.fromkeys(job.partition("_")[0] for job in ids))[-MAX_JOBS:]
    if not wanted:
        return (), ""
    if shutil.which("squeue") is None:
        return (), "no squeue on the PATH"
    code, text = _run("squeue", "--noheader", "--all", "--array", f"--format={FORMAT}", f"--jobs={','.join(wanted)}")
    if code and "Invalid job id" not in text:
        return (), f"squeue: {_last_line(text).removeprefix('squeue: ')}"
    jobs = read_squeue(text) if not code else ()
    found = {job.id.partition("_")[0] for job in jobs}
    ended = [job for job in wanted if job not in found]
    jobs += tuple(QueuedJob(job, "", GONE, "not in the queue; scontrol not asked") for job in ended[:-MAX_ENDED])
    for job in ended[-MAX_ENDED:]:
        jobs += _ended(job)
    return tuple(sorted(jobs, key=lambda job: [int(number) for number in re.findall(r"\d+", job.id)])), ""


def read_squeue(text: str) -> tuple[QueuedJob, ...]:
    """Rows of squeue in FORMAT."""
    jobs = []
    for line in text.splitlines():
        if len(cells := line.split("|", 6)) == 7:
            job, name, state, used, limit, nodes, where = cells
            if state in RUNNING:
                detail = f"for {used} of {limit} on {nodes} nodes: {where}"
            else:
                detail = f"{where.strip('()')}, {nodes} nodes, time limit {limit}"
            jobs.append(QueuedJob(job, name, state, detail))
    return tuple(jobs)


def _ended(job: str) -> tuple[QueuedJob, ...]:
    """A job that squeue does not list; scontrol knows it for some minutes (MinJobAge)."""
    if shutil.which("scontrol") is None:
        return (QueuedJob(job, "", GONE, ""),)
    code, text = _run("scontrol", "show", "job", "--oneliner", job)
    return read_scontrol(text) if not code and "JobId=" in text else (QueuedJob(job, "", GONE, ""),)


def read_scontrol(text: str) -> tuple[QueuedJob, ...]:
    """Lines of `scontrol show job --oneliner`."""
    jobs = []
    for line in text.splitlines():
        # The first of a name: free text, such as a comment, comes later.
        fields: dict[str, str] = {}
        for name, value in re.findall(r"(\w+)=(\S*)", line):
            fields.setdefault(name, value)
        if "JobId" in fields:
            array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId")
            job = f"{array}_{task}" if array and task else fields["JobId"]
            detail = f"exit code {fields.get('ExitCode', '?')}, ended {fields.get('EndTime', '?').replace('T', ' ')}"
            jobs.append(QueuedJob(job, fields.get("JobName", ""), fields.get("JobState", "?"), detail))
    return tuple(jobs)


def _run(*command: str) -> tuple[int, str]:
    """(exit code, all output) of a command of SLURM; 124 where it does not answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {PATIENCE} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout if not done.returncode else done.stdout + done.stderr


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "failed without a word"
