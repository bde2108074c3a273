"""Scripts of this folder on two processes of this machine, over gloo."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

FOLDER = Path(__file__).parent


def environment() -> dict[str, str]:
    """For a script that imports from the tests."""
    paths = [str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def torchrun(script: str, *arguments: str | Path, check: bool = True, timeout: float = 120) -> int:
    """Run a script on two processes; with `check`, both have to succeed. Returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(FOLDER / script), *map(str, arguments)]
    with subprocess.Popen(command, env=environment(), start_new_session=True) as launcher:
        try:
            code = launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)  # its processes too
            raise
    if check and code:
        raise subprocess.CalledProcessError(code, command)
    return code


def leave():
    """
    End a script, none of whose names may refer to a trainer any more. Gloo's threads abort a process that exits before
    they are joined; and that waits for whatever holds the group, such as DDP.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
