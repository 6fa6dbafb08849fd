"""Errors of compiled encoders against the original model: results/accuracy.csv

    python -m experiments.accuracy --models demo ViT-B/32 --precisions fp16 bf16

Each model, precision and batch is compiled and verified in a process of its own, so that a crash
costs its rows and not the run.  OpenAI's models get random weights unless `--weights` says
otherwise; the column `weights` tells.
"""
import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clip_ttrt
from clip_ttrt.artifact import MANIFEST, Artifact, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.options import BACKENDS, KERNELS, PRECISIONS
from clip_ttrt.progress import Progress
from experiments.record import append_row, provenance

ROOT = Path(__file__).resolve().parent.parent
ERRORS = (
    "abs_max", "abs_mean", "abs_median", "rel_max", "rel_mean", "rel_median", "cos_min", "cos_mean",
)  # fmt: skip


def rows_of(artifact: Artifact) -> Iterator[dict[str, Any]]:
    """The CSV rows of a verified artifact.  Raises UserError where it was never verified."""
    manifest, report = artifact.manifest, artifact.manifest["verification"]
    if report is None:
        raise UserError(f"{artifact.folder} was never verified; compile it without --no-verify")
    for name, figures in report["errors"].items():
        module, top1 = manifest["modules"].get(name, {}), {}
        if name == "logits" and "top1" in report:
            top1 = {key: f"{value:.4f}" for key, value in report["top1"].items()}
        yield {
            "model": manifest["model"],
            "encoder": name,
            "precision": manifest["precision"],
            "backend": manifest["backend"],
            "kernels": manifest["kernels"] or "",
            "batch": str(artifact.batch),
            "weights": artifact.origin.kind,
            **{key: f"{figures[key]:.6g}" for key in ERRORS},
            "top1_original": top1.get("reference", ""),
            "top1_compiled": top1.get("compiled", ""),
            "engine_mib": module.get("engine_mib", module.get("mib", "")),
            "build_s": module.get("build_seconds", ""),
            **provenance(manifest["versions"], manifest["gpu"].get("name", "")),
        }


def folder_name(model: str, precision: str, batch: str, kernels: str) -> str:
    """The name of one compile's folder."""
    return f"{model.replace('/', '-')}-{precision}-{batch.replace(':', '_')}-{kernels}"


def compile_in_process(folder: Path, *flags: str, **options: str) -> int:
    """Compile into a folder, in a process of its own, what is not there yet; its exit code."""
    if (folder / MANIFEST).is_file():
        return 0
    told = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "clip_ttrt.compile", *told, *flags, "--output", str(folder)]
    return subprocess.run(command, check=False, stdout=sys.stderr, cwd=ROOT).returncode


def compiled(
    root: Path,
    model: str,
    weights: str | None,
    precision: str,
    batch: str,
    kernels: str = "auto",
    **options: Any,
) -> Artifact:
    """The artifact of one compile under a root folder: the one that is there, else made now."""
    folder = root / folder_name(model, precision, batch, kernels)
    if not (folder / MANIFEST).is_file():
        clip_ttrt.compile(
            progress=Progress(), model=model, weights=weights, precision=precision, batch=batch,
            kernels=kernels, output=folder, **options,
        )  # fmt: skip
    return read_artifact(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["demo", "ViT-B/32", "ViT-L/14"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp16"])
    parser.add_argument("--batch", default="1:32:256")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["auto"])
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--weights", default="random", help="of all models but demo")
    parser.add_argument("--out", type=Path, default=Path("results/accuracy.csv"))
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="keep and reuse them there")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for model, precision, kernels in itertools.product(
            options.models, options.precisions, options.kernels
        ):
            root = options.artifacts or Path(temporary)
            folder = root.resolve() / folder_name(model, precision, options.batch, kernels)
            code = compile_in_process(
                folder, model=model, weights="demo" if model == "demo" else options.weights,
                precision=precision, batch=options.batch, kernels=kernels, backend=options.backend,
            )  # fmt: skip
            failed += code != 0
            if (folder / MANIFEST).is_file():
                for row in rows_of(read_artifact(folder)):
                    append_row(options.out, row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
