"""python -m clip_ttrt.verify DIR [--json FILE]: an artifact against the original `clip` model in fp32."""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Optional

from clip_ttrt.accuracy import compare
from clip_ttrt.artifact import check_runs_here, read_artifact
from clip_ttrt.checkpoint import reload_checkpoint
from clip_ttrt.shell import run


def table(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"inputs: {report['inputs']}; {report['weights']}",
             f"{'':8} {'abs max':>9} {'mean':>9} {'median':>9} {'rel max':>9} {'mean':>9} {'median':>9} {'cos min':>10} {'mean':>10}"]
    for name, row in report["errors"].items():
        figures = " ".join(f"{row[key]:9.2e}" for key in ("abs_max", "abs_mean", "abs_median", "rel_max", "rel_mean", "rel_median"))
        lines.append(f"{name:8} {figures} {row['cos_min']:10.7f} {row['cos_mean']:10.7f}")
    if "top1" in report:
        top1 = report["top1"]
        lines.append(f"zero-shot top-1: original {top1['reference']:.2f} %, compiled {top1['compiled']:.2f} %, agreement {top1['agreement']:.2f} %")
    lines += [f"FAILED: {failure}" for failure in report["failures"]] or ["passed"]
    return "\n".join(lines)


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clip_ttrt.verify", description="Compare a compiled artifact with the original clip model in fp32.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the artifact")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--weights", metavar="FILE", help="where the weights are now, if they were a file that has moved")
    parser.add_argument("--trust-weights", action="store_true", help="read --weights even if it is a pickle, which can run code")
    options = parser.parse_args(arguments)
    artifact = read_artifact(options.folder)
    check_runs_here(artifact)
    checkpoint = reload_checkpoint(artifact.manifest["model"], artifact.origin, options.weights, options.trust_weights)
    report = compare(artifact, checkpoint)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(run(main))
