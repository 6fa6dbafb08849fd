"""Stages with their times: each is one line on a terminal, and plain lines elsewhere."""
import sys
import time
from contextlib import contextmanager


class Progress:
    """Prints each stage's name and seconds to a stream (standard error by default)."""

    def __init__(self, stream=None, quiet: bool = False):
        self.stream, self.quiet = stream or sys.stderr, quiet

    def say(self, line: str, end: str = "\n") -> None:
        """One line of its own."""
        if not self.quiet:
            print(line, end=end, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str):
        """Time a stage; the yielded dictionary receives `seconds` at its end."""
        result, start, live = {}, time.perf_counter(), self.stream.isatty()
        self.say(f"{name} ...", end="" if live else "\n")
        try:
            yield result
        finally:
            result["seconds"] = time.perf_counter() - start
            if live:
                self.say("\r\x1b[K", end="")
        self.say(f"{name}: {result['seconds']:.1f} s")
