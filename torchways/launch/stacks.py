"""The stacks of a node's processes, as they print them on SIGUSR1."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence

from torchways.launch.child import Child
from torchways.rpc import torchways_pb2 as pb

#: How long a process may take to print its stacks, and how much of them is passed on.
_SECONDS = 5.0
_MAX_CHARACTERS = 1 << 20


async def dumped_stacks(children: Sequence[Child], which: pb.DumpStacksRequest) -> AsyncIterator[pb.ProcessStacks]:
    """Has the children that a request means, and this node agent, print their stacks; returns each when it is there."""
    host = socket.gethostname()

    def is_meant(name: str, pid: int) -> bool:
        return (not which.pids or pid in which.pids) and (not which.names or name in which.names)

    async def dump(child: Child) -> pb.ProcessStacks:
        text = await child.stacks(_SECONDS)
        return pb.ProcessStacks(name=child.name, pid=child.pid, host=host, text=text[:_MAX_CHARACTERS])

    if is_meant("node agent", os.getpid()):
        text = _own_stacks()[:_MAX_CHARACTERS]
        yield pb.ProcessStacks(name="node agent", pid=os.getpid(), host=host, text=text)
    for dumped in asyncio.as_completed([dump(child) for child in children if is_meant(child.name, child.pid)]):
        yield await dumped


def _own_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().strip("\n")
