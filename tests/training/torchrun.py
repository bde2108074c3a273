"""Scripts of this folder on two processes of this machine, over gloo."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import fresh_process
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FOLDER = Path(__file__).parent


def torchrun(script: str | Path, *arguments: str | Path):
    """Run a script on two fresh processes, which both have to succeed, by what the command `torchrun` runs them by.

    Raises:
        ChildFailedError: If one of them fails or is killed; the other has been ended then.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
    )
    elastic_launch(config, fresh_process.run_script)(str(FOLDER / script), *map(str, arguments))


def torchrun_command(script: str | Path, *arguments: str | Path) -> int:
    """The exit status of the command itself, whose processes start from nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), str(FOLDER)])}
    return subprocess.run([*command, str(FOLDER / script), *map(str, arguments)], env=environment).returncode


def torchrun_fails(script: str | Path, *arguments: str | Path) -> bool:
    """Whether one of the two processes of a script fails."""
    try:
        torchrun(script, *arguments)
    except ChildFailedError:
        return True
    return False


def leave():
    """
    End a script, none of whose names may refer to a trainer any more. Gloo's threads abort a process that exits before
    they are joined; and that waits for whatever holds the group, such as DDP.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
