"""Shards to a cluster: the worker of `drive`, as actors of Ray Data, one for each GPU.

Whole shards are rows of a dataset, and done/ is the checkpoint.  Ray starts a dead actor again
once; where the dataset fails for it, what is not done is planned again, and shards that were
started twice are tried in halves, as `drive` does, by an actor that Ray does not restart.
"""
import json
import logging
import os
import pickle
import warnings
from typing import Callable, Iterator, Optional, Sequence

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.drive import STARTS, Attempts, Task, Tasks, sentence, unfinished

FAILURES = 3  # of datasets one after the other that brought no shard
CORES = 8  # of an actor without a GPU


class Embedder:
    """An actor: a worker, and what that raises as a sentence, since Ray would try again."""

    def __init__(self, make_worker: Callable, device: str, out):
        self.attempts, self.problem = None, None
        try:
            self.attempts = Attempts(make_worker(device), out, lambda counts: None)
        except Exception as problem:
            self.problem = problem

    def __call__(self, batch: dict) -> dict:
        task, rows = Task(int(batch["shard"][0])), pickle.loads(batch["rows"][0])
        return {"answer": [json.dumps(self.perform(task, rows))]}

    def perform(self, task: Task, rows) -> dict:
        try:
            if self.problem:
                raise self.problem
            return self.attempts.embed(task, rows)()
        except Exception as problem:
            if self.attempts:
                self.attempts.withdraw()
            return {"failed": sentence(problem)}


def devices(address: str, device: str, threads: Optional[int]) -> tuple[list[str], int]:
    """Connect to a cluster: a device (cuda or cpu) for each of its actors, and its cores.

    address: auto for that of RAY_ADDRESS or, where there is none, a local one.
    Raises UserError where Ray is not installed, no cluster answers or it has no such device.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise UserError("--ray needs Ray: pip install 'clip_ttrt[ray]'") from problem
    try:
        if not ray.is_initialized():
            ray.init(address=None if address == "auto" else address, log_to_driver=False,
                     logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as problem:
        raise UserError(f"no Ray cluster answers at {address}: {problem}") from problem
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    count = gpus if device == "cuda" else cores // (threads or min(cores, CORES))
    if not count:
        raise UserError(f"the cluster has {cores} cores and {gpus} GPUs, too few for one actor of "
                        f"{device}")
    return [device] * count, cores


def run(shards: Sequence, todo: Sequence[int], make_worker: Callable, devices: Sequence[str],
        out, meter) -> None:
    """Embed the shards `todo` of `shards` on a cluster; arguments and errors as of `drive.run`."""
    import ray

    needs = {"num_gpus": 1} if devices[0] == "cuda" else {
        "num_cpus": int(ray.cluster_resources()["CPU"]) // len(devices)}
    arguments, failures = (make_worker, devices[0], out), 0
    while todo and failures < FAILURES:
        starts = unfinished(out)
        suspects = [number for number in todo if starts[number] >= STARTS]
        search(Tasks(shards, suspects, out), arguments, needs, meter)
        rest = sorted(set(todo) - set(suspects))
        try:
            for result in results(shards, rest, arguments, needs, len(devices)) if rest else ():
                meter.count("ray", result)
        except ray.exceptions.RayError as problem:
            meter.say(f"an actor died twice ({type(problem).__name__}); planning again")
        done = out.done()
        failures = 0 if done & set(todo) else failures + 1
        todo = [number for number in todo if number not in done]
    if todo:
        raise UserError(f"{FAILURES} of Ray's datasets failed, one after the other, without a "
                        "shard done; its logs, in /tmp/ray, say why")


def results(shards: Sequence, todo: Sequence[int], arguments: tuple, needs: dict,
            actors: int) -> Iterator[dict]:
    """Results of shards, as they are done.  RayError where one kills two actors."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a shard may take as long as it needs
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"shard": number, "rows": pickle.dumps(shards[number])} for number in todo]
    pool = ActorPoolStrategy(size=min(actors, len(todo)), max_tasks_in_flight_per_actor=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 has no other way to bound restarts yet
        rows = from_items(items, override_num_blocks=len(items)).map_batches(
            Embedder, fn_constructor_args=arguments, batch_size=1, compute=pool, **needs,
            max_restarts=1, max_task_retries=1)
    for row in rows.iter_rows():
        yield succeeded(json.loads(row["answer"]))


def search(tasks: Tasks, arguments: tuple, needs: dict, meter) -> None:
    """Embed shards that were begun twice, after trials of their rows."""
    import ray

    actor = None
    while tasks.waiting:
        task = tasks.waiting.popleft()
        actor = actor or ray.remote(**needs, max_restarts=0)(Embedder).remote(*arguments)
        try:
            result = succeeded(ray.get(actor.perform.remote(task, tasks.shards[task.number])))
        except ray.exceptions.RayActorError:
            actor = None
        tasks.settle(task, survived=actor is not None)
        if actor and task.only is None:
            meter.count("ray", result)


def succeeded(answer: dict) -> dict:
    if "failed" in answer:
        raise UserError(f"an actor failed: {answer['failed']}")
    return answer
