"""python -m clip_ttrt.compile: a thin shell over `clip_ttrt.compile`."""
import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Optional

from clip_ttrt.artifact import Artifact
from clip_ttrt.models import MODELS
from clip_ttrt.options import BACKENDS, ENCODER_CHOICES, KERNELS, PRECISIONS, BatchRange, Options
from clip_ttrt.engine import compile_with
from clip_ttrt.progress import Progress
from clip_ttrt.shell import VERIFICATION_FAILED, fail, run

DEFAULTS = {field.name: field.default for field in fields(Options)}


def parser() -> argparse.ArgumentParser:
    """The command's options; every default is `Options`'."""
    top = argparse.ArgumentParser(prog="python -m clip_ttrt.compile", description="Compile CLIP's encoders into TorchScript modules.")
    top.add_argument("--model", metavar="NAME", help=f"{', '.join(MODELS)} (default {DEFAULTS['model']})")
    top.add_argument("--weights", metavar="demo|openai|random|FILE", help="default: demo for the demo model, openai for OpenAI's")
    top.add_argument("--precision", metavar="|".join(PRECISIONS), help=f"default {DEFAULTS['precision']}")
    top.add_argument("--batch", metavar="N|MIN:OPT:MAX", type=str, help=f"default {DEFAULTS['batch']}")
    top.add_argument("--encoder", metavar="|".join(ENCODER_CHOICES), help=f"default {DEFAULTS['encoder']}")
    top.add_argument("--backend", metavar="|".join(BACKENDS), help="auto: the best that runs here, and it says why")
    top.add_argument("--kernels", metavar="|".join(KERNELS), help="fused: our plugins; tensorrt: TensorRT's own; auto: fused wherever they can run")
    top.add_argument("--optimization-level", metavar="0..5", type=int, help="of TensorRT's builder (default 3): lower builds faster, the engine may be slower")
    top.add_argument("--timing-cache", metavar="PATH|none", help="where TensorRT's kernel timings are kept (default: a file per GPU and TensorRT in the user's cache)")
    top.add_argument("--output", metavar="DIR", type=Path, help="the artifact's folder (default artifacts/MODEL-PRECISION)")
    top.add_argument("--no-verify", dest="verify", action="store_false", help="skip the comparison with the original model")
    top.add_argument("--force", action="store_true", help="replace an existing artifact")
    top.add_argument("--trust-weights", action="store_true", help="read a pickle that is not OpenAI's; it can run code")
    top.add_argument("--seed", metavar="N", type=int, help="for --weights random (default 0)")
    top.set_defaults(**DEFAULTS)
    return top


def summary(artifact: Artifact) -> str:
    """The closing table: encoder, size, build time, error, cosine, milliseconds."""
    manifest, verification = artifact.manifest, artifact.manifest["verification"]
    size = "module MiB" if manifest["backend"] == "torchscript" else "engine MiB"
    lines = [f"{'encoder':8} {size:>10} {'build s':>8} {'rel. error':>10} {'min. cosine':>11} {'ms':>9} {'batch':>5}"]
    for encoder, module in manifest["modules"].items():
        line = f"{encoder:8} {module.get('engine_mib', module['mib']):10.1f} {module['build_seconds']:8.1f}"
        if verification:
            error, speed = verification["errors"][encoder], verification["speed"][encoder]
            line += f" {error['rel_mean']:10.1e} {error['cos_min']:11.7f} {speed['ms']:9.3f} {speed['batch']:5d}"
        lines.append(line)
    if verification and "top1" in verification:
        top1 = verification["top1"]
        lines.append(f"zero-shot top-1: original {top1['reference']:.2f} %, compiled {top1['compiled']:.2f} %")
    return "\n".join(lines)


def main(arguments: Optional[list[str]] = None) -> int:
    given = vars(parser().parse_args(arguments))
    options = Options(**{**given, "batch": BatchRange.parse(given["batch"])})
    artifact = compile_with(options, Progress())
    print(summary(artifact))
    print(f"wrote {artifact.folder} ({'not verified' if artifact.verified is None else 'verified' if artifact.verified else 'UNVERIFIED'})")
    if artifact.verified is False:
        return fail(f"verification failed: {'; '.join(artifact.manifest['verification']['failures'])}", VERIFICATION_FAILED)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
