"""Runs `clip_features` and Python on the same inputs and compares the features.

    python examples/cpp/compare.py ARTIFACT_DIR BINARY [--device cpu|cuda] [--batch N]

Exit code 0 where they agree to 1e-6 of the features' norm, 1 where they do not, 2 where either cannot run.
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

import clip_ttrt  # its import makes plain torch.jit.load able to read TensorRT engines
from clip_ttrt import kernels
from clip_ttrt.artifact import Artifact, check_runs_here, read_artifact

TOLERANCE = 1e-6  # of the features' norm: same modules, same libraries, same device
CAPTIONS = ("a photo of a cat", "two small red circles on a blue background", "a diagram", "", "a horse, jumping over a fence " * 3)
INPUT = {"image": "images", "text": "tokens"}


def make_inputs(artifact: Artifact, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of the artifact's encoders: images float32 [batch, 3, R, R], random, and tokens int32 [batch, 77]."""
    resolution = artifact.dimensions.image_resolution
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    inputs = {
        "images": torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed)),
        "tokens": clip.tokenize(captions, artifact.dimensions.context_length).int(),
    }
    return {INPUT[encoder]: inputs[INPUT[encoder]] for encoder in artifact.encoders}


def package(name: str) -> Path:
    """An installed package's folder, without importing it."""
    return Path(find_spec(name).submodule_search_locations[0])


def library_path() -> str:
    """LD_LIBRARY_PATH for the binary: this environment's libtorch, and the TensorRT that this process has loaded.

    libtorch finds the CUDA libraries by itself, relative to its own place.
    """
    folders = [package("torch") / "lib"]
    if find_spec("torch_tensorrt"):
        folders.append(package("torch_tensorrt") / "lib")
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    folders += sorted({Path(line.split()[-1]).parent for line in mapped if "/libnvinfer" in line or "/libtensorrt_rtx" in line})
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return ":".join([str(folder) for folder in folders if folder.is_dir()] + ([inherited] if inherited else []))


def load_runtime(artifact: Artifact) -> None:
    """TensorRT's runtime, for an artifact with engines."""
    if artifact.manifest["backend"] != "torchscript":
        from clip_ttrt import trt

        trt.load_runtime(artifact.manifest["backend"])


def run_binary(binary: Path, artifact: Artifact, inputs: Path, output: Path, device: str) -> subprocess.CompletedProcess:
    """Run the C++ program on a file of inputs; its text and exit code, whatever that is."""
    load_runtime(artifact)  # where library_path looks for TensorRT
    command = [str(binary), str(artifact.folder), str(inputs), str(output), "--device", device]
    if artifact.manifest["backend"] != "torchscript":
        command += ["--runtime", str(package("torch_tensorrt") / "lib" / "libtorchtrt_runtime.so")]
    if artifact.manifest["kernels_version"] is not None:
        command += ["--plugin", str(kernels.find().path)]
    # Sums are split by threads: as many there as here.
    environment = {**os.environ, "LD_LIBRARY_PATH": library_path(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def python_features(artifact: Artifact, inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """The same modules through plain torch.jit.load: encoder -> features float32 [batch, embed_dim] on the CPU."""
    load_runtime(artifact)
    kernels.load(artifact.manifest["kernels_version"])
    features = {}
    for encoder in artifact.encoders:
        module = torch.jit.load(str(artifact.path(encoder)), map_location=device).eval()
        with torch.no_grad():
            features[encoder] = module(inputs[INPUT[encoder]].to(device)).cpu()
    return features


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of any row, as a part of that row's norm; infinite for another shape or NaN."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    return ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).nan_to_num(nan=float("inf")).max().item()


def compare(artifact: Artifact, binary: Path, device: str, batch: Optional[int] = None) -> dict[str, float]:
    """Features from C++ against Python's: encoder -> largest relative error; 0 where equal bit for bit.

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
        theirs = torch.load(output, weights_only=False)  # a pickle, but one just written by our own program
    ours = python_features(artifact, inputs, device)
    return {encoder: relative_error(theirs[encoder], ours[encoder]) for encoder in artifact.encoders}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="folder written by python -m clip_ttrt.compile")
    parser.add_argument("binary", type=Path, help="the built clip_features")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the one the artifact was compiled for")
    parser.add_argument("--batch", type=int, help="default: the one the artifact is tuned for")
    options = parser.parse_args()
    try:
        artifact = read_artifact(options.artifact)
        check_runs_here(artifact, options.device)
        errors = compare(artifact, options.binary.resolve(), artifact.device, options.batch)
    except (clip_ttrt.UserError, RuntimeError, OSError) as problem:
        print(f"compare: {problem}", file=sys.stderr)
        return 2
    for encoder, error in errors.items():
        print(f"{encoder}: C++ and Python are {'equal bit for bit' if error == 0 else f'{error:.2e} of the norm apart'}")
    return 0 if max(errors.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
