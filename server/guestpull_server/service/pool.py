"""The threads that answer RPCs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor


class AnsweringThreads(ThreadPoolExecutor):
    """A thread pool for gRPC that goes on with the threads that it has where no other can be had.

    gRPC's server ends its loop, for ever and without a word, when its pool raises. What it hands over is queued by
    then, and a thread that is there takes it in its turn.

    Args:
        most: how many threads there may be; the first is started at once.
    """

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, thread_name_prefix=name)
        self.submit(int).result()

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except (RuntimeError, MemoryError):
            if not self._threads:
                raise
