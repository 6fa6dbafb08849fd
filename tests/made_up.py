"""Made-up measurements: CSVs as the experiments write them, for the tests of figures and tables."""
import csv
import itertools
from pathlib import Path

from experiments import plot
from experiments.results import BATCHES
from experiments.sweep import COLUMNS as SWEEP_COLUMNS

PROVENANCE = {"torch": "2.2.0", "tensorrt": "8.6.0", "gpu": "made-up GPU", "commit": "0000000000"}
SPEED = {"clip_eager": 8.0, "eager_sdpa": 4.0, "torch_compile_reduce_overhead": 2.0, "tensorrt_onnx": 2.5, "clip_ttrt_native": 1.9, "clip_ttrt_plugin": 1.5}
STAGE_COLUMNS = [f"{stage}_share" for stage in plot.STAGES]


def write(folder: Path, name: str, rows: list[dict]) -> None:
    path = folder / "h200" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sweep_row(model, encoder, backend, batch, graph, ms, **other):
    floor = 0.4 * batch / 32 + 0.2
    row = {"model": model, "encoder": encoder, "backend": backend, "attention": "", "precision": "fp16", "batch": batch, "tokens": 50 if encoder == "image" else 77,
           "resolution": 224, "cuda_graph": graph, "median_ms": ms, "floor_ms": floor, "error": "", **PROVENANCE, **other}
    return {column: row.get(column, "") for column in SWEEP_COLUMNS}


def sweep_rows(models=("ViT-B/32", "ViT-L/14"), encoders=("image", "text")):
    """Every backend takes its factor times the floor, a third more without a CUDA graph."""
    return [sweep_row(model, encoder, backend, batch, graph, round((0.4 * batch / 32 + 0.2) * factor * (1 if graph else 1.3), 4))
            for model, encoder, (backend, factor), batch, graph in itertools.product(models, encoders, SPEED.items(), BATCHES, (True, False))]


def load_rows():
    return [{"model": "ViT-B/32", "encoder": "image", "backend": backend, "attention": "", "precision": "fp16", "batch": 8, "threads": threads, "cuda_graph": graph,
             "items_per_second": rate * threads ** 0.5 * (1.1 if graph else 1), "p50_ms": 1.0 * threads, "p95_ms": 1.2 * threads, "p99_ms": 1.5 * threads, **PROVENANCE, "error": ""}
            for backend, rate, threads, graph in itertools.product(("clip_ttrt_plugin_range",), (5000,), (1, 2, 4, 8), (True, False))]


def text_length_rows():
    return [{"model": "ViT-B/32", "backend": backend, "attention": "", "precision": "fp16", "batch": 32, "tokens": tokens, "cuda_graph": True, "median_ms": tokens * factor,
             "max_abs_error": 1e-6, "min_cosine": 1.0, "mean_tokens": 10.25, "fit_share": 1 if tokens > 16 else 0.95, **PROVENANCE}
            for (backend, factor), tokens in itertools.product({"clip_ttrt_plugin": 0.01, "eager_sdpa": 0.03}.items(), (16, 32, 48, 77))]


def accuracy_rows():
    return [{"model": "demo", "encoder": encoder, "precision": precision, "weights": weights, "rel_max": error * 3, "rel_mean": error, "rel_median": error * 0.9, **PROVENANCE}
            for (precision, error), encoder, weights in itertools.product({"fp32": 1e-6, "tf32": 3e-4, "fp16": 2e-3}.items(), ("image", "text", "logits"), ("demo", "random"))]


def jpeg_rows():
    shares = dict(zip(STAGE_COLUMNS, (0.5, 0.25, 0.125, 0.025, 0.1)))
    return [{"model": "ViT-B/32", "backend": backend, "attention": "", "precision": "fp16", "batch": 32, "workers": workers, "images": 64, "images_per_second": 1234.5 * workers,
             **shares, **PROVENANCE} for backend, workers in itertools.product(("clip_ttrt_plugin_range", "clip_eager"), (1, 8))]


def ladder_rows():
    steps = {"the original, eager": 6.0, "one engine, stock": 3.0, "plugins": 1.5, "CUDA graph": 1.25}
    return [{"model": "ViT-B/32", "encoder": "image", "batch": 32, "step": step, "median_ms": ms, "graph_ms": "" if "original" in step else ms - 0.25, "engines": 0 if "original" in step else 1, "error": "wrong: cosine 0" if "stock" in step else "", **PROVENANCE}
            for step, ms in steps.items()]


def bug_rows():
    return [{"bug": bug, "seen": seen, "expected": "this", "actual": actual, "seconds": 1.5, "torch_tensorrt": "2.2.0", **PROVENANCE, "gpu": gpu}
            for bug, seen, actual, gpu in (("dropped_mask", "yes", "error 0.26 | of 1", "made-up GPU"), ("export_python_312", "cannot run", "needs Python 3.12", ""))]


def retrieval_rows():
    return [{"model": "demo", "weights": "demo", "backend": "clip_ttrt_plugin", "attention": "plugin", "precision": "fp16", "batch": 32, "images": 64, "texts": 8,
             "top1_original": 99.5, "top1_compiled": 99.25, "recall_image_to_text_original": 100, "recall_image_to_text_compiled": 100,
             "recall_text_to_image_original": 98, "recall_text_to_image_compiled": 97.5, "agreement": 99.75, **PROVENANCE}]


# Figure -> the CSV that it is drawn from, and its rows.
MADE_UP = {"speedup.png": ("sweep.csv", sweep_rows), "floor.png": ("sweep.csv", sweep_rows), "load.png": ("load.csv", load_rows), "text_length.png": ("text_length.csv", text_length_rows),
           "errors.png": ("accuracy.csv", accuracy_rows), "stages.png": ("jpeg.csv", jpeg_rows), "ladder.png": ("ladder.csv", ladder_rows)}
