"""Failures of this process."""

from __future__ import annotations

import traceback

from torchways.errors import Failure


class Failures:
    """Makes the failures of one executor."""

    def __init__(self, executor_id: str) -> None:
        self._process = f"executor {executor_id}"

    def __call__(
        self,
        kind: str,
        message: str,
        error: BaseException | None = None,
        function: str = "",
        source: str = "",
        run_id: int = 0,
    ) -> Failure:
        """Returns a failure; see `Failure` for what its fields are. `error`: for its traceback."""
        lines = "".join(traceback.format_exception(error)) if error is not None else ""
        return Failure(
            kind=kind,
            message=message,
            function=function,
            source=source,
            traceback=lines,
            run_id=run_id,
            process=self._process,
        )
