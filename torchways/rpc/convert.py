"""Our types as messages and back: every pair is inverse to each other."""

from __future__ import annotations

from torchways.errors import Failure
from torchways.rpc import torchways_pb2 as pb


def failure_to_proto(failure: Failure) -> pb.Failure:
    """Returns a failure as a message."""
    return pb.Failure(
        kind=failure.kind,
        message=failure.message,
        function=failure.function,
        source=failure.source,
        traceback=failure.traceback,
        run_id=failure.run_id,
        process=failure.process,
    )


def failure_from_proto(message: pb.Failure) -> Failure:
    """Returns a message as a failure."""
    return Failure(
        kind=message.kind,
        message=message.message,
        function=message.function,
        source=message.source,
        traceback=message.traceback,
        run_id=message.run_id,
        process=message.process,
    )
