"""Shards to processes, of which any may die: what that leaves undone is tried again, in rounds.

How often a shard was begun is noted in OUT.  Where that was twice and it is not written, its rows
are tried in halves: those that kill become rows of bad/, and it is embedded without them."""
import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any, Callable, Iterator, Optional, Sequence

from clip_ttrt.errors import UserError

PROCESSES = multiprocessing.get_context("spawn")  # a forked one could not use CUDA
STARTS = 2  # of a shard that is not written, from which on rows that kill are looked for
ROUNDS = 3  # one after the other in which no shard is done, and the run ends
Task = tuple[int, Sequence, Optional[range]]  # what `Worker.embed` is called with
Results = Iterator[dict[str, Any]]


def run(shards: Sequence, todo: Sequence[int], execute: Callable, out, progress) -> None:
    """Embed the shards `todo` of `shards` (`Rows`) into `out`, an `Output`, by `execute`: tasks ->
    their results, none of one whose process died.  Raises UserError for what a worker raises, and
    where a shard ends its process and no row of it does alone."""
    failures = 0
    while todo:
        starts = Counter(name.split(".")[0] for name in out.listed("started"))
        for number in todo:
            if (count := starts[out.number(number)]) >= STARTS:
                progress.say(f"shard {number} was begun {count} times: looking for rows that kill")
                for row in killers(number, shards[number], range(len(shards[number])), execute):
                    out.mark_crashed(number, row)
        for result in execute([(number, shards[number], None) for number in todo]):
            if "failed" in result:
                raise UserError(result["failed"])
            progress.count(result)
        done = out.done()
        failures = 0 if set(todo).intersection(done) else failures + 1
        todo = [number for number in todo if number not in done]
        if failures == ROUNDS:
            raise UserError(f"shard {todo[0]} ended its process in {ROUNDS} rounds, and none of "
                            "its rows does alone; is there too little memory?")


def killers(number: int, rows: Sequence, span: range, execute: Callable) -> Iterator[int]:
    """Those of some rows of a shard that end a process alone."""
    middle = (len(span) + 1) // 2
    for half in filter(None, (span[:middle], span[middle:])):
        if not list(execute([(number, rows, half)])):
            yield from half if len(half) == 1 else killers(number, rows, half, execute)


def execute(tasks: list[Task], make_worker: Callable, devices: Sequence[str], progress) -> Results:
    """Embed in a process for each device, which takes one task after the other; whole shards of a
    single CPU in this one.  Raises UserError where a process dies before it is ready."""
    if devices == ["cpu"] and tasks[0][2] is None:
        worker = make_worker("cpu")
        worker.progress = progress.bar.update
        progress.ready()
        for task in tasks:
            yield worker.embed(*task)()
        return
    idle, waiting, children, ready = list(devices[:len(tasks)]), deque(tasks), {}, set()
    try:
        while children or idle and waiting:
            while idle and waiting:
                device, (pipe, theirs) = idle.pop(0), PROCESSES.Pipe()
                children[pipe] = PROCESSES.Process(name=device, daemon=True, target=serve,
                                                   args=(theirs, make_worker, device))
                children[pipe].start()
                theirs.close()
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
                        idle.append(process.name)
                    continue
                with contextlib.suppress(ConnectionError):
                    pipe.send(waiting.popleft() if waiting else None)
                ready.add(pipe)
                progress.ready(children[pipe].name)
                if result:
                    yield result
    finally:
        for process in children.values():
            process.kill()
            process.join()


def serve(pipe, make_worker: Callable, device: str) -> None:
    """What a process does: it embeds a shard while the last one is being written, and sends a
    result, the first time {}, before it is sent a task."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    try:
        worker = make_worker(device)
        gc.freeze()  # collections, which stop all threads, then leave out what was imported
        with ThreadPoolExecutor(1) as writer:
            written = writer.submit(dict)
            pipe.send({})
            while task := pipe.recv():
                write = worker.embed(*task)
                pipe.send(written.result())
                written = writer.submit(write)
            pipe.send(written.result())
    except Exception as problem:
        pipe.send(failure(f"the process of {device}", problem))
    os._exit(0)  # CUDA's teardown would take a second


def failure(who: str, problem: Exception) -> dict[str, str]:
    """In place of a result; the traceback of a defect goes to standard error."""
    if not isinstance(problem, UserError):
        traceback.print_exception(problem)
        problem = f"{type(problem).__name__}: {problem}"
    return {"failed": f"{who} failed: {problem}"}
