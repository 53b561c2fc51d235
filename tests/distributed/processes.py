"""Real processes on this machine: cheap ones that find each other over gloo, and ones to be killed.

They are forked by a server that has imported torch, transformers and hf_kd once, so that a process costs a fraction of
a second instead of several.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["hf_kd", "tiny"])

# What a process of an earlier launch may have left, or the shell may hold.
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """A port on the loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(function: Callable[..., Any], world_size: int, *args: Any) -> list[BaseProcess]:
    """Start ``function(rank, *args)`` in ``world_size`` processes that form one group, each with its own children."""
    return [process for process, _ in _launch(function, world_size, args, collect=False)]


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``function(rank, *args)`` in each of ``world_size`` processes that form one group; what they return, by rank.

    Raises RuntimeError with the first traceback if one fails, and TimeoutError if they take too long.
    """
    started = _launch(function, world_size, args, collect=True)
    try:
        return _collect([pipe for _, pipe in started], time.monotonic() + timeout)
    finally:
        for process, _ in started:
            end(process)


def _launch(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], *, collect: bool
) -> list[tuple[BaseProcess, Any]]:
    port = free_port()
    started = []
    for rank in range(world_size):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
        receiver, sender = _CONTEXT.Pipe() if collect else (None, None)
        process = _CONTEXT.Process(target=_run, args=(sender, environment, function, (rank, *args)))
        process.start()
        if sender is not None:
            sender.close()
        started.append((process, receiver))
    return started


def end(process: BaseProcess, signal_number: int = signal.SIGKILL) -> None:
    """Send a process and its children (a loader's workers) a signal, and wait until all of them are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)
    with contextlib.suppress(ProcessLookupError):
        # It may not lead its group yet.
        os.kill(process.pid, signal_number)
    process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"The processes {missing} did not finish in time.")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"Process {rank} ended without a result.") from None
            if not succeeded:
                raise RuntimeError(f"Process {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run(pipe: Any, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    faulthandler.enable()
    # As in a terminal: where the tests run in the background, a shell has them and their children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    # As a loader's workers are started where nobody forked this process.
    multiprocessing.set_start_method("fork", force=True)
    if pipe is None:
        function(*args)
        return
    try:
        result = (True, function(*args))
    except BaseException:  # what it was is for the caller to see, SystemExit included
        result = (False, traceback.format_exc())
    # Plainly: multiprocessing would hand tensors over in memory that goes with this process.
    pipe.send_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # The others may still need this one, if only to find it gone: it stays until the test is done with all of them.
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


def wait_for(condition: Callable[[], bool], timeout: float = 60, every: float = 0.002) -> None:
    """Wait until a condition holds; TimeoutError if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("What was waited for did not happen.")
        time.sleep(every)
