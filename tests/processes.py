"""A function run in several processes that share a gloo group, as torchrun would start them."""

import io
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

_PRELOADED = [
    "lightning.pytorch",
    "tenzoo.callbacks",
    "tenzoo.tasks",
    "tenzoo.data",
    "tenzoo.compression",
    "tenzoo.cli",
]


def in_processes(function: Callable[..., Any], *args: Any, count: int = 2, timeout: float = 300) -> list[Any]:
    """What a module's function returns in each of the processes, by rank.

    All calls fork from one server that has imported torch and Lightning once. Within, ``Trainer(strategy="ddp",
    devices=2)`` joins the group, and several Trainers may follow one another. Warnings are errors, as in pytest.

    Raises:
        AssertionError: With the traceback of the first rank that fails; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_work, args=(rank, count, port, pipes[rank][1], function, args), daemon=True)
        for rank in range(count)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()  # the child has its own: the end of the child is the end of the pipe
    try:
        return _collect([receiver for receiver, _ in pipes], timeout)
    finally:
        for process in processes:
            process.kill() if process.is_alive() and sys.exc_info()[0] else process.join(timeout)


def _collect(receivers: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        ready = wait([each for rank, each in enumerate(receivers) if rank not in results], timeout)
        assert ready, f"no word from ranks {sorted(set(range(len(receivers))) - set(results))} in {timeout} s"
        for each in ready:
            rank = receivers.index(each)  # type: ignore[arg-type]
            try:
                failure, result = torch.load(io.BytesIO(each.recv_bytes()), weights_only=False)  # type: ignore[union-attr]
            except EOFError:
                failure = "it ended without a word"
            assert failure is None, f"rank {rank}: {failure}"
            results[rank] = result
    return [results[rank] for rank in range(len(receivers))]


def _work(rank: int, count: int, port: int, sender: Connection, function: Callable[..., Any], args: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier test: Lightning would seed these anew
    rank_zero_only.rank = rank  # as it is where the variables are set before Lightning is imported
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    try:
        answer = None, function(*args)
    except BaseException:
        answer = traceback.format_exc(), None
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    sender.send_bytes(buffer.getvalue())
    sender.close()
    if torch.distributed.is_initialized() and answer[0] is None:
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # nothing of the server's is to be cleaned up here


_EXPECTED = (
    ".*does not have many workers",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "GPU available but not used",
    "`(is_)?gradient_checkpointing",  # names that transformers renames
)
