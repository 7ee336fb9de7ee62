"""The peak of a process's own memory while something runs."""

import threading

import psutil


class PeakMemory(threading.Thread):
    """Watches this process's private memory: pages of mapped files belong to the host's cache.

    Args:
        before: Bytes above which the peak is given; None: what there is now.
    """

    def __init__(self, before=None):
        super().__init__(daemon=True)
        self.peak = self.now()
        self.before = self.peak if before is None else before
        self.ended = threading.Event()

    @staticmethod
    def now():
        """Bytes of anonymous memory."""
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    def end(self):
        """Ends the watch; the peak, in bytes, above what there was before."""
        self.ended.set()
        self.join()
        return self.peak - self.before

    def run(self):
        """Looks every few milliseconds."""
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, self.now())
