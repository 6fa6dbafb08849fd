"""The folder that `compile` writes and `load` reads: modules, manifest, and the checks between them."""
import ctypes
import json
import os
import secrets
import shlex
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Optional, Union

import torch

from clip_ttrt import deprecations, kernels, linear, stack, trt
from clip_ttrt.checkpoint import Origin, sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.models import Dimensions
from clip_ttrt.options import BatchRange

FORMAT = 3
MANIFEST = "manifest.json"

# Backend -> what its engines are bound to: Torch-TensorRT by its minor version, TensorRT by the whole.
ENGINE_VERSIONS = {"tensorrt": ("torch-tensorrt", "tensorrt"), "rtx": ("torch-tensorrt-rtx", "tensorrt-rtx")}


@dataclass(frozen=True)
class Artifact:
    """An artifact folder and its manifest, as read or just written."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions(**self.manifest["dimensions"])

    @property
    def batch(self) -> BatchRange:
        return BatchRange(**self.manifest["batch"])

    @property
    def origin(self) -> Origin:
        return Origin(**self.manifest["weights"])

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(self.manifest["modules"])

    @property
    def device(self) -> str:
        """`cuda` or `cpu`: where the modules run."""
        return self.manifest["device"]

    @property
    def verified(self) -> Optional[bool]:
        """Whether verification passed; None where it was not run."""
        verification = self.manifest["verification"]
        return None if verification is None else verification["passed"]

    def path(self, encoder: str) -> Path:
        return self.folder / self.manifest["modules"][encoder]["file"]


def read_artifact(folder: Union[str, Path]) -> Artifact:
    """Read an artifact's manifest.

    Raises UserError where there is none, it is damaged, or its format is unknown.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not an artifact: it holds no {MANIFEST}; write one with python -m clip_ttrt.compile --output {folder}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is damaged: {problem!r}; compile again") from problem
    if version != FORMAT:
        raise UserError(f"{path} has format {version!r}, and this version of clip_ttrt reads format {FORMAT}; compile again")
    artifact = Artifact(folder, manifest)
    try:
        artifact.dimensions, artifact.batch, artifact.origin, artifact.encoders, artifact.device, artifact.verified
        manifest["model"], manifest["precision"], manifest["backend"], manifest["logit_scale"], manifest["kernels"], manifest["kernels_version"]
        if manifest["backend"] != "torchscript":
            manifest["gpu"]["name"], manifest["gpu"]["compute_capability"]
            [manifest["versions"][name] for name in ENGINE_VERSIONS[manifest["backend"]]]
        for module in manifest["modules"].values():
            module["file"], module["sha256"]
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} is damaged: {problem!r}; compile again") from problem
    return artifact


def check_runs_here(artifact: Artifact, device: Optional[str] = None) -> None:
    """Whether this machine can run the artifact, found out before any engine is touched.

    Raises UserError naming what differs: the device, the TensorRT packages or their version, the
    GPU's architecture.
    """
    manifest = artifact.manifest
    if device is not None and torch.device(device).type != artifact.device:
        raise UserError(f"{artifact.folder} was compiled for {artifact.device}, not {device}; load it with device={artifact.device!r} or compile again")
    if artifact.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{artifact.folder} was compiled for {manifest['gpu'].get('name', 'a GPU')}, and no CUDA GPU answers here; compile again for this machine")
    if manifest["backend"] == "torchscript":
        return
    again = f"compile it anew: {recompile_command(artifact)}"
    installed, wrapper, tensorrt = stack.versions(), *ENGINE_VERSIONS[manifest["backend"]]
    if missing := [name for name in (wrapper, tensorrt) if name not in installed]:
        raise UserError(f"{artifact.folder} holds engines of {manifest['backend']}, and not installed here: {', '.join(missing)}; install them, or {again}")
    here, there = stack.gpu()["compute_capability"], manifest["gpu"]["compute_capability"]
    if here != there:
        raise UserError(f"{artifact.folder} was compiled for compute capability {there} ({manifest['gpu']['name']}), and this GPU has {here}; {again}")
    for name, part in ((wrapper, stack.minor), (tensorrt, str)):
        mine, theirs = installed[name], manifest["versions"][name]
        if part(mine) != part(theirs):
            raise UserError(f"{artifact.folder} was compiled with {name} {theirs}, and {mine} is installed; {again}")
    if manifest["kernels_version"] is not None and manifest["kernels_version"] != kernels.version():
        raise UserError(f"{artifact.folder} was compiled with kernels {manifest['kernels_version']}, and these are {kernels.version()}; {again}")


def recompile_command(artifact: Artifact) -> str:
    """The command that compiles an artifact of the same model and options in its place."""
    manifest, origin = artifact.manifest, artifact.origin
    encoders = artifact.encoders[0] if len(artifact.encoders) == 1 else "both"
    words = ["python", "-m", "clip_ttrt.compile", "--model", manifest["model"], "--weights", origin.path or origin.kind, "--precision", manifest["precision"],
             "--batch", str(artifact.batch), "--encoder", encoders, "--output", str(artifact.folder), "--force"]
    if origin.seed:
        words += ["--seed", str(origin.seed)]
    return shlex.join(words)


def load_modules(artifact: Artifact, checked: bool = False) -> dict[str, torch.jit.ScriptModule]:
    """Check each module's SHA-256, unless they were checked already, and load it onto the artifact's device.

    Raises UserError for a missing, truncated or altered module, and for a plugin that is not there.
    Warns where linear layers were measured with another cuBLASLt than the one here.
    """
    for encoder, entry in artifact.manifest["modules"].items() if not checked else ():
        path = artifact.path(encoder)
        if not path.is_file():
            raise UserError(f"{path} is missing; compile again")
        if sha256_of_file(path) != entry["sha256"]:
            raise UserError(f"{path} is truncated or altered: its SHA-256 is not the manifest's; compile again")
    if artifact.manifest["backend"] != "torchscript":
        trt.load_runtime(artifact.manifest["backend"])
    kernels.load(artifact.manifest["kernels_version"])
    if artifact.manifest["kernels_version"] is not None and not checked:
        warn_of_another_cublaslt(artifact)
    with deprecations.hidden():
        return {encoder: torch.jit.load(str(artifact.path(encoder)), map_location=artifact.device).eval() for encoder in artifact.encoders}


def warn_of_another_cublaslt(artifact: Artifact) -> None:
    """A warning where the artifact's linear layers were measured with another cuBLASLt than the one here."""
    here, there = linear.version_text(), artifact.manifest["versions"].get("cublaslt")
    if there not in (here, None):
        warnings.warn(f"the linear layers of {artifact.folder} were measured with cuBLASLt {there}, and {here} runs here: their results are right "
                      f"but may take longer; compile again", stacklevel=2)


class Draft:
    """An artifact being written, in a folder of its own beside its final place."""

    def __init__(self, folder: Path, target: Path):
        self.folder, self.target = folder, target
        self.modules: dict[str, dict[str, Any]] = {}

    def add(self, encoder: str, module: torch.jit.ScriptModule, **facts: Any) -> None:
        """Save one encoder's module; the facts go into the manifest beside its SHA-256."""
        path = self.folder / f"{encoder}.ts"
        with deprecations.hidden():
            torch.jit.save(module, str(path))
        self.modules[encoder] = {"file": path.name, "sha256": sha256_of_file(path), "mib": round(path.stat().st_size / 2**20, 2), **facts}

    def write_manifest(self, **facts: Any) -> Artifact:
        """Write (or write again) the manifest of what has been added."""
        manifest = {"format": FORMAT, **facts, "modules": self.modules}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return Artifact(self.folder, manifest)

    def publish(self, artifact: Artifact) -> Artifact:
        """Move the finished folder to its place, in which it appears whole or not at all.

        An older artifact there (`--force`) changes places with it in one step, and is removed
        with the draft; where a file system cannot do that, it moves aside and comes back on any
        failure.
        """
        if not self.target.exists():
            os.rename(self.folder, self.target)
        elif not exchange(self.folder, self.target):
            aside = self.target.parent / f".{self.target.name}.old-{secrets.token_hex(8)}"
            try:
                os.rename(self.target, aside)
                os.rename(self.folder, self.target)
            except BaseException:  # an interruption, too
                if not self.target.exists():
                    os.rename(aside, self.target)
                raise
            finally:
                if self.target.exists():
                    shutil.rmtree(aside, ignore_errors=True)
        return replace(artifact, folder=self.target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchanging) == 0


@contextmanager
def draft(target: Path, force: bool):
    """A `Draft` for a target folder; whatever is not published is removed.

    Raises UserError, before any work is done, where the target exists (unless `force`, and then
    only an artifact may be replaced) or cannot be written.
    """
    target = Path(os.path.abspath(target))
    if target.exists() or target.is_symlink():
        if not force:
            raise UserError(f"{target} already exists; choose another --output, or replace it with --force")
        if not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target} exists and is not an artifact, so --force does not replace it; choose another --output")
    # Named before it is made, so that an interruption at any moment removes it.
    folder = target.parent / f".{target.name}.partial-{secrets.token_hex(8)}"
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as problem:
            raise UserError(f"{target} cannot be written: {problem.strerror or problem}; choose another --output") from problem
        yield Draft(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
