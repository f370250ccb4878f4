"""The thread that waits at an inbox, as an executor's engine does."""

import threading


def serve(inbox, flush):
    """Calls what is put into an inbox, and `flush` behind it, on a thread of its own."""

    def run():
        while True:
            inbox.wait(None)
            while (work := inbox.take()) is not None:
                work()
            flush()

    threading.Thread(target=run, daemon=True).start()
