"""The simulated devices of one island, as a process that the executors of all its hosts share (fifo_devices.py).

The first line of a connection is the secret that the node agent gave both ends; who does not know it is not served.
Then a line of JSON a message: `{"enqueue": key, "devices": [...], "parts": n, "seconds": s}` is answered by
`{"enqueued": key}` when it is in the queues, and by `{"done": key}` when it has run.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import logging
import os
import signal

from torchways.addresses import address_of
from torchways.observability.process import die_with_parent, setup_process
from torchways.runtime.fifo_devices import FifoDevices

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "TORCHWAYS_SIMULATOR_SECRET"

_CHECK_SECONDS = 2.0


class _Simulator:
    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._devices = FifoDevices()
        self._members: dict[str, list[asyncio.StreamWriter]] = {}
        self._seconds: dict[str, float] = {}
        self._num_started = 0

    async def serve_executor(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes the computations of one executor."""
        try:
            if not hmac.compare_digest((await reader.readline()).strip(), self._secret):
                logger.warning("refused a connection that does not know the secret")
                return
            while line := await reader.readline():
                message = json.loads(line)
                key, devices, num_parts = message["enqueue"], list(message["devices"]), int(message["parts"])
                seconds = float(message["seconds"])
                self._members.setdefault(key, []).append(writer)
                self._seconds[key] = seconds
                started = self._devices.enqueue(key, devices, num_parts)
                _tell(writer, {"enqueued": key})
                self._start(started)
        except ConnectionError:
            pass
        except (ValueError, KeyError, TypeError) as error:  # a line that is too long, or no such message
            logger.warning("lost a connection: %s", error)
        finally:
            self._drop(writer)
            writer.close()

    def _start(self, keys: list[str]) -> None:
        for key in keys:
            self._num_started += 1
            asyncio.get_running_loop().call_later(self._seconds[key], self._finish, key)

    def _finish(self, key: str) -> None:
        if key not in self._members:  # an executor of its gang is gone
            return
        del self._seconds[key]
        for writer in self._members.pop(key):
            _tell(writer, {"done": key})
        self._start(self._devices.finish(key))

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        """An executor is gone: what it took part in would never end."""
        for key in [key for key, members in self._members.items() if writer in members]:
            for member in self._members.pop(key):
                _tell(member, {"done": key})
            del self._seconds[key]
            self._start(self._devices.finish(key))

    async def watch(self) -> None:
        """Says when nothing moves any more."""
        before = -1
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if self._devices.num_waiting and self._num_started == before:
                circle = self._devices.deadlock()
                if circle:
                    logger.error("deadlock: %s wait for each other", ", ".join(circle))
                else:
                    logger.info("%d computations wait for their hosts", self._devices.num_waiting)
            before = self._num_started


def _tell(writer: asyncio.StreamWriter, message: dict[str, str]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def serve(host: str, ready_fd: int) -> None:
    """Runs until it is told to end."""
    simulator = _Simulator(os.environ.pop(SECRET_VARIABLE))
    server = await asyncio.start_server(simulator.serve_executor, host, 0)
    port = server.sockets[0].getsockname()[1]
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(json.dumps({"address": address_of(host, port)}) + "\n")
    await asyncio.gather(server.serve_forever(), simulator.watch())


def main() -> None:
    """Entry point of `python -m torchways.runtime.device_simulator`; started by a node agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process("device simulator")
    die_with_parent(arguments.parent_pid)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(arguments.host, arguments.ready_fd))


if __name__ == "__main__":
    main()
