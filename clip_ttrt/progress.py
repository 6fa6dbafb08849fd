"""Stages with their times: one live line on a terminal, plain lines elsewhere."""
import sys
import threading
import time
from contextlib import contextmanager


class Progress:
    """Prints each stage's name and seconds to a stream (standard error by default)."""

    def __init__(self, stream=None, quiet: bool = False):
        self.stream, self.quiet = stream or sys.stderr, quiet

    def say(self, line: str) -> None:
        """One line of its own."""
        if not self.quiet:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str):
        """Time a stage; the yielded dictionary receives `seconds` at its end."""
        result, start, over = {}, time.perf_counter(), threading.Event()
        live = not self.quiet and self.stream.isatty()
        ticker = threading.Thread(target=self._tick, args=(name, start, over), daemon=True)
        if live:
            ticker.start()
        else:
            self.say(f"{name} ...")
        try:
            yield result
        finally:
            result["seconds"] = time.perf_counter() - start
            over.set()
            if live:
                ticker.join()
                self.stream.write("\r\x1b[K")
        self.say(f"{name}: {result['seconds']:.1f} s")

    def _tick(self, name: str, start: float, over: threading.Event) -> None:
        while not over.is_set():
            self.stream.write(f"\r\x1b[K{name} ... {time.perf_counter() - start:.0f} s")
            self.stream.flush()
            over.wait(0.5)
