"""The simulated devices' server serves who knows its secret; wrong lines lose their connection, and no other."""

import asyncio
import json

from torchways.runtime.device_simulator import _Simulator


async def _talk(port, *lines):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.writelines(line + b"\n" for line in lines)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer.decode().splitlines()


def test_only_who_knows_the_secret_is_served():
    async def run():
        server = await asyncio.start_server(_Simulator("secret").serve_executor, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        enqueue = json.dumps({"enqueue": "a", "devices": [0], "parts": 1, "seconds": 0.0}).encode()
        assert await _talk(port, b"guess", enqueue) == []
        assert await _talk(port, enqueue) == []
        for wrong in (b"no json", b"[]", b"{}", b'{"enqueue": "b", "seconds": 0}', b"x" * 100_000):
            assert await _talk(port, b"secret", wrong) == []
        assert {"enqueued": "a"} in map(json.loads, await _talk(port, b"secret", enqueue))
        server.close()

    asyncio.run(run())
