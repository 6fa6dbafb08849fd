"""The sweep: its quick grid run whole, and that nothing which goes wrong in a row ends it."""
import itertools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import example_input
from experiments import baselines, floor, sweep
from experiments.record import append_row, read_rows

REQUEST = baselines.Request("demo", "demo", "text", "fp32", 1, 77, "cpu")
ROW = sweep.Row("clip_eager", REQUEST, False)

# Stands in for an interpreter: a child that ends itself whenever its first row is of batch 8, and else answers that row.
DIES_AT_8 = """
import json, os, sys
rows = json.loads(sys.argv[-1])
while rows:
    row = rows.pop(0)
    if row["request"]["batch"] == 8:
        os.abort()
    print("sweep-row " + json.dumps({"batch": row["request"]["batch"]}), flush=True)
"""


def another_python(path, *arguments):
    """An interpreter that is not sys.executable but does the same: a script, with which sys.executable has what it needs by now."""
    needs = [f"{name}={os.environ[name]}" for name in sweep.INTERPRETERS_OWN if name in os.environ]
    path.write_text(f'#!/bin/sh\nexec env {shlex.join([*needs, sys.executable, *arguments])} "$@"\n')
    path.chmod(0o755)
    return str(path)


def quick(out, *arguments):
    command = [sys.executable, "-m", "experiments.sweep", "--grid", "quick", "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_quick_grid_gives_sane_rows_and_resumes(tmp_path):
    done = quick(tmp_path, "--encoders", "image")
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "sweep.csv")) == 8
    done = quick(tmp_path)
    assert done.returncode == 0 and "[1/8]" in done.stderr, done.stderr
    rows = read_rows(tmp_path / "sweep.csv")
    assert len(rows) == 16 and tuple(rows[0]) == sweep.COLUMNS
    assert len({tuple(row[name] for name in sweep.KEY) for row in rows}) == len(rows)
    floors = {tuple(row[name] for name in floor.KEY): row for row in read_rows(tmp_path / "floor.csv")}
    assert len(floors) == 4
    for row in rows:
        if row["backend"] == "onnxruntime" and row["error"]:
            assert row["error"] == "skipped: onnxruntime is not installed" and not row["median_ms"] and not row["floor_ms"]
            continue
        assert not row["error"], row
        median, p90, p99 = (float(row[name]) for name in ("median_ms", "p90_ms", "p99_ms"))
        assert 0 < median <= p90 <= p99
        assert float(row["per_second"]) == pytest.approx(int(row["batch"]) / median * 1e3, rel=0.01)
        parts = floors[tuple(row[name] for name in floor.KEY)]
        assert row["floor_ms"] == parts["floor_ms"] and float(row["tflops"]) >= 0 and row["cuda_graph"] == "False"
        assert sum(float(parts[name]) for name in ("products_ms", "attention_ms", "norms_ms")) == pytest.approx(float(row["floor_ms"]), abs=2e-4)
    again = quick(tmp_path)
    assert again.returncode == 0 and "[1/" not in again.stderr
    assert read_rows(tmp_path / "sweep.csv") == rows


def test_a_crash_is_a_row():
    [row] = sweep.in_processes("/bin/false", [ROW], 10)
    assert tuple(row) == sweep.COLUMNS and row["error"] == "exit code 1: it said nothing"


def test_an_exception_is_a_row():
    broken = sweep.Row("clip_eager", replace(REQUEST, weights="nowhere.safetensors"), False)
    [row] = sweep.in_processes(sys.executable, [broken], 60)
    assert "exit code 1" in row["error"] and "nowhere.safetensors: no such file" in row["error"]


def test_a_row_that_takes_too_long_is_a_row():
    rows = [sweep.Row("clip_eager", replace(REQUEST, batch=batch), False) for batch in (1, 2, 3)]
    given = list(sweep.in_processes(sys.executable, rows, 0.01))
    assert [row["batch"] for row in given] == ["1", "2", "3"] and not any(row["median_ms"] for row in given)
    assert [row["error"] for row in given] == ["took over 0 s"] * 2 + ["not tried, after two others: took over 0 s"]


def test_a_crash_costs_its_own_row_only(tmp_path):
    (tmp_path / "dies.py").write_text(DIES_AT_8)
    python = another_python(tmp_path / "python", str(tmp_path / "dies.py"))
    rows = [sweep.Row("clip_eager", replace(REQUEST, batch=batch), False) for batch in (1, 8, 32, 128)]
    given = list(sweep.in_processes(python, rows, 60))
    assert [str(row["batch"]) for row in given] == ["1", "8", "32", "128"]
    assert [row.get("error", "") for row in given] == ["", "exit code -6: it said nothing", "", ""]


def test_each_request_has_a_process_of_its_own_unless_together(tmp_path):
    (tmp_path / "tells.py").write_text("import json, os, sys\n"
                                       "for row in json.loads(sys.argv[-1]): print('sweep-row ' + json.dumps({'process': os.getpid()}), flush=True)\n")
    python = another_python(tmp_path / "python", str(tmp_path / "tells.py"))
    rows = [sweep.Row("clip_eager", replace(REQUEST, batch=batch), graph) for batch in (1, 8) for graph in (True, False)]
    processes = {together: [row["process"] for row in sweep.in_processes(python, rows, 60, together=together)] for together in (True, False)}
    assert len(processes[True]) == 4 and len(set(processes[True])) == 1
    first, second, third, fourth = processes[False]
    assert first == second != third == fourth


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Another interpreter, beside an environment in which only this one could run, outside the repository."""
    python = another_python(tmp_path / "python")
    for name in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    return python


def test_another_interpreter_measures_rows_and_floors_in_an_environment_of_its_own(foreign):
    row = replace(ROW, backend="eager_sdpa")
    sweep.run([row], {"eager_sdpa": foreign, "floor": foreign}, Path("sweep.csv"), Path("floor.csv"), float("inf"))
    [measured], [floor_row] = read_rows(Path("sweep.csv")), read_rows(Path("floor.csv"))
    assert not measured["error"] and float(measured["median_ms"]) > 0 and measured["attention"] == "sdpa"
    assert measured["floor_ms"] == floor_row["floor_ms"] and float(floor_row["floor_ms"]) > 0


def test_another_interpreter_holds_rows_and_builds_in_an_environment_of_its_own(foreign, capsys):
    row = replace(ROW, backend="clip_ttrt_native", request=replace(REQUEST, artifacts=os.path.abspath("artifacts")))
    assert sweep.build([row], {"clip_ttrt_native": foreign}) == 0 and "built in" in capsys.readouterr().err
    assert len(list(Path("artifacts").glob("*/manifest.json"))) == 1
    sweep.hold([row], {"clip_ttrt_native": foreign}, Path("ready"), float("inf"), ["held 60"])
    [measured] = read_rows(Path("held/sweep.csv"))
    assert not measured["error"] and float(measured["median_ms"]) > 0 and measured["attention"] == "native"


def test_only_another_interpreter_gets_another_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert sweep.surroundings(sys.executable) == {}
    (tmp_path / "python").symlink_to(sys.executable)  # as a virtual environment has it
    given = sweep.surroundings(str(tmp_path / "python"))
    assert given["cwd"] == Path(sweep.__file__).parent.parent and given["env"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert set(os.environ) - set(given["env"]) == set(sweep.INTERPRETERS_OWN) & set(os.environ) >= {"PYTHONPATH"}
    (tmp_path / "python3").symlink_to("python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert sweep.surroundings(str(tmp_path / "python")) == {}  # two names of one


def test_rows_of_one_group_stand_together_and_a_grid_can_be_taken_in_parts():
    rows = list(sweep.rows_of("h200", "cuda"))
    groups = [key for key, _ in itertools.groupby(row.group for row in rows)]
    assert len(rows) == len({row.key for row in rows})
    twice = {group for group in groups if groups.count(group) > 1}  # once more, for short texts
    assert twice == {group for group in groups if group[2] == "text" and not group[0].startswith("clip_ttrt")}
    for row in sweep.rows_of("hackathon", "cuda", artifacts="folder"):
        batches = BatchRange.parse(row.request.batches)
        assert batches.minimum <= row.request.batch <= batches.maximum and row.request.artifacts == "folder"


def test_filters_choose_rows_and_unknown_backends_are_an_error(tmp_path):
    done = quick(tmp_path, "--backends", "eager_sdpa", "--encoders", "text", "--batches", "8")
    assert done.returncode == 0, done.stderr
    assert [(row["backend"], row["encoder"], row["batch"]) for row in read_rows(tmp_path / "sweep.csv")] == [("eager_sdpa", "text", "8")]
    assert "unknown backend 'nothing'" in quick(tmp_path, "--backends", "nothing").stderr


def test_a_newer_environment_needs_no_clip_package(tmp_path):
    rows = [asdict(sweep.Row(backend, replace(REQUEST, encoder="image", tokens=50), False)) for backend in ("eager_sdpa", "clip_eager")]
    script = ("import sys; sys.modules['clip'] = sys.modules['ftfy'] = None; from experiments import sweep; sweep.child(sys.argv[1], False)")
    done = subprocess.run([sys.executable, "-c", script, json.dumps(rows)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    eager, original = (json.loads(line.removeprefix(sweep.RESULT)) for line in done.stdout.splitlines() if line.startswith(sweep.RESULT))
    assert float(eager["median_ms"]) > 0 and not eager["error"]
    assert original["error"] == "skipped: the original `clip` package is not installed"


def test_rows_of_one_range_share_an_artifact(tmp_path):
    requests = [replace(REQUEST, batch=batch, batches="2:2:4", artifacts=str(tmp_path)) for batch in (2, 4, 5)]
    rows = list(sweep.measure_all([sweep.Row("clip_ttrt_native_range", request, False) for request in requests]))
    assert [row["attention"] for row in rows[:2]] == ["native 2:2:4"] * 2 and not rows[0]["error"] and not rows[1]["error"]
    assert rows[2]["error"] == "skipped: batch 5 is outside the range 2:2:4"
    assert [path.name for path in tmp_path.iterdir()] == ["demo-fp32-2_2_4-native-text"]


def test_processes_share_artifacts_without_a_folder_for_them(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(sweep, "run", lambda wanted, *_: given.extend((row.request.artifacts, Path(row.request.artifacts).is_dir()) for row in wanted))
    monkeypatch.setattr(sys, "argv", ["sweep", "--grid", "quick", "--device", "cpu", "--out", str(tmp_path)])
    assert sweep.main() == 0
    [(folder, there)] = set(given)
    assert len(given) == 16 and there and not Path(folder).exists()


def test_engines_can_be_built_first_and_measured_later(tmp_path):
    arguments = ("--backends", "clip_ttrt_native", "eager_sdpa", "--encoders", "text", "--batches", "1")
    assert "--build-only needs --artifacts" in quick(tmp_path, *arguments, "--build-only").stderr
    arguments += ("--artifacts", str(tmp_path / "artifacts"))
    only = quick(tmp_path / "existing", *arguments, "--existing")
    assert only.returncode == 0 and [row["backend"] for row in read_rows(tmp_path / "existing" / "sweep.csv")] == ["eager_sdpa"]
    built = quick(tmp_path, *arguments, "--build-only")
    assert built.returncode == 0 and "built in" in built.stderr and not (tmp_path / "sweep.csv").exists(), built.stderr
    [manifest] = (tmp_path / "artifacts").glob("*/manifest.json")
    before = manifest.stat().st_mtime_ns
    assert quick(tmp_path, *arguments, "--existing").returncode == 0 and manifest.stat().st_mtime_ns == before
    assert [row["error"] for row in read_rows(tmp_path / "sweep.csv")] == ["", ""]


def test_runs_that_share_a_gpu_take_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_TTRT_TURN", str(tmp_path / "turn"))
    script = "from experiments.floor import turn\nwith turn(): print('mine')"
    with floor.turn():
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=6)
    assert other.communicate(timeout=60)[0] == "mine\n"


@pytest.mark.parametrize("backend", ["clip_eager", "eager_sdpa", "tensorrt_onnx", "clip_ttrt_native"])
def test_what_a_backend_cannot_do_is_skipped_with_a_reason(backend):
    half = baselines.Request("demo", "demo", "text", "fp16", 1, 77, "cpu")
    [row] = sweep.measure_all([sweep.Row(backend, half, False)])
    assert row["error"].startswith("skipped: ") and ("fp16" in row["error"])


def test_all_backends_compute_the_same_features():
    with torch.no_grad():
        for tokens, names in ((77, ("eager_sdpa", "clip_ttrt_native", "clip_ttrt_native_range")), (20, ("eager_sdpa",))):
            request = baselines.Request("demo", "demo", "text", "fp32", 2, tokens, "cpu", batches="1:2:2")
            expected = baselines.clip_eager(request).call()
            for name in names:
                actual = baselines.BACKENDS[name](request).call()
                assert (actual - expected).norm() / expected.norm() < 1e-5, name
        with pytest.raises(baselines.Missing, match="full text length"):
            baselines.BACKENDS["clip_ttrt_native"](request)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_counted_operations_are_those_of_the_encoder(encoder):
    dims, batch = MODELS["demo"], 2
    module = ENCODERS[encoder](load_checkpoint("demo").state_dict, DIFFERENTIABLE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example_input(encoder, dims))
    counted = counter.get_total_flops()
    work = floor.work_of(dims, encoder, batch, dims.image_tokens if encoder == "image" else dims.context_length)
    products = sum(2 * rows * inputs * outputs * times for rows, inputs, outputs, times in work.products)
    _, heads, tokens, causal, layers = work.attention
    scores = 4 * batch * heads * tokens**2 * 64 * layers
    assert products + scores in (counted, counted + scores)  # PyTorch counts CPU attention in some versions only
    assert work.flops == products + scores * (0.5 if causal else 1)


@pytest.mark.parametrize("encoder, tokens", [("image", 50), ("text", 77)])
def test_wrong_features_are_remarked_whatever_the_input_is_made_of(encoder, tokens):
    request = baselines.Request("demo", "demo", encoder, "fp32", 2, tokens, "cpu")
    module, x = baselines.plain(request), baselines.example(request, torch.half)
    right = lambda rows: module(rows.float() if rows.is_floating_point() else rows)  # noqa: E731
    assert baselines.wrong(right, x, request) == ""
    assert baselines.wrong(lambda rows: right(rows).roll(1, dims=1), x, request).startswith("wrong: smallest cosine ")


def test_a_csv_with_other_columns_is_not_mixed_up(tmp_path):
    append_row(tmp_path / "a.csv", {"x": 1, "y": 2})
    with pytest.raises(ValueError, match="has columns"):
        append_row(tmp_path / "a.csv", {"x": 1, "z": 2})
    assert read_rows(tmp_path / "a.csv") == [{"x": "1", "y": "2"}]


def orders(folder, first, last):
    """Two orders, at the time of which it is checked what the one before has left behind."""
    assert (folder / "ready").exists() and not (folder / "first").exists()
    yield f"{folder / 'first'} {first}\n"
    assert (folder / "first" / "done").exists()
    yield f"{folder / 'last'} {last}\n"


def test_held_rows_are_measured_as_often_as_asked(tmp_path):
    rows = [replace(ROW, backend=backend, request=replace(REQUEST, batch=batch)) for backend in ("eager_sdpa", "onnxruntime") for batch in (1, 2)]
    sweep.hold(rows, {}, tmp_path / "ready", float("inf"), orders(tmp_path, 60, 0))
    found = read_rows(tmp_path / "first" / "sweep.csv")
    assert [(row["backend"], row["batch"]) for row in found] == [("eager_sdpa", "1"), ("onnxruntime", "1"), ("eager_sdpa", "2"), ("onnxruntime", "2")]
    assert all(bool(row["median_ms"]) != row["error"].startswith("skipped: ") for row in found)
    assert not any(row["gpu_memory_mib"] for row in found)
    assert not read_rows(tmp_path / "last" / "sweep.csv") and (tmp_path / "last" / "done").exists()


def test_a_held_row_or_group_that_cannot_be_prepared_is_its_error(tmp_path):
    broken = replace(ROW, request=replace(REQUEST, weights="nowhere.safetensors"))
    dead = [replace(ROW, backend="eager_sdpa", request=replace(REQUEST, batch=batch)) for batch in (REQUEST.batch, 2 * REQUEST.batch)]
    sweep.hold([broken, *dead], {"eager_sdpa": "/bin/false"}, tmp_path / "ready", float("inf"), [f"{tmp_path} 60"])
    row, *others = read_rows(tmp_path / "sweep.csv")
    assert row["backend"] == "clip_eager" and "nowhere.safetensors: no such file" in row["error"] and not row["median_ms"]
    assert [(other["backend"], other["batch"], other["error"]) for other in others] == [
        ("eager_sdpa", str(row.request.batch), "exit code 1: it said nothing") for row in dead]


@pytest.mark.parametrize("script, expected", [
    ("echo '1, 5'; echo \"$PPID, 1634\"", 1634),
    ("echo \"$PPID, 1634\"; echo '1, [N/A]'; echo \"$PPID, 6\"", 1640),  # on two GPUs
    ("echo '1, 5'", None),
    ("echo \"$PPID, [N/A]\"", None),
    ("echo 'No running processes found'", None),
    ("echo \"$PPID, 1634\"; exit 9", None),
    (None, None),
])
def test_the_driver_tells_a_process_its_own_memory_or_nothing(script, expected, tmp_path, monkeypatch):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep.own_mib("cuda") == expected and sweep.own_mib("cpu") is None


def held_memory(monkeypatch, subjects, figures):
    """`gpu_memory_mib` of held rows on a pretended GPU, two of each batch: with a CUDA graph and without.  figures: what the driver says, in order."""
    told, made = iter(figures), iter(subjects)
    monkeypatch.setattr(sweep, "own_mib", lambda device: next(told))
    monkeypatch.setattr(sweep, "graphed", lambda call: call)
    monkeypatch.setattr(sweep, "latencies", lambda call, device: [1.0, 1.0])
    monkeypatch.setitem(sweep.BACKENDS, "pretended", lambda request: next(made))
    held, requests = {}, [replace(REQUEST, batch=batch, device="cuda") for batch in range(1, len(subjects) + 1)]
    measuring = [sweep.prepared(sweep.Row("pretended", request, graph), held) for request in requests for graph in (True, False)]
    assert next(told, None) is None  # and nothing is asked while measuring
    return [measure()["gpu_memory_mib"] for measure in measuring]


def test_a_held_row_counts_what_its_request_added(monkeypatch):
    x = torch.zeros(1)
    alone = [baselines.Subject(lambda rows: rows, x, 0.0), baselines.Subject(lambda rows: -rows, x, 0.0)]
    figures = [500, 600, 650, 660, 640, 680, 700, 705]  # before it was made, after, with the graph, without; for each request
    assert held_memory(monkeypatch, alone, figures) == ["150", "160", "60", "65"]
    together = [baselines.Subject(alone[0].run, x, 0.0), baselines.Subject(alone[0].run, x, 0.0)]
    assert held_memory(monkeypatch, together, figures) == ["150", "160", "160", "165"]  # 100 of the module that both have


def test_a_held_row_without_the_drivers_figures_counts_nothing(monkeypatch):
    alone = [baselines.Subject(lambda rows: rows, torch.zeros(1), 0.0)]
    assert held_memory(monkeypatch, alone, [None, 600, 650, 660]) == ["", ""]
    assert held_memory(monkeypatch, alone, [500, None, 650, None]) == ["150", ""]


def test_random_weights_are_drawn_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_TTRT_WEIGHTS", str(tmp_path))
    baselines.weights_of.cache_clear()
    drawn = baselines.weights_of("demo", "random")
    baselines.weights_of.cache_clear()
    monkeypatch.setattr(baselines, "load_checkpoint", None)
    again = baselines.weights_of("demo", "random")
    baselines.weights_of.cache_clear()
    expected = load_checkpoint("demo", "random")
    for found in (drawn, again):
        assert found.origin == expected.origin and found.dimensions == expected.dimensions and found.state_dict.keys() == expected.state_dict.keys()
        assert all(torch.equal(found.state_dict[name], value) for name, value in expected.state_dict.items())
