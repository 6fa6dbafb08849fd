"""The command line: `clip-ttrt COMMAND ...`, which is also `python -m clip_ttrt COMMAND ...`.

Exit codes: 0; 1 for a failed verification; 2 for bad input, which is one sentence; 3 where more
rows were bad than `embed` may take.
"""
import argparse
import contextlib
import csv
import json
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

import torch

import clip_ttrt
from clip_ttrt import build_kernels, info, verify, zeroshot
from clip_ttrt.artifact import check_runs_here, read_artifact
from clip_ttrt.checkpoint import reload_checkpoint
from clip_ttrt.errors import UserError, VerificationError
from clip_ttrt.options import EmbedOptions, EvaluateOptions, Options, ProbeOptions
from clip_ttrt.progress import Progress


def main(arguments: Optional[list[str]] = None) -> int:
    """Run a command, by default the process's; returns its exit code.  Defects of ours raise."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["build-kernels"]:
            return build_kernels.main(arguments[1:])
        options = vars(parser().parse_args(arguments))
        return options.pop("run")(**options)
    except (VerificationError, UserError, OSError) as problem:
        code, message = 1 if isinstance(problem, VerificationError) else 2, str(problem)
    except torch.cuda.OutOfMemoryError:
        code, message = 2, "out of GPU memory; use a smaller batch or free the GPU"
    except KeyboardInterrupt as stopped:
        code, message = 2, str(stopped) or "interrupted; nothing was written"
    print(f"clip_ttrt: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All commands and their options; those of `compile` are the fields of `Options`."""
    top = argparse.ArgumentParser("clip-ttrt", description="CLIP, compiled with Torch-TensorRT.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, about, among=commands):
        added = among.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("compile", run_compile, "compile CLIP's encoders into TorchScript modules")
    add_fields(add, Options)

    add = command("embed", run_embed, "embed files: pictures, frames or texts, to features")
    add("artifact", type=Path, metavar="DIR", help="the artifact")
    add("inputs", nargs="+", metavar="INPUT",
        help="folders, globs, lists (.txt, .csv), .tar, .parquet, videos; local or URLs")
    add("--output", required=True, metavar="OUT", help="a folder, in clip-retrieval's layout")
    add_fields(add, EmbedOptions)

    add = command("verify", run_verify, "compare an artifact with the original model in fp32")
    add("folder", type=Path, metavar="DIR", help="the artifact")
    add("--json", dest="figures", type=Path, metavar="FILE", help="write the figures as JSON, too")
    add("--weights", metavar="FILE", help="where the weights are, if their file has moved")
    add("--trust-weights", action="store_true", help="read even a pickle, which can run code")

    add = command("classify", run_classify, "zero-shot classification of pictures and frames")
    add("artifact", type=Path, metavar="DIR", help="the artifact")
    add("inputs", nargs="+", metavar="INPUT", help="as of embed")
    add("--labels", nargs="+", required=True, metavar="TEXT|FILE", help="the texts to choose from, "
        "or one file that holds a text in each line, or imagenet for open_clip's")
    add("--multi", action="store_true", help="independent scores, not probabilities of one choice")
    add("--top", type=int, default=5, metavar="N", help="labels to tell (default %(default)s)")
    add("--json", dest="as_json", action="store_true", help="an object a line, for programs")
    add("--csv", dest="as_csv", action="store_true", help="a table of a row for each label")
    add_fields(add, EvaluateOptions, ("templates",))
    add_fields(add, EmbedOptions, ("every", "column", "batch", "decode", "gpus", "force"))

    add = command("evaluate", run_evaluate, "zero-shot accuracy, or recall of captions, of an "
                  "artifact and of the original model in fp32 on the same pictures")
    add("artifact", type=Path, metavar="DIR", help="the artifact")
    add("--dataset", required=True, metavar="FOLDER|TABLE|NAME", help="a folder with a folder a "
        "class, a table of paths and labels or captions, or with --root torchvision's NAME")
    add_fields(add, EvaluateOptions)
    add("--json", dest="as_json", action="store_true", help="for programs")

    add = command("probe", run_probe, "a linear probe: logistic regression on features, as CLIP's "
                  "paper has it; of several artifacts it compares them")
    add("artifacts", nargs="+", type=Path, metavar="DIR", help="the artifacts")
    for part in ("train", "test"):
        add(f"--{part}", required=True, metavar="FOLDER|TABLE",
            help="a folder with a folder a class, or a table with a column of labels")
    add_fields(add, ProbeOptions)
    add("--json", dest="as_json", action="store_true", help="for programs")

    about = "find pictures, and moments of videos, by texts and pictures"
    searches = commands.add_parser("search", help=about, description=about).add_subparsers(
        metavar="index|query|serve", required=True)

    def search(name, run, about):
        add = command(name, run, about, searches)
        add("library", metavar="LIBRARY", help="its folder")
        add("--artifact", type=Path, metavar="DIR", help="of a new library; or another for index, "
            "which encodes all anew; or where the library's own is by now")
        return add

    add = search("index", run_search_index, "bring a library up to date with folders")
    add("folders", nargs="+", metavar="FOLDER", help="of pictures and videos")
    add_fields(add, EmbedOptions, ("every", "decode", "gpus"))
    for name, help in (("scenes", "of a new video one frame a scene, not one every so often"),
                       ("approximate", "build an approximate index, for some millions of items and "
                        "more, and measure its recall; the next run drops it")):
        add(f"--{name}", action="store_true", help=help)
    add = search("query", run_search_query, "the files most similar to a query")
    add("query", metavar="QUERY", help="a text, a picture, or a sum of some: "
        "'cat + 0.5*\"black - white\" - dog.jpg'")
    add("--top", type=int, default=20, metavar="N", help="files (default %(default)s)")
    add("--json", dest="as_json", action="store_true", help="for programs")
    add = search("serve", run_search_serve, "a page for browsers on this machine")
    add("--port", type=int, default=8080, help="default %(default)s; 0: a free one")

    add = command("info", run_info, "tell what this machine has and what a compile would use")
    add("--json", dest="as_json", action="store_true", help="for programs")

    command("build-kernels", None, "build the fused kernels: see clip-ttrt build-kernels --help")
    return top


def add_fields(add, options: type, names: Optional[tuple[str, ...]] = None) -> None:
    """An option for each field of a dataclass of options, or for those of these names."""
    for each in fields(options):
        if names and each.name not in names:
            continue
        default, values = each.default, each.metadata["values"]
        about = each.metadata["help"].replace("%", "%%")
        if isinstance(default, bool):
            more = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = values if isinstance(values, str) else "|".join(values)
            types = {int: int, Optional[int]: int, float: number, Optional[float]: float}
            more = {"metavar": metavar, "type": types.get(each.type, str)}
            about += "" if default is None else " (default %(default)s)"
        if each.name == "ray":
            more |= {"nargs": "?", "const": "auto"}
        if each.name in ("calibrate", "labels", "templates"):
            more |= {"nargs": "+"}
        add(f"--{each.name.replace('_', '-')}", default=default, help=about, **more)


def number(text: str) -> float:
    """Of seconds or a share: 0.5, 0.5s or 50%."""
    return float(text.rstrip("s%")) * (0.01 if text.endswith("%") else 1)


def run_compile(**options: Any) -> int:
    artifact = clip_ttrt.compile(progress=Progress(), **options)
    if artifact.verified:
        show(artifact.manifest["verification"])
    print(f"wrote {artifact.folder} ({'verified' if artifact.verified else 'not verified'})")
    return 0


@contextlib.contextmanager
def sigterm_as_ctrl_c():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_embed(artifact: Path, inputs: list[str], output: str, **options: Any) -> int:
    from clip_ttrt.pipeline.embed import embed

    with sigterm_as_ctrl_c():
        summary = embed(artifact, inputs, output, **options)
    print(f"clip_ttrt: {output} holds {summary['total_images']:,} features; "
          f"{summary['total_bad']:,} bad rows", file=sys.stderr)
    print(json.dumps(summary, indent=2))
    return 3 if summary["bad_share"] > options["max_bad"] else 0


def run_verify(folder: Path, figures: Path, weights: Optional[str], trust_weights: bool) -> int:
    artifact = read_artifact(folder)
    check_runs_here(artifact)
    model, origin = artifact.manifest["model"], artifact.origin
    report = verify.compare(artifact, reload_checkpoint(model, origin, weights, trust_weights))
    show(report)
    if figures:
        figures.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["passed"] else 1


def run_classify(artifact: Path, inputs: list[str], as_json: bool, as_csv: bool,
                 **options: Any) -> int:
    table = csv.writer(sys.stdout)
    if as_csv:
        table.writerow(["image_path", "time", "rank", "label", "score", "error"])
    for row in zeroshot.classify(artifact, inputs, **options):
        path = row["image_path"].encode(errors="backslashreplace").decode()
        pairs, time = row.get("labels", ()), row.get("time")
        if as_json:
            print(json.dumps(row, default=str))
        elif as_csv:
            table.writerows([path, time, rank, each["label"], each["score"], None]
                            for rank, each in enumerate(pairs, 1))
            if not pairs:
                table.writerow([path, time, None, None, None, row["error"]])
        else:
            form = "{score:7.4f}  {label}" if options["multi"] else "{score:7.2%}  {label}"
            lines = [form.format(**each) for each in pairs] or [row["error"]]
            print(path if time is None else f"{path} at {time} s", *lines, sep="\n")
    return 0


def run_evaluate(as_json: bool, **options: Any) -> int:
    from clip_ttrt.evaluate import evaluate  # which brings embed

    report = evaluate(**options)
    if as_json:
        print(json.dumps(report, indent=2))
        return 0
    print("{images:,} images ({bad:,} bad), {texts:,} texts".format(**report))
    for side in ("compiled", "original", "difference"):
        for name, (share, low, high) in report.get(side, {}).items():
            print(f"{side:11} {name:18} {share:7.2%}  ({low:.2%} to {high:.2%})")
    return 0


def run_probe(as_json: bool, **options: Any) -> int:
    from clip_ttrt.probe import probe  # which brings embed

    report = probe(**options)
    for each in [] if as_json else report["artifacts"]:
        print("{artifact}: C = {c:.3g}, {classes} classes, {iterations} iterations".format(**each),
              "" if each["converged"] else "which were too few")
        for part in ("train", "test"):
            print("  {part}: {images:,} images ({bad:,} bad)".format(part=part, **each[part]))
        for name in ("top-1", "top-5", "difference"):
            if name in each:
                print(f"  {name:11}", "{:7.2%}  ({:.2%} to {:.2%})".format(*each[name]))
    if as_json:
        print(json.dumps(report, indent=2))
    return 0


def run_search_index(**options: Any) -> int:
    from clip_ttrt.search import index  # which brings torchvision

    with sigterm_as_ctrl_c():
        print(json.dumps(index(**options), indent=2))
    return 0


def run_search_query(library: str, artifact: Path, as_json: bool, **options: Any) -> int:
    from clip_ttrt.search import Library

    found = Library(library, artifact).query(**options)
    for each in [] if as_json else found["results"]:
        parts = [f"{part['start']:.6g}-{part['end']:.6g} s" for part in each.get("segments", ())]
        path = each["path"].encode(errors="backslashreplace").decode()
        print(f"{each['score']:7.4f} {each['z']:+6.2f} sd  {path}  {', '.join(parts)}".rstrip())
    if as_json:
        print(json.dumps(found, indent=2))
    return 0


def run_search_serve(library: str, artifact: Path, port: int) -> int:
    from clip_ttrt.pipeline import sources

    sources.library("starlette", "search"), sources.library("uvicorn", "search")
    from clip_ttrt.search import Library
    from clip_ttrt.search.serve import Server

    server = Server(Library(library, artifact), port)
    print(f"http://127.0.0.1:{server.port}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run([server.socket])
    return 0


def show(report: dict[str, Any]) -> None:
    """Print the report of a verification."""
    print(f"inputs: {report['inputs']}; {report['weights']}; reference: {report['reference']}")
    print(" " * 6, *(f"{key:>10}" for key in next(iter(report["errors"].values()))))
    for name, row in report["errors"].items():
        print(f"{name:6}", *(f"{value:10.{7 if key.startswith('cos') else 4}g}"
                             for key, value in row.items()))
    if report.get("top1"):
        shares = (f"{name} {share:.2f} %" for name, share in report["top1"].items())
        print("zero-shot top-1:", ", ".join(shares))
    print("\n".join(f"FAILED: {failure}" for failure in report["failures"]) or "passed")


def run_info(as_json: bool) -> int:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if as_json else info.text(facts).strip())
    return 0
