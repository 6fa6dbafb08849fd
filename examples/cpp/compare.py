"""Runs `clip_features` and Python on the same inputs and compares the features.

    python examples/cpp/compare.py ARTIFACT_DIR BINARY [--device cpu|cuda] [--batch N]

Exit code 0 where they agree to 1e-6 of the features' norm, 1 where not, 2 where either cannot run.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import clip
import torch

import clip_ttrt
from clip_ttrt import kernels
from clip_ttrt.artifact import Artifact, check_runs_here, load_modules, read_artifact

TOLERANCE = 1e-6  # of the features' norm: same modules, same libraries, same device
CAPTIONS = ("a photo of a cat", "two small red circles on a blue background", "a diagram", "",
            "a horse, jumping over a fence " * 3)
INPUT = {"image": "images", "text": "tokens"}
Tensors = dict[str, torch.Tensor]


def make_inputs(artifact: Artifact, batch: int, seed: int = 0) -> Tensors:
    """Images float32 [batch, 3, R, R], random, and tokens int32 [batch, 77], if it encodes them."""
    dims, generator = artifact.dimensions, torch.Generator().manual_seed(seed)
    shape = batch, 3, dims.image_resolution, dims.image_resolution
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    inputs = {"images": torch.randn(shape, generator=generator),
              "tokens": clip.tokenize(captions, dims.context_length).int()}
    return {INPUT[encoder]: inputs[INPUT[encoder]] for encoder in artifact.encoders}


def package(name: str) -> Path:
    """An installed package's folder, without importing it."""
    return Path(find_spec(name).submodule_search_locations[0])


def library_path() -> str:
    """LD_LIBRARY_PATH for the binary: this environment's libtorch, and this process's TensorRT.

    libtorch finds the CUDA libraries by itself, relative to its own place.
    """
    folders = [str(package("torch") / "lib")]
    if find_spec("torch_tensorrt"):
        folders.append(str(package("torch_tensorrt") / "lib"))
    maps = Path("/proc/self/maps")
    files = [line.split()[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
    folders += sorted({os.path.dirname(file) for file in files
                       if "/libnvinfer" in file or "/libtensorrt_rtx" in file})
    return ":".join(filter(None, [*folders, os.environ.get("LD_LIBRARY_PATH")]))


def run_binary(binary: Path, artifact: Artifact, inputs: Path, output: Path,
               device: str) -> subprocess.CompletedProcess:
    """Run the C++ program on a file of inputs; its text and exit code, whatever that is."""
    command = [str(binary), str(artifact.folder), str(inputs), str(output), "--device", device]
    if artifact.manifest["backend"] != "torchscript":
        from clip_ttrt import trt

        trt.load_runtime(artifact.manifest["backend"])  # where library_path looks for TensorRT
        runtime = package("torch_tensorrt") / "lib" / "libtorchtrt_runtime.so"
        command += ["--runtime", str(runtime)]
    if artifact.manifest["kernels_version"] is not None:
        command += ["--plugin", str(kernels.find().path)]
    # Sums are split by threads: as many there as here.
    environment = {**os.environ, "LD_LIBRARY_PATH": library_path(),
                   "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def python_features(artifact: Artifact, inputs: Tensors, device: str) -> Tensors:
    """The same modules in Python: encoder -> features float32 [batch, embed_dim] on the CPU."""
    with torch.no_grad():
        return {encoder: module(inputs[INPUT[encoder]].to(device)).cpu()
                for encoder, module in load_modules(artifact).items()}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of a row, as a part of its norm; infinite for another shape or NaN."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    errors = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    return errors.nan_to_num(nan=float("inf")).max().item()


def compare(artifact: Artifact, binary: Path, device: str,
            batch: Optional[int] = None) -> dict[str, float]:
    """C++ against Python: encoder -> largest relative error, 0 where equal bit for bit.

    batch: by default the one the artifact is tuned for.
    Raises RuntimeError with the program's sentence where it fails.
    """
    inputs = make_inputs(artifact, batch or artifact.batch.optimal)
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "inputs.pt", Path(scratch) / "output.pt"
        torch.save(inputs, source)
        result = run_binary(binary, artifact, source, output, device)
        if result.returncode != 0:
            raise RuntimeError(f"{binary} ended with {result.returncode}: {result.stderr.strip()}")
        print(result.stdout, end="")
        theirs = torch.load(output, weights_only=False)  # a pickle of our own program's
    ours = python_features(artifact, inputs, device)
    return {encoder: relative_error(theirs[encoder], ours[encoder]) for encoder in ours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("artifact", type=Path, help="folder written by python -m clip_ttrt.compile")
    add("binary", type=Path, help="the built clip_features")
    add("--device", choices=("cpu", "cuda"), help="default: what the artifact was compiled for")
    add("--batch", type=int, help="default: the one the artifact is tuned for")
    options = parser.parse_args()
    try:
        artifact = read_artifact(options.artifact)
        check_runs_here(artifact, options.device)
        errors = compare(artifact, options.binary.resolve(), artifact.device, options.batch)
    except (clip_ttrt.UserError, RuntimeError, OSError) as problem:
        print(f"compare: {problem}", file=sys.stderr)
        return 2
    for encoder, error in errors.items():
        apart = "equal bit for bit" if error == 0 else f"{error:.2e} of the norm apart"
        print(f"{encoder}: C++ and Python are {apart}")
    return 0 if max(errors.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
