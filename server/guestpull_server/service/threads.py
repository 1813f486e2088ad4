"""Thread pools that run RPCs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor


class AnsweringThreads(ThreadPoolExecutor):
    """A thread pool that continues with its existing threads when it cannot start another.

    A plain ThreadPoolExecutor queues the work and then raises: the caller would see a failure, and a thread
    would do the work nevertheless.

    Args:
        max_threads: the size of the pool. The first thread is started at once.
        name: the prefix of the threads' names.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        super().__init__(max_threads, thread_name_prefix=name)
        self.submit(int).result()

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except (RuntimeError, MemoryError):
            if not self._threads:
                raise
