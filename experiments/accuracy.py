"""Errors of the compiled encoders against the original model, a row an encoder: results/h200/accuracy.csv; and beside it
verified_speed.csv, what a call took in each verification.

    python -m experiments.accuracy --models demo ViT-B/32 --precisions fp16 fp32 --batches 1:32:256 32

Each model, precision and batch is compiled and verified in a fresh process, so that a crash costs one row and
not the run; rows that are already there are skipped, so that a run can be made in pieces.  OpenAI's weights are
used where they are at hand, else random ones, and the column `weights` says which.
"""
import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, Mapping

from clip_ttrt import pipeline
from clip_ttrt.artifact import MANIFEST, Artifact, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.progress import Progress
from experiments.record import append_row, commit, read_rows, write_environment

ERRORS = ("abs_max", "abs_mean", "abs_median", "rel_max", "rel_mean", "rel_median", "cos_min", "cos_mean")


def made_with(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The columns torch, tensorrt, gpu and commit of an artifact's rows, wherever they are written."""
    versions = manifest["versions"]
    return {"torch": versions["torch"], "tensorrt": versions.get("tensorrt", ""), "gpu": manifest["gpu"].get("name", ""), "commit": commit()}


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The CSV rows of one verified artifact: one for each encoder and one for the logits."""
    artifact = read_artifact(folder)
    manifest, report = artifact.manifest, artifact.manifest["verification"]
    if report is None:
        raise UserError(f"{folder} was never verified")
    for name, figures in report["errors"].items():
        module = manifest["modules"].get(name, {})
        top1 = report.get("top1", {})
        yield {
            "model": manifest["model"], "encoder": name, "backend": manifest["backend"], "attention": module.get("attention", manifest["attention"]),
            "precision": manifest["precision"], "batch": str(artifact.batch), "weights": artifact.origin.kind,
            **{key: f"{figures[key]:.10g}" for key in ERRORS},
            "top1_reference": f"{top1['reference']:.4f}" if name == "logits" else "",
            "top1_compiled": f"{top1['compiled']:.4f}" if name == "logits" else "",
            "engine_mib": module.get("engine_mib", module.get("mib", "")), "build_s": module.get("build_seconds", ""), **made_with(manifest),
        }


def speeds_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The median milliseconds of one call of each encoder that the verification of an artifact took (wall time, no CUDA graph)."""
    artifact = read_artifact(folder)
    manifest = artifact.manifest
    for name, speed in manifest["verification"]["speed"].items():
        yield {"model": manifest["model"], "encoder": name, "attention": manifest["modules"][name].get("attention", manifest["attention"]),
               "precision": manifest["precision"], "batch": str(artifact.batch), "measured_at": speed["batch"], "ms": f"{speed['ms']:.4f}", **made_with(manifest)}


def write_rows(folder: Path, out: Path, csv: str) -> None:
    """Append the rows of one verified artifact."""
    for row in rows_of(folder):
        append_row(out / csv, row)
    for row in speeds_of(folder):
        append_row(out / "verified_speed.csv", row)


def folder_name(model: str, precision: str, batch: str, attention: str) -> str:
    """The name of one compile's artifact folder."""
    return f"{model.replace('/', '-')}-{precision}-{batch.replace(':', '_')}-{attention}"


def compile_command(model: str, weights: str | None, precision: str, batch: str, attention: str, backend: str, output: Path) -> list[str]:
    """One compile as a process of its own, which replaces what is in the folder; weights: None for the model's default."""
    return [sys.executable, "-m", "clip_ttrt.compile", "--model", model, *(["--weights", weights] if weights else []), "--precision", precision,
            "--batch", batch, "--attention", attention, "--backend", backend, "--output", str(output), "--force"]


def compiled(root: Path, model: str, weights: str | None, precision: str, batch: str, attention: str, **options: Any) -> Artifact:
    """The artifact of one compile with TensorRT under a root folder: the one that is there, else made and verified now."""
    folder = root / folder_name(model, precision, batch, attention)
    if not (folder / MANIFEST).is_file():
        pipeline.compile(progress=Progress(), model=model, weights=weights, precision=precision, batch=batch, attention=attention, backend="tensorrt",
                         output=folder, **options)
    return read_artifact(folder)


def done(path: Path) -> set[tuple[str, ...]]:
    """Which compiles the CSV already holds."""
    return {(row["model"], row["precision"], row["batch"], row["attention"]) for row in read_rows(path)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "ViT-B/32", "ViT-L/14", "ViT-B/16", "ViT-L/14@336px"])
    parser.add_argument("--precisions", nargs="+", default=["fp16", "tf32", "fp32"])
    parser.add_argument("--batches", nargs="+", default=["1:32:256"])
    parser.add_argument("--weights", default="random", help="for OpenAI's models: openai, random or a file (default random); demo has its own")
    parser.add_argument("--attention", default="native")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/h200"))
    parser.add_argument("--artifacts", type=Path, help="keep the artifacts in this folder")
    parser.add_argument("--of", nargs="+", type=Path, metavar="ARTIFACT", help="write the rows of these artifacts and compile nothing")
    parser.add_argument("--csv", default="accuracy.csv", help="the file's name in --out")
    options = parser.parse_args()
    write_environment(options.out / "environment.json")
    if options.of:
        for folder in options.of:
            write_rows(folder, options.out, options.csv)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for batch, model, precision in itertools.product(options.batches, options.models, options.precisions):
            if (model, precision, batch, options.attention) in done(options.out / options.csv):
                continue
            folder = (options.artifacts or Path(temporary)) / folder_name(model, precision, batch, options.attention)
            code = subprocess.run(compile_command(model, None if model == "demo" else options.weights, precision, batch, options.attention, options.backend, folder)).returncode
            if not (folder / MANIFEST).is_file():
                print(json.dumps({"failed": model, "precision": precision, "batch": batch, "exit code": code}), flush=True)
                failed += 1
                continue
            write_rows(folder, options.out, options.csv)
            failed += code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
