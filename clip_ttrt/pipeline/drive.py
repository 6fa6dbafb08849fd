"""Shards to devices: in this process for one CPU, else one spawned process for each device.

A process that dies (an exception is no death) loses nothing: its shards go to another, and a new
process takes its place.  How often a shard was begun is noted in OUT, so that it holds over runs
and machines; where it was begun twice and not written, its rows are tried in halves until those
that kill are found.  They become rows of bad/, and the shard is embedded without them.
"""
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from typing import Callable, Generator, NamedTuple, Optional, Sequence

from clip_ttrt.errors import UserError

PROCESSES = multiprocessing.get_context("spawn")  # a forked one could not use CUDA
STARTS = 2  # of a shard that is not written, from which on rows that kill are looked for
DEATHS = 4  # of processes in a shard of which no row kills, and the run ends
FAILED_STARTS = 3  # of a device's processes, one after the other, before they began a shard


class Task(NamedTuple):
    """A shard to embed or, with `only`, rows of it to try without writing anything."""

    number: int
    only: Optional[range] = None


def rows_that_kill(rows: range) -> Generator[range, bool, list[int]]:
    """Yield halves to try, be sent whether the process survived; return rows that kill alone."""
    middle, killers = (len(rows) + 1) // 2, []
    for half in (rows[:middle], rows[middle:]):
        if half and not (yield half):
            killers += half if len(half) == 1 else (yield from rows_that_kill(half))
    return killers


def unfinished(out) -> Counter:
    """How often each shard was begun and not written."""
    return Counter(int(name.split(".")[0]) for name in out.listed("started") if name[0].isdigit())


class Tasks:
    """What is to be done next: shards, in order, and trials of those that killed."""

    def __init__(self, shards: Sequence, todo: Sequence[int], out):
        self.shards, self.out, self.deaths, self.blameless = shards, out, Counter(), set()
        self.trials: dict[int, Generator[range, bool, list[int]]] = {}
        self.waiting: deque[Task] = deque()
        starts = unfinished(out)
        for number in reversed(todo):
            self.add(number, starts[number])

    def add(self, number: int, starts: int) -> None:
        only = None
        if starts >= STARTS and number not in self.blameless:
            self.trials[number] = rows_that_kill(range(len(self.shards[number])))
            only = next(self.trials[number])
        self.waiting.appendleft(Task(number, only))

    def settle(self, task: Task, survived: bool) -> None:
        """A task has ended.  Raises UserError where a shard kills and no row of it does."""
        number, only = task
        if only is not None:
            if not survived and len(only) == 1:
                self.out.mark_crashed(number, only[0])
            try:
                only = self.trials[number].send(survived)
            except StopIteration as search:
                only = None
                if not search.value:
                    self.blameless.add(number)
            self.waiting.appendleft(Task(number, only))
        elif not survived and number not in self.out.done():
            self.deaths[number] += 1
            if self.deaths[number] == DEATHS:
                raise UserError(f"shard {number} killed its process {DEATHS} times, and none of "
                                "its rows does alone; is there too little memory?")
            self.add(number, self.out.starts(number))


class Attempts:
    """A worker, and notes of what it has begun, which are withdrawn where it is only stopped."""

    def __init__(self, worker, out, progress: Callable[[dict], None]):
        self.worker, self.out, worker.progress = worker, out, progress
        self.notes = deque(maxlen=2)  # one shard may be embedded while the last is being written

    def embed(self, task: Task, rows) -> Callable[[], dict]:
        """As `Worker.embed`: returns what writes the shard and gives the result."""
        if task.only is None:
            self.notes.append(self.out.start(task.number))
        return self.worker.embed(task.number, rows, task.only)

    def withdraw(self) -> None:
        for note in self.notes:
            self.out.remove(f"started/{note}")


def run(shards: Sequence, todo: Sequence[int], make_worker: Callable, devices: Sequence[str],
        out, meter) -> None:
    """Embed the shards `todo` of `shards` (`Rows`, of `sources.plan`) on the devices.

    make_worker: a device -> `Worker`, picklable.  out: `Output`.  meter: told what is done.
    Raises UserError for an exception in a process, and where processes die without progress.
    """
    starts = unfinished(out)  # one more is allowed here, where nobody sees what ends a process
    if list(devices) != ["cpu"] or any(starts[number] > STARTS for number in todo):
        run_processes(Tasks(shards, todo, out), make_worker, devices[:len(todo)], meter)
    elif todo:
        attempts = Attempts(make_worker("cpu"), out, partial(meter.running, "cpu"))
        meter.ready()
        try:
            for number in todo:
                meter.count("cpu", attempts.embed(Task(number), shards[number])())
        except BaseException:
            attempts.withdraw()
            raise


def run_processes(tasks: Tasks, make_worker: Callable, devices: Sequence[str], meter) -> None:
    children, failed_starts = [], Counter()
    try:
        children += (Child(make_worker, device, tasks.out) for device in devices)
        while tasks.waiting or any(child.sent for child in children):
            for ahead in (0, 1):  # a second task to go on with, while there are enough for all
                for child in children:
                    if len(tasks.waiting) >= (len(children) if ahead else 1):
                        child.feed(tasks, ahead)
            wait([each for child in children for each in (child.pipe, child.process.sentinel)], 1)
            for slot, child in enumerate(children):
                died = not child.process.is_alive()  # asked before its last messages are read
                child.listen(tasks, meter)
                failed_starts[slot] *= not child.begun
                if died:
                    code, task = child.process.exitcode, child.at_work()
                    failed_starts[slot] += task is None
                    if failed_starts[slot] == FAILED_STARTS:
                        raise UserError(f"processes of {child.device} ended with exit code {code} "
                                        "before they began a shard")
                    meter.lost(child.device, code, task)
                    tasks.waiting.extendleft(each for each in reversed(child.sent)
                                             if each is not task)
                    if task:
                        tasks.settle(task, survived=False)
                    child.stop()
                    children[slot] = Child(make_worker, child.device, tasks.out)
            meter.show()
    finally:
        for child in children:
            child.pipe.close()
        for child in children:
            child.stop()


class Child:
    """A process of one device, and the tasks that it was sent and has not answered."""

    def __init__(self, make_worker: Callable, device: str, out):
        self.device, self.ready, self.sent, self.begun = device, False, deque(), 0
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=serve, args=(theirs, make_worker, device, out),
                                         daemon=True)
        # Ctrl-C reaches every process of a terminal, and is for the parent to answer.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    def feed(self, tasks: Tasks, ahead: int) -> None:
        """Send it a task where it has `ahead` others."""
        if self.ready and len(self.sent) == ahead:
            task = tasks.waiting[0]
            with contextlib.suppress(OSError):  # it has just died
                self.pipe.send((task, tasks.shards[task.number]))
                self.sent.append(tasks.waiting.popleft())

    def listen(self, tasks: Tasks, meter) -> None:
        """Read what it has sent.  Raises UserError for what a worker raised."""
        with contextlib.suppress(EOFError, ConnectionError):
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "failed":
                    raise UserError(f"the process of {self.device} failed: {value}")
                if kind == "ready":
                    self.ready = True
                    meter.ready()
                elif kind == "begun":
                    self.begun += 1
                elif kind == "running":
                    meter.running(self.device, value)
                else:
                    task = self.sent.popleft()
                    self.begun -= 1
                    tasks.settle(task, survived=True)
                    if task.only is None:
                        meter.count(self.device, value)

    def at_work(self) -> Optional[Task]:
        """The task that it began last; one before that is only being written."""
        return self.sent[self.begun - 1] if self.begun else None

    def stop(self) -> None:
        """Its pipe, closed, ends it; what does not end in time is killed."""
        self.pipe.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()


def serve(pipe, make_worker: Callable, device: str, out) -> None:
    """What a process of a device does: tasks, one being written while the next is embedded.  It
    ends when its parent does, which closes the pipe."""
    tasks, lock, attempts = queue.SimpleQueue(), threading.Lock(), None

    def receive():
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(pipe.recv())
        if attempts:
            attempts.withdraw()
        os._exit(0)

    def send(kind, value=None):
        with lock, contextlib.suppress(OSError):
            pipe.send((kind, value))

    def failed(problem):
        if not isinstance(problem, UserError):
            traceback.print_exception(type(problem), problem, problem.__traceback__)
        send("failed", sentence(problem))

    def finish(function):
        try:
            send("done", function())
        except Exception as problem:
            failed(problem)

    threading.Thread(target=receive, daemon=True).start()
    try:
        attempts = Attempts(make_worker(device), out, partial(send, "running"))
        send("ready")
        with ThreadPoolExecutor(1) as writer:
            written = None
            while True:
                task, rows = tasks.get()
                send("begun")
                function = attempts.embed(task, rows)
                if written:
                    written.result()
                written = writer.submit(finish, function)
    except Exception as problem:
        failed(problem)
    threading.Event().wait()  # for the parent to close the pipe


def sentence(problem: Exception) -> str:
    kind = "" if isinstance(problem, UserError) else f"{type(problem).__name__}: "
    return f"{kind}{problem}"
