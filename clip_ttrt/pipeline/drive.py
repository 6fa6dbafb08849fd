"""Shards to processes, of which any may die: what that leaves undone is tried again, in rounds.

How often a shard was begun is noted in OUT, so that it holds over runs and machines.  Where that
was twice and it is not written, its rows are tried in halves until those that kill are found:
they become rows of bad/, and the shard is embedded without them.
"""
import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

from clip_ttrt.errors import UserError

PROCESSES = multiprocessing.get_context("spawn")  # a forked one could not use CUDA
STARTS = 2  # of a shard that is not written, from which on rows that kill are looked for
ROUNDS = 3  # one after the other in which no shard is done, and the run ends
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>: a signal for where the parent ends
Results = Iterator[dict[str, Any]]


class Task(NamedTuple):
    """A shard to embed and write or, with `only`, rows of it to try."""

    number: int
    rows: Sequence  # `sources.Rows`
    only: Optional[range] = None

    def begin(self, worker) -> Callable[[], dict]:
        """As `Worker.embed`: returns what writes the shard and gives the result."""
        if self.only is None:
            worker.out.start(self.number)
        return worker.embed(*self)


def run(shards: Sequence, todo: Sequence[int], execute: Callable[[list[Task]], Results], out,
        progress) -> None:
    """Embed the shards `todo` of `shards` (`Rows`, of `sources.plan`) into `out`, an `Output`.

    execute: yields the results of tasks, and nothing for one whose process died.
    progress: `embed.Progress`.  Raises UserError for what a worker raises, and where shards kill
    and no row of them alone.
    """
    failures = 0
    while todo:
        starts = Counter(name.split(".")[0] for name in out.listed("started"))
        for number in todo:
            if (count := starts[out.number(number)]) >= STARTS:
                progress.say(f"shard {number} was begun {count} times and is not done: "
                             "looking for rows that end the process")
                for row in killers(Task(number, shards[number]), execute):
                    out.mark_crashed(number, row)
        for result in execute([Task(number, shards[number]) for number in todo]):
            if "failed" in result:
                raise UserError(result["failed"])
            progress.count(result)
        done = out.done()
        failures = 0 if set(todo).intersection(done) else failures + 1
        todo = [number for number in todo if number not in done]
        if failures == ROUNDS:
            raise UserError(f"shard {todo[0]} ended its process in {ROUNDS} rounds, and none of "
                            "its rows does alone; is there too little memory?")


def killers(task: Task, execute: Callable[[list[Task]], Results]) -> Iterator[int]:
    """The rows that end a process alone."""
    rows = task.only or range(len(task.rows))
    middle = (len(rows) + 1) // 2
    for half in filter(None, (rows[:middle], rows[middle:])):
        part = task._replace(only=half)
        if not list(execute([part])):
            yield from half if len(half) == 1 else killers(part, execute)


def here(tasks: list[Task], make_worker: Callable, devices: Sequence[str], progress) -> Results:
    """As `processes`, in this one; rows that may kill are tried in another."""
    if tasks[0].only:
        yield from processes(tasks, make_worker, devices, progress)
        return
    worker = make_worker(*devices)
    worker.progress = progress.running
    progress.ready()
    for task in tasks:
        yield task.begin(worker)()


def processes(tasks: list[Task], make_worker: Callable, devices: Sequence[str], progress
              ) -> Results:
    """Execute in a process for each device, which takes one task after the other.

    make_worker: picklable.  Raises UserError where a process dies before it is ready.
    """
    waiting, children, ready = deque(tasks), {}, set()

    def start(device):
        pipe, theirs = PROCESSES.Pipe()
        children[pipe] = PROCESSES.Process(target=serve, args=(theirs, make_worker, device),
                                           name=device, daemon=True)
        children[pipe].start()
        theirs.close()

    try:
        for device in devices[:len(tasks)]:
            start(device)
        while children:
            for pipe in wait(list(children)):
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionError):
                    process = children.pop(pipe)
                    process.join()
                    about = f"the process of {process.name} ended with exit code {process.exitcode}"
                    if pipe not in ready:
                        raise UserError(f"{about} before it was ready") from None
                    if process.exitcode:
                        progress.say(f"{about}; what it had not written is tried again")
                        if waiting:
                            start(process.name)
                    continue
                with contextlib.suppress(ConnectionError):
                    pipe.send(waiting.popleft() if waiting else None)
                ready.add(pipe)
                progress.ready()
                if result:
                    yield result
    finally:
        for process in children.values():
            process.kill()
            process.join()


def serve(pipe, make_worker: Callable, device: str) -> None:
    """What a process does: it embeds a shard while the last one is being written, and sends a
    result, the first time {}, before each task that it is sent.  It ends with its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    try:
        worker = make_worker(device)
        with ThreadPoolExecutor(1) as writer:
            written = writer.submit(dict)
            pipe.send({})
            while task := pipe.recv():
                write = task.begin(worker)
                pipe.send(written.result())
                written = writer.submit(write)
            pipe.send(written.result())
    except Exception as problem:
        pipe.send(failure(f"the process of {device}", problem))
    os._exit(0)  # CUDA's teardown would take a second


def failure(who: str, problem: Exception) -> dict[str, str]:
    """In place of a result; the traceback of a defect goes to standard error."""
    if not isinstance(problem, UserError):
        traceback.print_exception(type(problem), problem, problem.__traceback__)
        problem = f"{type(problem).__name__}: {problem}"
    return {"failed": f"{who} failed: {problem}"}
