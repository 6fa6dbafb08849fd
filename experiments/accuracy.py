"""Errors of compiled encoders against the original model, a row each: results/accuracy.csv

    python -m experiments.accuracy --models demo ViT-B/32 --precisions fp16 bf16

Each model, precision and batch is compiled and verified in a process of its own, so that a crash
costs its rows and not the run.  OpenAI's models get random weights unless `--weights` says
otherwise; the column `weights` tells.  `top1` is of the embedded pictures and captions, in percent,
on the rows `logits`.
"""
import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_ttrt.artifact import MANIFEST, Artifact, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.options import BACKENDS, KERNELS, PRECISIONS
from experiments.record import ROOT, append_row, provenance

ERRORS = ("cos_min", "cos_mean", "rel_mean", "abs_max")


def rows_of(artifact: Artifact) -> Iterator[dict[str, Any]]:
    """The CSV rows of a verified artifact.  Raises UserError where it was never verified."""
    manifest, report = artifact.manifest, artifact.manifest["verification"]
    if report is None:
        raise UserError(f"{artifact.folder} was never verified; compile it without --no-verify")
    for name, figures in report["errors"].items():
        top1 = report.get("top1", {}) if name == "logits" else {}
        yield {
            "model": manifest["model"],
            "encoder": name,
            "precision": manifest["precision"],
            "backend": manifest["backend"],
            "kernels": manifest["kernels"] or "",
            "batch": str(artifact.batch),
            "weights": artifact.origin.kind,
            **{key: f"{figures[key]:.8g}" for key in ERRORS},
            "top1_original": f"{top1['reference']:.4f}" if top1 else "",
            "top1_compiled": f"{top1['compiled']:.4f}" if top1 else "",
            **provenance(manifest["versions"], manifest["gpu"].get("name", "")),
        }


def compile_in_process(root: Path, *flags: str, **options: str) -> tuple[int, Path]:
    """Compile into a folder under a root, in a process, what is not there yet: exit code, folder.

    options: those of `clip_ttrt.compile` that tell one artifact from another.
    """
    folder = root / "-".join(options.values()).replace("/", "-").replace(":", "_")
    if (folder / MANIFEST).is_file():
        return 0, folder
    told = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "clip_ttrt.compile", *told, *flags, "--output", str(folder)]
    code = subprocess.run(command, check=False, stdout=sys.stderr, cwd=ROOT).returncode
    return code, folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["demo", "ViT-B/32", "ViT-L/14"])
    add("--precisions", nargs="+", choices=PRECISIONS, default=["fp16"])
    add("--batch", default="1:32:256", help="N or MIN:OPT:MAX")
    add("--kernels", nargs="+", choices=KERNELS, default=["auto"])
    add("--backend", choices=BACKENDS, default="auto")
    add("--weights", default="random", help="of all models but demo")
    add("--out", type=Path, default=Path("results/accuracy.csv"))
    add("--artifacts", type=Path, metavar="DIR", help="keep and reuse them there")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.artifacts or Path(temporary)).resolve()
        cases = itertools.product(options.models, options.precisions, options.kernels)
        for model, precision, kernels in cases:
            code, folder = compile_in_process(
                root, model=model, weights="demo" if model == "demo" else options.weights,
                precision=precision, batch=options.batch, kernels=kernels, backend=options.backend,
            )  # fmt: skip
            failed += code != 0
            if (folder / MANIFEST).is_file():
                for row in rows_of(read_artifact(folder)):
                    append_row(options.out, row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
