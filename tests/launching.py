"""Start real runs as a user would: the deepspeed launcher, on CPU, with a free port."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """This environment, with the scripts of the interpreter's own environment first and no GPU."""
    binaries = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # small tensors, and other tests beside this one
    }


def launch(
    script: str | Path, arguments: Sequence[str], world_size: int, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_accelerators W script ...`; the result holds both outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["deepspeed", "--num_accelerators", str(world_size), "--master_port", str(port), str(script), *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=900)
    left = list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    assert not left, f"the run left shared memory behind: {left}"
    return result


def launch_ranks(script: str | Path, arguments: Sequence[str], world_size: int) -> list[subprocess.Popen[str]]:
    """One process a rank with the variables that any launcher sets: nobody answers for a rank but itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=REPOSITORY,
            env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_python(
    script: str | Path, arguments: Sequence[str], cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """`python script ...` in a process of its own."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=900)


def require_success(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, f"{result.args}\n{result.stdout[-4000:]}\n{result.stderr[-6000:]}"
