"""Stages with their times: one live line on a terminal, plain lines elsewhere."""
import sys
import threading
import time
from contextlib import contextmanager


class Progress:
    """Prints each stage's name and seconds to a stream (standard error by default)."""

    def __init__(self, stream=None, quiet: bool = False):
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty()

    def say(self, line: str) -> None:
        """One line of its own."""
        if not self.quiet:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str):
        """Time a stage; the yielded dictionary receives `seconds` at its end."""
        result, start, over = {}, time.perf_counter(), threading.Event()
        ticker = threading.Thread(target=self._tick, args=(name, start, over), daemon=True)
        if self.live:
            ticker.start()
        elif not self.quiet:
            print(f"{name} ...", file=self.stream, flush=True)
        try:
            yield result
        finally:
            result["seconds"] = time.perf_counter() - start
            over.set()
            if self.live:
                ticker.join()
                self.stream.write("\r\x1b[K")
        self.say(f"{name}: {result['seconds']:.1f} s")

    def _tick(self, name: str, start: float, over: threading.Event) -> None:
        while not over.is_set():
            self.stream.write(f"\r\x1b[K{name} ... {time.perf_counter() - start:.0f} s")
            self.stream.flush()
            over.wait(0.5)
