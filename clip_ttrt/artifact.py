"""The folder that `compile` writes and `load` reads: modules and their manifest."""
import ctypes
import json
import os
import shlex
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Union

import torch

from clip_ttrt import deprecations, kernels, stack, trt
from clip_ttrt.checkpoint import Origin, sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.families import Model
from clip_ttrt.models import Dimensions
from clip_ttrt.options import BatchRange

FORMAT = 5
MANIFEST = "manifest.json"
SCALES = "scales.json"  # of fp8


@dataclass
class Artifact:
    """An artifact folder and its manifest, as read or just written."""

    folder: Path
    manifest: Mapping[str, Any]

    def __post_init__(self):
        facts = self.manifest
        self.dimensions = Dimensions(**facts["dimensions"])
        self.model = Model(facts["model"], self.dimensions, facts["preprocess"],
                           folder=self.folder)  # with the tokenizer's files
        self.batch = BatchRange(**facts["batch"])
        self.origin = Origin(**facts["weights"])
        self.encoders = tuple(facts["modules"])
        self.device: str = facts["device"]  # cuda or cpu: where the modules run
        report = facts["verification"]
        self.verified: Optional[bool] = report and report["passed"]  # None: not verified

    def path(self, encoder: str) -> Path:
        return self.folder / self.manifest["modules"][encoder]["file"]


def read_artifact(folder: Union[str, Path]) -> Artifact:
    """Read an artifact; UserError where its manifest is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not an artifact, which python -m clip_ttrt.compile writes")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT}")
        _ = [(each["file"], each["sha256"], each["mib"]) for each in manifest["modules"].values()]
        _ = [manifest[name] for name in (
            "precision", "logit_scale", "logit_bias", "backend", "asked", "gpu", "versions",
            "kernels", "kernels_version")]
        return Artifact(path.parent, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} is damaged ({problem!r}); compile again") from problem


def check_runs_here(artifact: Artifact, device: Optional[str] = None) -> None:
    """UserError where an artifact cannot run here or is not whole; no engine is touched."""
    manifest, folder = artifact.manifest, artifact.folder
    again = f"compile it anew: {recompile_command(artifact)}"
    if device is not None and torch.device(device).type != artifact.device:
        raise UserError(f"{folder} was compiled for {artifact.device}, not {device}; load it so, "
                        f"or {again}")
    if artifact.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{folder} was compiled for a GPU, and no CUDA GPU answers here; {again}")
    if manifest["backend"] != "torchscript":
        fused, suffix = manifest["kernels_version"], "-rtx" * (manifest["backend"] == "rtx")
        there = {**manifest["gpu"], **manifest["versions"], "kernels": fused}
        here = {**stack.gpu(), **stack.versions(), "kernels": fused and kernels.version()}
        for name, part in (("compute_capability", str), (f"torch-tensorrt{suffix}", stack.minor),
                           (f"tensorrt{suffix}", str), ("kernels", str)):
            theirs, ours = (str(facts.get(name, "none")) for facts in (there, here))
            if part(theirs) != part(ours):
                raise UserError(f"{folder} was compiled for {name} {theirs}, not {ours}; {again}")
    for encoder in artifact.encoders:
        path = artifact.path(encoder)
        if not path.is_file() or sha256_of_file(path) != manifest["modules"][encoder]["sha256"]:
            raise UserError(f"{path} is missing, truncated or altered; {again}")


def recompile_command(artifact: Artifact) -> str:
    """The command that compiles an artifact of the same model and options in its place."""
    manifest, origin, encoders = artifact.manifest, artifact.origin, artifact.encoders
    options = {"model": manifest["model"], "weights": origin.path or origin.kind,
               "seed": origin.seed, "precision": manifest["precision"], "batch": artifact.batch,
               "encoder": encoders[0] if len(encoders) == 1 else None, **manifest["asked"],
               "scales": artifact.folder / SCALES if manifest["precision"] == "fp8" else None,
               "output": artifact.folder}
    words = [word for name, value in options.items() if value not in (None, "auto")
             for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "clip_ttrt.compile", *words, "--force"])


def load_modules(artifact: Artifact) -> dict[str, torch.jit.ScriptModule]:
    """Each encoder's module, on the artifact's device; UserError for a plugin that is not there."""
    if artifact.manifest["backend"] != "torchscript":
        trt.load_runtime(artifact.manifest["backend"])
    kernels.load(artifact.manifest["kernels_version"])
    with deprecations.hidden():
        return {encoder: torch.jit.load(str(artifact.path(encoder)), artifact.device).eval()
                for encoder in artifact.encoders}


class Draft:
    """An artifact being written, in a folder of its own beside its final place."""

    def __init__(self, folder: Path, target: Path):
        self.folder, self.target = folder, target
        self.modules: dict[str, dict[str, Any]] = {}
        folder.mkdir()

    def add(self, encoder: str, module: torch.jit.ScriptModule, **facts: Any) -> None:
        """Save one encoder's module; the facts go into the manifest beside its SHA-256."""
        path = self.folder / f"{encoder}.ts"
        with deprecations.hidden():
            torch.jit.save(module, str(path))
        facts["mib"] = round(path.stat().st_size / 2**20, 2)
        self.modules[encoder] = {"file": path.name, "sha256": sha256_of_file(path), **facts}

    def write_manifest(self, **facts: Any) -> Artifact:
        """Write (or write again) the manifest of what has been added."""
        manifest = {"format": FORMAT, **facts, "modules": self.modules}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return Artifact(self.folder, manifest)

    def publish(self, artifact: Artifact) -> Artifact:
        """Move the finished folder to its place, whole or not at all: an older artifact changes
        places with it or, where a file system cannot do that, comes back on any failure."""
        if not exchange(self.folder, self.target):
            aside = Path(f"{self.folder.parent}.old")
            try:
                if self.target.exists():
                    os.rename(self.target, aside)
                os.rename(self.folder, self.target)
            finally:  # after an interruption, too
                if aside.exists() and not self.target.exists():
                    os.rename(aside, self.target)
                shutil.rmtree(aside, ignore_errors=True)
        return replace(artifact, folder=self.target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where they cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = at_cwd, os.fsencode(one), at_cwd, os.fsencode(other)
    return renameat2 is not None and renameat2(*paths, exchanging) == 0


@contextmanager
def draft(target: Path, force: bool) -> Iterator[Draft]:
    """A `Draft`, removed unless published; UserError for a target that is taken or unwritable."""
    target = Path(os.path.realpath(target))
    if target.exists():
        content = os.listdir(target) if target.is_dir() else [target.name]
        if not force or (content and MANIFEST not in content):
            raise UserError(f"{target} already exists; choose another --output (--force replaces "
                            "an artifact, and nothing else)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent,
                                              ignore_cleanup_errors=True)
    except OSError as problem:
        raise UserError(f"{target} cannot be written ({problem}); choose another --output"
                        ) from problem
    with scratch:
        yield Draft(Path(scratch.name, "artifact"), target)
