"""Fresh processes that start in milliseconds.

Each is forked from a server that has imported the libraries and nothing of ours, so that it holds no module of mmgem,
no class that mmgem registers with transformers, and no state of the tests. Python's own start and the import of the
libraries take seconds and are paid once for all: by the server, or by a worker of pytest-xdist that it is forked from.
"""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from unittest import mock

LIBRARIES = [
    "torch",
    "torch.distributed.fsdp",
    "datasets",
    "evaluate",
    "faiss",
    "peft",
    "sentence_transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.siglip.modeling_siglip",
    "transformers.pipelines",
    "transformers.trainer",
]
TIMEOUT = 900  # seconds; many times what any takes, also beside other work: a process that hangs is ended

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


def fork_server() -> None:
    """Fork the server from this process, which is to import the libraries too, instead of starting a new one."""
    for name in LIBRARIES:
        importlib.import_module(name)
    resource_tracker.ensure_running()  # which is started anew
    with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(python: bytes, arguments: list, descriptors: list[int]) -> int:
    """In the place of `spawnv_passfds`: runs the code that the new process would run, and nothing after it."""
    process = os.fork()
    if process:
        return process
    try:
        faulthandler.disable()
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        first = 3
        for descriptor in [*sorted(descriptors), os.sysconf("SC_OPEN_MAX")]:
            os.closerange(first, descriptor)
            first = descriptor + 1
        exec(arguments[-1])
    finally:
        os._exit(0)


def run(code: str, *arguments: str | Path, cwd: Path, installed: bool) -> str:
    """What code prints, as `__main__` of a process that has to succeed.

    Args:
        code: It finds its arguments in `sys.argv[1:]`.
        cwd: Folder that it runs in.
        installed: Whether it can import mmgem.

    Raises:
        RuntimeError: If the process fails; with the end of its standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, out, err = (Path(folder) / name for name in ("script.py", "out.txt", "err.txt"))
        script.write_text(code, encoding="utf-8")
        command = [script, *map(str, arguments)]
        process = context.Process(target=_run, args=(command, cwd, installed, out, err))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{code}\nended with status {process.exitcode}:\n{err.read_text()[-4000:]}")
        return out.read_text()


def _run(command: list, cwd: Path, installed: bool, out: Path, err: Path):
    for stream, path in (sys.stdout, out), (sys.stderr, err):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    if not installed:
        sys.modules["mmgem"] = None  # type: ignore[assignment]
    run_script(*command)


def run_script(script: str | Path, *arguments: str):
    """A script as `__main__`, in a process that is there for nothing else."""
    gc.freeze()  # what the server has imported stays
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    assert not any(name.startswith("mmgem.") for name in sys.modules)
    sys.argv[1:] = arguments  # the script's own name is put before them
    runpy.run_path(str(script), run_name="__main__")
