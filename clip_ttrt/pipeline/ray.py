"""Shards to a cluster: the worker of `drive`, as actors of Ray Data, one for each GPU.

Whole shards are rows of a dataset, and done/ is the checkpoint.  Ray starts a dead actor again
once; where the dataset fails for it, what is not done is planned again, and shards that were
started twice are tried in halves, as `drive` does, by an actor that Ray does not restart.
"""
import json
import os
import pickle
import warnings
from typing import Callable, Iterator, Sequence

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.drive import STARTS, Task, Tasks, begun, perform

FAILURES = 3  # of datasets one after the other that brought no shard


class Embedder:
    """An actor: a worker, and what that raises as a sentence, since Ray would try again."""

    def __init__(self, make_worker: Callable, device: str, out):
        self.out, self.worker, self.problem = out, None, None
        try:
            self.worker = make_worker(device)
            self.worker.progress = lambda counts: None
        except Exception as problem:
            self.problem = problem

    def __call__(self, batch: dict) -> dict:
        task, rows = Task(int(batch["shard"][0])), pickle.loads(batch["rows"][0])
        return {"answer": [json.dumps(self.perform(task, rows))]}

    def perform(self, task: Task, rows) -> dict:
        try:
            if self.problem:
                raise self.problem
            return perform(self.worker, task, rows, self.out)
        except Exception as problem:
            kind = "" if isinstance(problem, UserError) else f"{type(problem).__name__}: "
            return {"failed": f"{kind}{problem}"}


def run(shards: Sequence, todo: Sequence[int], make_worker: Callable, device: str, threads: int,
        address: str, out, meter) -> None:
    """Embed the shards `todo` of `shards` on a cluster; arguments as of `drive.run`.

    device: cuda or cpu.  threads: cores that each actor reserves.  address: of the cluster; auto
    for that of RAY_ADDRESS or, where there is none, a local one.
    """
    ray = connect(address)
    arguments, failures = (make_worker, device, out), 0
    needs = {"num_cpus": threads, "num_gpus": int(device == "cuda")}
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    size = min(cores // threads, gpus if device == "cuda" else cores)
    if size < 1:
        raise UserError(f"the cluster has {cores} cores and {gpus} GPUs, and an actor needs "
                        f"{threads} (--threads) and {needs['num_gpus']}")
    meter.summary.devices = [f"ray {device}"] * size
    while todo and failures < FAILURES:
        starts = begun(out)
        suspects = [number for number in todo if starts[number] >= STARTS]
        search(ray, Tasks(shards, suspects, out), arguments, needs, meter)
        rest = [{"shard": number, "rows": pickle.dumps(shards[number])}
                for number in todo if number not in suspects]
        try:
            for result in dataset(ray, rest, arguments, needs, size) if rest else ():
                meter.count("ray", result)
        except ray.exceptions.RayError as problem:
            meter.say(f"an actor died twice ({type(problem).__name__}); planning again")
        done = out.done()
        failures = 0 if done & set(todo) else failures + 1
        todo = [number for number in todo if number not in done]
    if todo:
        raise UserError(f"{FAILURES} datasets of Ray's failed without a shard done; its logs in "
                        "/tmp/ray say why")


def dataset(ray, items: list[dict], arguments: tuple, needs: dict, size: int) -> Iterator[dict]:
    """Results of shards, as they are done.  RayError where an actor dies twice."""
    pool = ray.data.ActorPoolStrategy(size=min(size, len(items)), max_tasks_in_flight_per_actor=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray 2.60: it has no other way to bound restarts yet
        rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Embedder, fn_constructor_args=arguments, batch_size=1, compute=pool, **needs,
            max_restarts=1, max_task_retries=1)
    for row in rows.iter_rows():
        yield succeeded(json.loads(row["answer"]))


def search(ray, tasks: Tasks, arguments: tuple, needs: dict, meter) -> None:
    """Embed shards that were started twice, after their rows were tried."""
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


def connect(address: str):
    """The module `ray`, connected; UserError where it is not installed or nothing answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise UserError("--ray needs Ray: pip install 'clip_ttrt[ray]'") from problem
    if not ray.is_initialized():
        try:
            ray.init(address=None if address == "auto" else address,
                     include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as problem:
            raise UserError(f"no Ray cluster answers at {address}: {problem}") from problem
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1  # a shard may take as long as it needs
    return ray
