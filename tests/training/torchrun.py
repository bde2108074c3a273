"""Modules of the tests as scripts, on two processes of this machine, over gloo."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fresh_process
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def torchrun(script: ModuleType, *arguments: str | Path):
    """Run a module as a script on two fresh processes, started and watched by what the command `torchrun` uses.

    Raises:
        ChildFailedError: If one of them fails or is killed; the other has been ended by then.
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
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in caught}  # which the launcher leaves as its own
    try:
        elastic_launch(config, fresh_process.run_script)(script.__file__, *map(str, arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_on_two(script: ModuleType, processor, folder: Path) -> Path:
    """Run a module that reads its tokenizer in a folder, and leaves there what it made; returns the folder."""
    processor.tokenizer.save_pretrained(folder / "tokenizer")
    torchrun(script, folder)
    return folder


def assert_both_step(folder: Path, case: str, expected: dict[str, torch.Tensor]):
    """That each of two processes of `run_on_two` took the step of a case that one process takes."""
    assert sum(value.abs().max() > 1e-4 for value in expected.values()) > 30
    for rank in (0, 1):
        actual = torch.load(folder / f"gradients-{rank}.pt")[case]
        for name, value in expected.items():
            # Entries are sums of larger terms, which processors round each in its own way.
            atol = max(1e-5, 2e-4 * value.abs().max().item())
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def torchrun_command(script: ModuleType, *arguments: str | Path) -> int:
    """The exit status of the command itself, whose processes are not forked."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*command, str(script.__file__), *map(str, arguments)], env=environment).returncode


def leave():
    """End a script, none of whose names may refer to a trainer any more.

    Gloo's threads abort a process that exits before they are joined; and that waits for whatever holds the group, such
    as DDP.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
