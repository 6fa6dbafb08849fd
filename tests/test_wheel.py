"""The wheel, from the sdist, installed into an environment of its own: it holds the kernels'
sources and builds them, where nvcc is missing with programs that pretend it and g++."""
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from clip_ttrt import kernels

ROOT = Path(__file__).parents[1]
SDIST = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
TOOL = 'while [ "$1" != -o ]; do shift; done; echo object > "$2"'
LIBRARY = "libclip_ttrt_kernels-trt0.so"


def run(*command, **options):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist of a copy of the checkout, and the sdist's wheel."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("clip_ttrt", "kernels"):
        ignored = shutil.ignore_patterns("lib", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    run(sys.executable, "-c", SDIST, copy / "dist", cwd=copy)
    [sdist] = (copy / "dist").iterdir()
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "dist", sdist)
    return copy / "dist"


def test_wheel_and_sdist_hold_the_sources_all_modules_and_nothing_else(dist):
    """setuptools does not look for packages here: pyproject.toml names them."""
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names, sources = zipfile.ZipFile(wheel).namelist(), set(kernels.source_files())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"clip_ttrt"}
    inside = "clip_ttrt/kernel_sources/"
    assert {name[len(inside) :] for name in names if name.startswith(inside)} == sources
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"kernels/{name}" for name in sources} <= files
    modules = (ROOT / "clip_ttrt").rglob("*.py")
    assert {path.relative_to(ROOT).as_posix() for path in modules} <= set(names)


def test_an_installed_package_builds_to_its_own_folder_or_the_cache(dist, tmp_path, monkeypatch):
    """Without dependencies: the environment sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python, [wheel] = tmp_path / "venv" / "bin" / "python", dist.glob("*.whl")
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (site / "seen.pth").write_text("\n".join(packages))
    (tmp_path / "bin").mkdir()
    for name in () if shutil.which("nvcc") else ("nvcc", "g++"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{TOOL}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)

    def told(expression):
        code = f"from clip_ttrt import kernels; print({expression})"
        return run(python, "-c", code, cwd=tmp_path)

    assert told("kernels.version()") == kernels.version()
    own = Path(told("kernels.PACKAGE"), "lib")
    assert own.is_relative_to(site)
    for library in (own / LIBRARY, tmp_path / "cache" / "clip_ttrt" / "kernels" / LIBRARY):
        build = [python, "-m", "clip_ttrt.build_kernels", "--no-fetch", "--arch", "80"]
        assert str(library) in run(*build, cwd=tmp_path) and library.is_file()
        assert told("kernels.find().path") == str(library)
        if own.is_dir():
            shutil.rmtree(own)
            own.touch()  # root may write to any folder, and no one into a file
