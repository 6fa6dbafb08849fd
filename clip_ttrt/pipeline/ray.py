"""Shards to a cluster: the worker of `drive`, as actors of Ray Data, one for each GPU.

Whole shards are rows of a dataset, and done/ is the checkpoint.  Ray starts a dead actor again
once; where it dies again the dataset fails, and what is not done is for the next round."""
import logging
import os
import pickle
import warnings
from functools import cache, partial
from typing import Callable, Optional, Sequence

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.drive import Results, Task, failure

CORES = 8  # of an actor without a GPU


class Embedder:
    """An actor: a worker, and what that raises as a sentence, since Ray would try again."""

    def __init__(self, make_worker: Callable, device: str):
        self.worker = cache(partial(make_worker, device))

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            result = self.worker().embed(*pickle.loads(row["task"]))()
        except Exception as problem:
            result = failure("an actor", problem)
        return {"result": pickle.dumps(result)}


def devices(address: str, device: str, threads: Optional[int]) -> tuple[list[str], int]:
    """Connect to a cluster (auto: RAY_ADDRESS's or a local one): a device for each of its actors,
    and its cores.  Raises UserError where there is no Ray, no cluster or no such device."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray

        ray.init(None if address == "auto" else address, ignore_reinit_error=True,
                 log_to_driver=False, logging_level="ERROR")
    except ImportError as problem:
        raise UserError("--ray needs Ray: pip install 'clip_ttrt[ray]'") from problem
    except (ConnectionError, ValueError, RuntimeError) as problem:
        raise UserError(f"no Ray cluster answers at {address}: {problem}") from problem
    cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    count = gpus if device == "cuda" else cores // (threads or min(cores, CORES))
    if not count:
        raise UserError(f"the cluster has {cores} cores and {gpus} GPUs, too few for {device}")
    return [device] * count, cores


def execute(tasks: list[Task], make_worker: Callable, devices: Sequence[str], progress) -> Results:
    """As `drive.execute`, on the cluster; it ends where a task kills two actors."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a shard may take as long as it needs
    cores = int(ray.cluster_resources()["CPU"]) // len(devices)
    needs = {"num_gpus": 1} if devices[0] == "cuda" else {"num_cpus": cores}
    pool = ray.data.ActorPoolStrategy(size=min(len(devices), len(tasks)),
                                      max_tasks_in_flight_per_actor=2)
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    rows = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray has no other way to bound restarts yet
        rows = rows.map(Embedder, fn_constructor_args=(make_worker, devices[0]), compute=pool,
                        max_restarts=1, max_task_retries=1, **needs)
    try:
        for row in rows.iter_rows():
            progress.ready()
            yield pickle.loads(row["result"])
    except ray.exceptions.RayError as problem:
        why = str(problem).strip().splitlines()[-1]
        progress.say(f"an actor died twice ({why}); what is not done is tried again")
