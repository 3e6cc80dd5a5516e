"""Which rank this process is, from the variables of whatever launcher started it.

RANK, WORLD_SIZE, ...      deepspeed, torchrun: taken as they are
SLURM_STEP_NUM_TASKS       srun, one task a rank, with or without an MPI
PMI_SIZE, OMPI_...         mpiexec: MPI itself (mpi4py) tells the ranks where to meet
none of them               one process, alone

A launch whose processes would each take themselves for the whole run is an error: such runs end well, and wrong.
"""

import os
import re
import socket
from collections.abc import Mapping

from pipeline.data.parallel import communicator, mpi_size


def find_place() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; LOCAL_WORLD_SIZE where the launcher tells it.

    Raises:
        ValueError: the launch would split into several runs.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size < tasks:
            raise ValueError(
                f"srun started {tasks} tasks, but WORLD_SIZE={world_size} (RANK={os.environ['RANK']}): the tasks would "
                "be separate runs in one folder; unset RANK and WORLD_SIZE, and each takes its place from SLURM"
            )
        return {}
    if tasks > 1:
        return slurm_place(os.environ)
    if mpi_size() > 1:
        return mpi_place()
    if "SLURM_STEP_ID" not in os.environ and (allocated := int(os.environ.get("SLURM_NTASKS", "1"))) > 1:
        raise ValueError(
            f"SLURM_NTASKS={allocated}, but this is a single process: the job's other tasks would stand idle; put srun "
            "in front, or submit slurm/train.sbatch"
        )
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def slurm_place(variables: Mapping[str, str]) -> dict[str, str]:
    """The place of a task that srun started, from the variables of its step."""
    per_node = expand_counts(variables["SLURM_STEP_TASKS_PER_NODE"])
    # A port of the job's own: a step that has just ended may still hold the one it had.
    port = 20000 + (8 * int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"])) % 20000
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(variables["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }


def mpi_place() -> dict[str, str]:
    """The place of a rank that mpiexec started; all ranks must call it."""
    from mpi4py import MPI

    world = communicator()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    rank, first = world.Get_rank(), (socket.gethostname(), free_port())
    host, port = world.bcast(first, root=0)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(node.Get_rank()),
        "LOCAL_WORLD_SIZE": str(node.Get_size()),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }


def first_host(nodes: str) -> str:
    """The first name of SLURM's compressed list of hosts: `gpu-[03-05,9],login` -> `gpu-03`.

    `scontrol show hostnames` would tell too, but containers mostly have none.
    """
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    assert found is not None, f"SLURM's list of nodes begins with a name: {nodes!r}"
    return "".join(part or "" for part in found.groups())


def expand_counts(counts: str) -> list[int]:
    """SLURM's tasks of each node: `8(x3),4` -> [8, 8, 8, 4]."""
    found = []
    for part in counts.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        found += [int(number)] * int(times or 1)
    return found


def free_port() -> str:
    """A port that no process of this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])
