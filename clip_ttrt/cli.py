"""The command line: `clip-ttrt COMMAND ...`, which is also `python -m clip_ttrt.COMMAND ...`.

Exit codes: 0; 1 for a failed verification; 2 for bad input, which is one sentence.
"""
import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch

import clip_ttrt
from clip_ttrt import build_kernels, classify, info, verify
from clip_ttrt.artifact import Artifact, check_runs_here, read_artifact
from clip_ttrt.checkpoint import reload_checkpoint
from clip_ttrt.errors import UserError, VerificationError
from clip_ttrt.options import Options
from clip_ttrt.progress import Progress

VERIFICATION_FAILED = 1
BAD_INPUT = 2


def main(arguments: Optional[list[str]] = None) -> int:
    """Run a command with the process's arguments, or others, and return its exit code.

    What is neither bad input nor a failed verification is a defect of ours: it keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["build-kernels"]:
            return build_kernels.main(arguments[1:])
        options = vars(parser().parse_args(arguments))
        return options.pop("run")(**options)
    except VerificationError as problem:
        return fail(problem, VERIFICATION_FAILED)
    except UserError as problem:
        return fail(problem)
    except torch.cuda.OutOfMemoryError:
        return fail("out of GPU memory; use a smaller batch or free the GPU")
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written")


def fail(message: object, code: int = BAD_INPUT) -> int:
    """Print one sentence to standard error; returns the code."""
    print(f"clip_ttrt: {message}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Arguments that do not parse are bad input like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    """All commands and their options; those of `compile` are the fields of `Options`."""
    top = Parser(prog="clip-ttrt", description="CLIP's encoders, compiled with Torch-TensorRT.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, about):
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("compile", run_compile, "compile CLIP's encoders into TorchScript modules")
    for each in fields(Options):
        about = dict(each.metadata)
        flag = about.pop("flag", f"--{each.name.replace('_', '-')}")
        if "choices" in about:  # which `Options` checks
            about["metavar"] = "|".join(about.pop("choices"))
        add(flag, dest=each.name, default=each.default, **about)

    add = command("verify", run_verify, "compare an artifact with the original model in fp32")
    add("folder", type=Path, metavar="DIR", help="the artifact")
    add("--json", dest="figures", type=Path, metavar="FILE", help="write the figures as JSON, too")
    add("--weights", metavar="FILE", help="where the weights are, if their file has moved")
    add("--trust-weights", action="store_true",
        help="read --weights even if it is a pickle, which can run code")

    add = command("classify", run_classify, "zero-shot classification of one picture")
    add("folder", type=Path, metavar="DIR", help="the artifact")
    add("--image", type=Path, required=True, metavar="FILE",
        help="a picture in any format that Pillow reads")
    add("--labels", nargs="+", required=True, metavar="TEXT|FILE",
        help="the texts to choose from, or one file that holds a text in each line")
    add("--force", action="store_true", help="use an artifact that failed its verification")

    add = command("info", run_info, "tell what this machine has and what a compile would use, "
                                    "and why not something better")
    add("--json", dest="as_json", action="store_true", help="for programs")

    command("build-kernels", None, "build the fused kernels: see clip-ttrt build-kernels --help")
    return top


def run_compile(**options: Any) -> int:
    try:
        print(summary(clip_ttrt.compile(progress=Progress(), **options)))
    except VerificationError:
        print(summary(read_artifact(Options(**options).folder)))
        raise
    return 0


def summary(artifact: Artifact) -> str:
    """A row for each encoder: size, build time, error, cosine, milliseconds."""
    manifest, verification = artifact.manifest, artifact.manifest["verification"]
    lines = [f"{'encoder':8} {'MiB':>10} {'build s':>8} {'rel. error':>10} {'min. cosine':>11} "
             f"{'ms':>9} {'batch':>5}"]
    for encoder, module in manifest["modules"].items():
        line = f"{encoder:8} {module['mib']:10.1f} {module['build_seconds']:8.1f}"
        if verification:
            error, speed = verification["errors"][encoder], verification["speed"][encoder]
            line += (f" {error['rel_mean']:10.1e} {error['cos_min']:11.7f} {speed['ms']:9.3f} "
                     f"{speed['batch']:5d}")
        lines.append(line)
    if verification and "top1" in verification:
        lines.append(top1(verification))
    state = {None: "not verified", True: "verified", False: "UNVERIFIED"}[artifact.verified]
    return "\n".join([*lines, f"wrote {artifact.folder} ({state})"])


def top1(report: dict[str, Any]) -> str:
    return ("zero-shot top-1: original {reference:.2f} %, compiled {compiled:.2f} %, "
            "agreement {agreement:.2f} %").format(**report["top1"])


def run_verify(
    folder: Path, figures: Optional[Path], weights: Optional[str], trust_weights: bool
) -> int:
    artifact = read_artifact(folder)
    check_runs_here(artifact)
    model, origin = artifact.manifest["model"], artifact.origin
    report = verify.compare(artifact, reload_checkpoint(model, origin, weights, trust_weights))
    print(f"inputs: {report['inputs']}; {report['weights']}")
    keys = [key for key in next(iter(report["errors"].values())) if key != "rows"]
    print(" " * 8, *(f"{key:>10}" for key in keys))
    for name, row in report["errors"].items():
        print(f"{name:8}", *(f"{row[key]:10.{'7f' if 'cos' in key else '2e'}}" for key in keys))
    if "top1" in report:
        print(top1(report))
    print("\n".join(f"FAILED: {failure}" for failure in report["failures"]) or "passed")
    if figures:
        try:
            figures.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as problem:
            raise UserError(f"{figures} cannot be written: {problem.strerror}") from problem
    return 0 if report["passed"] else VERIFICATION_FAILED


def run_classify(folder: Path, image: Path, labels: list[str], force: bool) -> int:
    labels = classify.read_labels(labels)
    probabilities = classify.classify(folder, image, labels, force)
    if unknown := classify.unknown_words(read_artifact(folder), labels):
        fail(f"the embedded model was never trained on {', '.join(unknown)}: its answer for labels "
             "with these words means nothing")
    for probability, label in sorted(zip(probabilities.tolist(), labels), reverse=True):
        print(f"{probability:7.2%}  {label}")
    return 0


def run_info(as_json: bool) -> int:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if as_json else info.text(facts))
    return 0
