"""Streams as tests hold them: message by message, with whatever they want to say."""

import asyncio

from torchways.link.stream import LoopStream
from torchways.rpc.streams import open_offered, parsing


class Lost(Exception):
    """The stream has ended."""


class TestStream:
    """A stream that a call offered.

    Args:
        kind: of the messages that come.
    """

    __test__ = False

    def __init__(self, kind):
        self._came = asyncio.Queue()
        self._stream = LoopStream(
            parsing(kind, self._came.put_nowait), lambda reason: self._came.put_nowait(Lost(reason))
        )

    @classmethod
    async def opened(cls, call, kind):
        """Opens it; raises what the call raises."""
        stream = cls(kind)
        await open_offered(call, stream._stream)
        return stream

    def send(self, *messages):
        """Sends messages, or bytes that are none."""
        for message in messages:
            self._stream.send(message if isinstance(message, bytes) else message.SerializeToString())

    async def read(self):
        """Returns the next message.

        Raises:
            Lost: there is none any more.
        """
        found = await self._came.get()
        if isinstance(found, Lost):
            self._came.put_nowait(found)
            raise found
        return found

    def close(self):
        """Ends it."""
        self._stream.close()
