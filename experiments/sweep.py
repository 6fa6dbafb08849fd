"""Latency of every backend over models, encoders, precisions, batches and text lengths: OUT/sweep.csv.

    python -m experiments.sweep --grid quick            the embedded model on two CPU cores, within five minutes
    python -m experiments.sweep --grid h200             the full grid; stops and resumes where it was
    python -m experiments.sweep --grid h200 --models ViT-B/32 --backends clip_ttrt_plugin_range clip_eager --batches 1 32 --precisions fp16
    python -m experiments.sweep --grid hackathon        the batches of a 2022 hackathon entry
    python -m experiments.sweep --grid h200 --hold      prepare everything first, then measure as often as standard input says

What is measured of a backend on one model, encoder, precision, batch and length runs in a fresh process, with and without a CUDA
graph: a crash, a timeout or an exhausted GPU is a row with its `error`, and a missing backend is a row that says why.  With
--together one process serves all batches and lengths, which saves starts; after a crash the rest goes on in another one.  Rows
that are in the file already are skipped.  `--python NAME=PATH` runs one backend, or `floor`, with
another interpreter, such as a newer PyTorch's; PYTHONHOME, PYTHONPATH, LD_LIBRARY_PATH and the like are kept from it (a script
that sets its own can stand for it).  The library floor of the same work is measured before a group's rows and
kept in OUT/floor.csv.  `error` that starts with "wrong:" stands beside times of features that are wrong.

With --hold the processes start all at once, as with --together, and each loads, compiles and captures what its rows need and waits.  Where
all have, or --seconds are over, OUT/ready appears.  From then on each line of standard input, a folder and a number of seconds,
measures the rows one after the other into FOLDER/sweep.csv until these seconds are over, and then FOLDER/done appears.  So
what measures finds the processor's cores idle, and several rounds cost one start.  No floor is measured then, and
`gpu_memory_mib`, which is the whole GPU's otherwise, is what the driver says of the row's process (see `prepared`).
"""
import argparse
import contextlib
import gc
import itertools
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch

from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BatchRange
from clip_ttrt.progress import Progress
from experiments import floor
from experiments.baselines import BACKENDS, Missing, Request, Subject, is_built
from experiments.record import append_row, in_a_line, provenance, read_rows
from experiments.timing import graphed, times_ms

COLUMNS = ("model", "encoder", "backend", "attention", "precision", "batch", "tokens", "resolution", "cuda_graph", "median_ms", "p90_ms", "p99_ms",
           "per_second", "tflops", "floor_ms", "engine_mib", "gpu_memory_mib", "build_s", "torch", "tensorrt", "gpu", "commit", "error")
KEY = ("model", "encoder", "backend", "precision", "batch", "tokens", "cuda_graph")
ROW_SECONDS = 900
RESULT = "sweep-row "  # marks the lines of a child's output that hold its rows
READY = "sweep-ready"  # is the line by which a child says that it waits
ROOT = Path(__file__).resolve().parent.parent
# Where one interpreter has its parts: another one cannot start with them, or takes wrong packages; with PYTHONSAFEPATH it would not look into ROOT.
INTERPRETERS_OWN = ("PYTHONHOME", "PYTHONPATH", "PYTHONPLATLIBDIR", "PYTHONEXECUTABLE", "PYTHONSAFEPATH", "LD_LIBRARY_PATH")
HELD_ROW_SECONDS = 60  # of one row for which everything is prepared
MEASURING_MS = 1500  # of one row on a GPU, where its calls take so long that fewer than REPEATS must do
REPEATS, FEWEST = 200, 20
BUSY = frozenset(name for name in BACKENDS if name.startswith(("clip_ttrt", "tensorrt")) or name.endswith("max_autotune"))  # builds time kernels on the GPU


@dataclass(frozen=True)
class Block:
    """Rows of a grid: the product of its parts.  `batches_range` is what the backends that end in _range compile for."""

    models: Sequence[str]
    backends: Sequence[str]
    precisions: Sequence[str]
    batches: Sequence[int]
    encoders: Sequence[str] = ("image", "text")
    lengths: Sequence[Optional[int]] = (None,)  # of texts; None: the model's
    graphs: Sequence[bool] = (True, False)
    batches_range: str = "1:32:512"


MODELS = ("ViT-B/32", "ViT-L/14", "ViT-B/16", "ViT-L/14@336px", "demo")
PRECISIONS = ("fp16", "fp32")
GRIDS: dict[str, tuple[Block, ...]] = {
    "quick": (Block(("demo",), ("clip_eager", "eager_sdpa", "onnxruntime", "clip_ttrt_native"), ("fp32",), (1, 8), graphs=(False,)),),
    # Our artifacts take the full text length alone, to which `model.encode_text` pads: experiments.text_length has ours for each.
    "h200": (Block(MODELS, tuple(BACKENDS), PRECISIONS, (32, 1, 8, 128, 512)),
             Block(MODELS, tuple(name for name in BACKENDS if not name.startswith("clip_ttrt")), PRECISIONS, (32, 1, 8, 128, 512), encoders=("text",),
                   lengths=(16, 32, 48))),
    "hackathon": (Block(("ViT-B/32",), tuple(BACKENDS), ("fp16",), (1024, 64, 768), encoders=("image",), batches_range="64:1024:1024"),
                  Block(("ViT-B/32",), tuple(BACKENDS), ("fp32",), (1024,), encoders=("image",), batches_range="64:1024:1024")),
}


@dataclass(frozen=True)
class Row:
    """One row to measure."""

    backend: str
    request: Request
    graph: bool

    @property
    def key(self) -> tuple[str, ...]:
        """As the CSV's columns `KEY`."""
        request = self.request
        return request.model, request.encoder, self.backend, request.precision, str(request.batch), str(request.tokens), str(self.graph)

    @property
    def group(self) -> tuple[str, ...]:
        """What one process can measure, and shares a floor's run."""
        return self.backend, self.request.model, self.request.encoder, self.request.precision, self.request.batches

    def describe(self) -> str:
        request = self.request
        return (f"{request.model} {request.encoder} {self.backend} {request.precision} batch {request.batch}, {request.tokens} tokens"
                f"{', CUDA graph' if self.graph else ''}")


def rows_of(grid: str, device: str, **fixed: Any) -> Iterator[Row]:
    """The rows of a grid; those of one group stand together, in the order of the grid's batches.  fixed: other fields of every request."""
    for block in GRIDS[grid]:
        fields = {"batches": block.batches_range, **fixed}
        for model, precision, encoder, backend in itertools.product(block.models, block.precisions, block.encoders, block.backends):
            dims = dimensions_of(model)
            for length, batch, graph in itertools.product(block.lengths, block.batches, block.graphs if device == "cuda" else (False,)):
                tokens = dims.image_tokens if encoder == "image" else length or dims.context_length
                yield Row(backend, Request(model, "demo" if model == "demo" else "random", encoder, precision, batch, tokens, device, **fields), graph)


def blank(row: Row) -> dict[str, Any]:
    """A CSV row with what is known before measuring."""
    dims = dimensions_of(row.request.model)
    return {**dict.fromkeys(COLUMNS, ""), **dict(zip(KEY, row.key)), **provenance(),
            "resolution": str(dims.image_resolution) if row.request.encoder == "image" else ""}


def latencies(call: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of single calls after warm-up: between CUDA events, or by the clock on the CPU."""
    if device == "cuda":
        about = statistics.median(times_ms(call, repeats=5, warm_up=5))
        repeats = int(min(REPEATS, max(FEWEST, MEASURING_MS / about)))
        return times_ms(call, repeats, warm_up=repeats // 5)
    times = []
    for _ in range(23):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[3:]


def used_mib() -> float:
    """The GPU's memory in use, in MiB."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def own_mib(device: str) -> Optional[int]:
    """The GPU memory of this process alone, its CUDA context included, in MiB; None on the CPU and where nvidia-smi does not tell."""
    if device != "cuda":
        return None
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        mine = [int(mib) for pid, mib in (line.split(",") for line in said.splitlines()) if int(pid) == os.getpid()]
    except (OSError, ValueError, subprocess.SubprocessError):  # missing, failing, or without a figure
        return None
    return sum(mine) if mine else None


def call_of(row: Row, subject: Subject) -> Callable[[], object]:
    """What the row's times are of.  Raises Missing where the subject cannot run so."""
    if row.graph and not subject.brings_graphs and subject.uncapturable:
        raise Missing(f"no CUDA graph: {subject.uncapturable}")
    if subject.brings_graphs and not row.graph:
        raise Missing("it always replays CUDA graphs of its own")
    return graphed(subject.call) if row.graph and not subject.brings_graphs else subject.call


def measure(row: Row, subject: Subject, call: Callable[[], object], used_before: Optional[float]) -> dict[str, Any]:
    """The CSV row of a subject's call, but for its floor.  used_before: the GPU's memory before it was made, in MiB; None where others use it as well."""
    request = row.request
    times = latencies(call, request.device)
    median, cuts = statistics.median(times), statistics.quantiles(times, n=100, method="inclusive")
    flops = floor.work_of(dimensions_of(request.model), request.encoder, request.batch, request.tokens).flops
    return {**blank(row), "attention": subject.attention, "median_ms": f"{median:.4f}", "p90_ms": f"{cuts[89]:.4f}", "p99_ms": f"{cuts[98]:.4f}",
            "per_second": f"{request.batch / median * 1e3:.1f}", "tflops": f"{flops / median / 1e9:.3f}", "engine_mib": subject.engine_mib,
            "gpu_memory_mib": "" if used_before is None else f"{used_mib() - used_before:.0f}", "build_s": f"{subject.build_s:.1f}", "error": subject.remark}


def measure_all(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The CSV rows of one group, one after the other in this process; rows of one request share a subject."""
    used_before = used_mib() if rows[0].request.device == "cuda" and not floor.shared() else None
    subject, built = None, None
    for row in rows:
        try:
            if built != (row.backend, row.request):
                subject = built = None
                release()
                with floor.turn() if row.backend in BUSY else contextlib.nullcontext():
                    subject, built = BACKENDS[row.backend](row.request), (row.backend, row.request)
                release()
            with floor.turn():
                result = measure(row, subject, call_of(row, subject), used_before)
        except Missing as reason:
            result = {**blank(row), "error": f"skipped: {reason}"}
        yield result


def release() -> None:
    """Give the GPU's memory of what is no longer referred to back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build_all(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Build what the rows need, which stays in their artifacts' folder, and measure nothing; what came of it as CSV rows without times."""
    for row in rows:
        try:
            with floor.turn():
                subject = BACKENDS[row.backend](row.request)
        except Missing as reason:
            yield {**blank(row), "error": f"skipped: {reason}"}
        else:
            yield {**blank(row), "attention": subject.attention, "engine_mib": subject.engine_mib, "build_s": f"{subject.build_s:.1f}", "error": subject.remark}


@dataclass(frozen=True)
class Held:
    """A subject that stays beside others in one process.  before: the process's GPU memory without it; loaded: what making it added; None: unknown."""

    subject: Subject
    before: Optional[int]
    loaded: Optional[int]


def hold_subject(row: Row, others: Iterable[Held]) -> Held:
    """Make a row's subject.  One whose module is another's, as rows of one batch range share it, has that module's memory as its own too."""
    release()
    before = own_mib(row.request.device)
    subject = BACKENDS[row.backend](row.request)
    release()
    after = own_mib(row.request.device)
    loaded = None if before is None or after is None else after - before
    for other in others:
        if other.subject.run is subject.run:
            loaded = other.loaded
            before = None if before is None or loaded is None else before - loaded
            break
    return Held(subject, before, loaded)


def prepared(row: Row, held: dict[Request, Held]) -> Callable[[], dict[str, Any]]:
    """What measures a row: everything that it needs is made now.  held: what rows before it had made, to which its own is added.

    Its `gpu_memory_mib` is what this process uses more now, the row captured and warmed up, than before its request's subject was made;
    so of two rows that share a subject the later one has the CUDA graph of the other in it as well, and what a library keeps for
    all, such as its kernels, is in the group's first rows alone.  It is empty where the driver does not tell.
    """
    try:
        if row.request not in held:
            held[row.request] = hold_subject(row, held.values())
        subject, before = held[row.request].subject, held[row.request].before
        call = call_of(row, subject)
        for _ in range(3):
            call()
        now = own_mib(row.request.device)
    except Missing as reason:
        error = f"skipped: {reason}"
    except Exception as problem:  # the group's other rows are still worth having
        error = in_a_line(problem)
    else:
        memory = "" if now is None or before is None else str(now - before)
        return lambda: {**measure(row, subject, call, None), "gpu_memory_mib": memory}
    return lambda: {**blank(row), "error": error}


def wait_and_measure(rows: Sequence[Row]) -> None:
    """Prepare a group, say so, and measure and print the row whose number comes, for each line of standard input."""
    held: dict[Request, Held] = {}
    if rows[0].request.device == "cuda":
        used_mib()  # makes the CUDA context, which no row counts
    measuring = [prepared(row, held) for row in rows]
    release()
    print(READY, flush=True)
    for line in sys.stdin:
        print(RESULT + json.dumps(measuring[int(line)]()), flush=True)


def child(specification: str, build_only: bool, hold: bool = False) -> None:
    """Measure (or only build) a group and print its rows as they come, or as they are asked for."""
    rows = [Row(item["backend"], Request(**item["request"]), item["graph"]) for item in json.loads(specification)]
    with torch.no_grad():
        if hold:
            return wait_and_measure(rows)
        for result in (build_all if build_only else measure_all)(rows):
            print(RESULT + json.dumps(result), flush=True)


def in_processes(python: str, rows: Sequence[Row], seconds: float, *arguments: str, together: bool = True) -> Iterator[dict[str, Any]]:
    """The CSV rows of one group, from a process of their own, or not together from one for each request; what goes wrong there is the
    error of the row it was at, and the rest goes on in another process, until two rows one after the other have ended in the same words.

    seconds: how long one row may take.  arguments: more of them for the process, which ends with the iterator.
    """
    rows, problems = list(rows), []
    while rows:
        if len(problems) > 1 and problems[-1] == problems[-2]:
            yield {**blank(rows.pop(0)), "error": f"not tried, after two others: {problems[-1]}"}
            continue
        share = rows if together else list(itertools.takewhile(lambda row: row.request == rows[0].request, rows))
        last = len(rows) - len(share)
        with Child(command(python, share, *arguments)) as process:
            while len(rows) > last:
                line = process.line(seconds)
                if line is None:
                    problems.append(process.problem)
                    yield {**blank(rows.pop(0)), "error": process.problem}
                    break
                if line.startswith(RESULT):
                    rows.pop(0)
                    problems.clear()
                    yield json.loads(line[len(RESULT):])


def command(python: str, rows: Sequence[Row], *arguments: str) -> list[str]:
    """How the process of one group is started."""
    return [python, "-m", "experiments.sweep", "--group", json.dumps([asdict(row) for row in rows]), *arguments]


def surroundings(python: str) -> dict[str, Any]:
    """How `subprocess` shall start an interpreter: this process's own with everything that it has; another one without what only
    this one needs, and in the repository's root, where it finds `-m experiments...` without PYTHONPATH."""
    def place(path: str) -> tuple[str, str]:  # the folder counts: an environment's interpreter is a link to the one it was made with
        return os.path.dirname(os.path.abspath(path)), os.path.realpath(path)

    if place(python) == place(sys.executable):
        return {}
    return {"env": {name: value for name, value in os.environ.items() if name not in INTERPRETERS_OWN}, "cwd": ROOT}


class Child:
    """A process of an interpreter, whose lines are read with a time limit."""

    def __init__(self, command: Sequence[str]):
        self.problem = ""
        self._said = tempfile.TemporaryFile(mode="w+", errors="replace")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, errors="replace",
                                         **surroundings(command[0]))
        self._lines: queue.Queue = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self, seconds: float) -> Optional[str]:
        """The next line; None where the process ended, or took too long and was ended, and `problem` says so."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.problem = f"took over {seconds:.0f} s"
            return None
        if line is None:
            code = self._process.wait()
            self._said.seek(0)
            self.problem = f"exit code {code}: {(self._said.read().strip().splitlines() or ['it said nothing'])[-1][:200]}"
        return line

    def answer(self, wanted: str, seconds: float) -> Optional[str]:
        """The rest of the next line that starts with these words; None as of `line`."""
        end = time.monotonic() + seconds
        while (line := self.line(max(0.0, end - time.monotonic()))) is not None:
            if line.startswith(wanted):
                return line[len(wanted):]
        return None

    def say(self, line: str) -> None:
        """Write a line to it; one that has ended does not hear it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *problem) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=0 if self.problem or problem[0] else 30)  # it has said all, and only has to end
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._said.close()


def floors(python: str, rows: Sequence[Row], path: Path, progress: Progress) -> Mapping[tuple[str, ...], str]:
    """floor_ms by the columns of `floor.KEY`, measured now where the file lacks a row of this group."""
    def known() -> dict[tuple[str, ...], str]:
        return {tuple(row[name] for name in floor.KEY): row["floor_ms"] for row in read_rows(path)}

    first, have = rows[0].request, known()
    missing = [row.request for row in rows if floor_key(row.request) not in have]
    if missing:
        tokens = sorted({request.tokens for request in missing})
        command = [python, "-m", "experiments.floor", "--model", first.model, "--encoder", first.encoder, "--precision", first.precision, "--device", first.device,
                   "--batches", *(str(batch) for batch in sorted({request.batch for request in missing})), "--out", str(path.resolve()),
                   *([] if first.encoder == "image" else ["--tokens", *map(str, tokens)])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ROW_SECONDS, **surroundings(python))
        except subprocess.TimeoutExpired:
            progress.say(f"the floor took over {ROW_SECONDS} s")
        else:
            if done.returncode != 0:
                progress.say(f"the floor could not be measured: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1][:200]}")
        have = known()
    return have


def floor_key(request: Request) -> tuple[str, ...]:
    return request.model, request.encoder, request.precision, str(request.batch), str(request.tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="quick")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", type=int, metavar="N", help="use this GPU alone; two runs at once need an --out each")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--artifacts", type=Path, help="take artifacts from this folder (under the names of experiments.accuracy), and keep new ones there")
    parser.add_argument("--python", metavar="BACKEND=PATH", nargs="*", default=[], help="another interpreter for a backend, or for floor")
    parser.add_argument("--range", metavar="MIN:OPT:MAX", help="what the backends that end in _range compile for (default: the grid's)")
    parser.add_argument("--optimization-level", type=int, default=3, metavar="0-5", help="of TensorRT's builder (default 3); another one is named in `attention`")
    for name in ("models", "backends", "encoders", "precisions", "batches", "lengths"):
        parser.add_argument(f"--{name}", nargs="+", type=int if name in ("batches", "lengths") else str, help=f"only these of the grid's {name}" + (" (of texts)" if name == "lengths" else ""))
    parser.add_argument("--graphs-only", action="store_true", help="only rows with CUDA graphs, and the others of the original model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so many seconds; the next run goes on")
    parser.add_argument("--together", action="store_true", help="one process for all batches and lengths of a backend, model, encoder and precision")
    parser.add_argument("--existing", action="store_true", help="leave out rows whose artifact is not in --artifacts yet")
    parser.add_argument("--hold", action="store_true", help="prepare all rows at once, and measure them for each line of standard input: FOLDER SECONDS")
    parser.add_argument("--build-only", action="store_true", help="build the engines of the rows into --artifacts, and measure and write nothing")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        child(options.group, options.build_only, options.hold)
        return 0
    if options.build_only and not options.artifacts:
        parser.error("--build-only needs --artifacts, where what it builds stays")
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(options.gpu)  # for the children; this process computes nothing
    interpreters = {name: os.path.abspath(shutil.which(path) or path) for name, path in (pair.split("=", 1) for pair in options.python)}
    for name in [*(options.backends or ()), *interpreters]:
        if name not in BACKENDS and name != "floor":
            parser.error(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    with tempfile.TemporaryDirectory() as temporary:
        return sweep(options, options.artifacts or Path(temporary), interpreters)


def sweep(options: argparse.Namespace, artifacts: Path, interpreters: Mapping[str, str]) -> int:
    """Measure, hold or build what the command line asks for; artifacts: the folder from which all processes take them and in which new ones stay."""
    fixed = {"level": options.optimization_level, "artifacts": str(artifacts.resolve())}
    if options.range:
        fixed["batches"] = str(BatchRange.parse(options.range))

    def asked(row: Row) -> bool:
        request = row.request
        chosen = ((options.models, request.model), (options.backends, row.backend), (options.encoders, request.encoder),
                  (options.precisions, request.precision), (options.batches, request.batch), (options.lengths if request.encoder == "text" else None, request.tokens))
        if options.graphs_only and not row.graph and row.backend != "clip_eager":
            return False
        return all(not only or value in only for only, value in chosen)

    path = options.out / "sweep.csv"
    done = {tuple(row[name] for name in KEY) for row in read_rows(path)}
    wanted = [row for row in rows_of(options.grid, options.device, **fixed) if asked(row) and row.key not in done]
    if options.existing:
        wanted = [row for row in wanted if is_built(row.backend, row.request)]
    if options.build_only:
        return build(wanted, interpreters)
    if options.hold:
        hold(wanted, interpreters, options.out / "ready", options.seconds, sys.stdin)
    else:
        run(wanted, interpreters, path, options.out / "floor.csv", options.seconds, options.together)
    return 0


def build(wanted: Sequence[Row], interpreters: Mapping[str, str]) -> int:
    """Build the engines that rows need; 1 where one could not be built or is wrong, else 0."""
    progress, start, failed = Progress(), time.perf_counter(), 0
    needed = {(row.backend, row.request): row for row in wanted if row.backend.startswith(("clip_ttrt", "tensorrt"))}
    for _, group in itertools.groupby(needed.values(), key=lambda row: row.group):
        rows = list(group)
        for row, result in zip(rows, in_processes(interpreters.get(rows[0].backend, sys.executable), rows, ROW_SECONDS, "--build-only")):
            progress.say(f"{time.perf_counter() - start:.0f} s: {row.describe()}: {result['error'] or 'built in ' + result['build_s'] + ' s'}")
            failed += bool(result["error"])
    return 1 if failed else 0


def hold(wanted: Sequence[Row], interpreters: Mapping[str, str], ready: Path, seconds: float, orders: Iterable[str]) -> None:
    """Prepare all groups at once, within so many seconds, make the file `ready`, and measure the rows for each order."""
    progress, start = Progress(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        groups = [[row for row in wanted if row.group == group] for group in dict.fromkeys(row.group for row in wanted)]
        children = [stack.enter_context(Child(command(interpreters.get(rows[0].backend, sys.executable), rows, "--hold"))) for rows in groups]
        held = list(zip(groups, children))
        for rows, process in held:
            process.answer(READY, max(0.0, min(seconds, threading.TIMEOUT_MAX) - (time.perf_counter() - start)))
            progress.say(f"{time.perf_counter() - start:.0f} s: {rows[0].describe()}, {len(rows)} rows: {process.problem or 'ready'}")
        ready.parent.mkdir(parents=True, exist_ok=True)
        ready.touch()
        for order in orders:
            folder, limit = order.rsplit(maxsplit=1)
            measure_held(held, Path(folder), float(limit), progress)


def measure_held(held: Sequence[tuple[Sequence[Row], Child]], folder: Path, seconds: float, progress: Progress) -> None:
    """Measure the rows of groups that wait, all of one batch size after the other, as far as so many seconds reach, into
    FOLDER/sweep.csv, and make FOLDER/done.  Those of a group that could not be prepared, or has ended, are rows with its error."""
    start, path = time.perf_counter(), folder / "sweep.csv"
    done = {tuple(row[name] for name in KEY) for row in read_rows(path)}
    to_do = [(row, index, process) for rows, process in held for index, row in enumerate(rows) if row.key not in done]
    batches = list(dict.fromkeys(row.request.batch for row, _, _ in to_do))
    for row, index, process in sorted(to_do, key=lambda item: batches.index(item[0].request.batch)):
        if time.perf_counter() - start > seconds:
            break
        result = None
        if not process.problem:
            process.say(str(index))
            result = process.answer(RESULT, HELD_ROW_SECONDS)
        append_row(path, json.loads(result) if result else {**blank(row), "error": process.problem})
    progress.say(f"{folder}: {time.perf_counter() - start:.1f} s")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done").touch()


def run(wanted: Sequence[Row], interpreters: Mapping[str, str], path: Path, floor_path: Path, seconds: float, together: bool = False) -> None:
    """Measure rows and append them to a CSV; after so many seconds the rest is left for another run.  together: as for `in_processes`."""
    progress, start, finished = Progress(), time.perf_counter(), 0
    for _, group in itertools.groupby(wanted, key=lambda row: row.group):
        rows = list(group)
        if time.perf_counter() - start > seconds:
            break
        have = floors(interpreters.get("floor", sys.executable), rows, floor_path, progress)
        left = f", about {(time.perf_counter() - start) / finished * (len(wanted) - finished):.0f} s left" if finished else ""
        progress.say(f"[{finished + 1}/{len(wanted)}{left}] {rows[0].describe()}, {len(rows)} rows")
        for row, result in zip(rows, in_processes(interpreters.get(rows[0].backend, sys.executable), rows, ROW_SECONDS, together=together)):
            append_row(path, {**result, "floor_ms": have.get(floor_key(row.request), "") if result["median_ms"] else ""})
            finished += 1
            if time.perf_counter() - start > seconds:
                break
    if finished < len(wanted):
        progress.say(f"stopped after {time.perf_counter() - start:.0f} s with {len(wanted) - finished} rows to go")


if __name__ == "__main__":
    sys.exit(main())
