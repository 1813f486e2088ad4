"""Thread pools that answer RPCs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor


class AnsweringThreads(ThreadPoolExecutor):
    """A thread pool that goes on with the threads that it has when no other can be started.

    A plain ThreadPoolExecutor queues the work and then raises: the caller would be told of a failure, and the work
    would be done nevertheless.

    Args:
        most: how many threads there may be; the first is started at once.
        name: what their names begin with.
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
