"""The wheel, from the sdist, installed into an environment of its own: it holds the kernels'
sources and builds them, as far as the machine allows."""
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from clip_ttrt import build_kernels, kernels

ROOT = Path(__file__).parents[1]
SDIST = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
NVCC = 'while [ "$1" != -o ]; do shift; done; echo object > "$2"'
LIBRARY = "libclip_ttrt_kernels-trt0.so"


def run(*command, **options):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a copy of the checkout, in which a build leaves nothing behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("clip_ttrt", "kernels"):
        ignored = shutil.ignore_patterns("lib", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    run(sys.executable, "-c", SDIST, copy / "dist", cwd=copy)
    [found] = (copy / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
    [found] = folder.iterdir()
    return found


@pytest.fixture
def python(wheel, tmp_path, monkeypatch):
    """A Python with the wheel, which sees the packages of this one and a cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--disable-pip-version-check", "--no-deps", "--no-index", wheel)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (site / "seen.pth").write_text("\n".join(packages))
    return python


def told(python, expression):
    """What an expression of clip_ttrt.kernels is in another Python."""
    code = f"from clip_ttrt import kernels; print({expression})"
    return run(python, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code, cwd="/").strip()


def build(python):
    command = [python, "-m", "clip_ttrt.build_kernels", "--no-fetch", "--arch", "80"]
    return run(*command, cwd="/")


def test_wheel_and_sdist_hold_the_sources_all_modules_and_nothing_else(sdist, wheel):
    """setuptools does not look for packages here: pyproject.toml names them."""
    names, sources = zipfile.ZipFile(wheel).namelist(), set(kernels.source_files())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"clip_ttrt"}
    inside = "clip_ttrt/kernel_sources/"
    assert {name[len(inside) :] for name in names if name.startswith(inside)} == sources
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"kernels/{name}" for name in sources} <= files
    modules = (ROOT / "clip_ttrt").rglob("*.py")
    assert {path.relative_to(ROOT).as_posix() for path in modules} <= set(names)


def test_an_installed_package_builds_to_its_own_folder_or_the_cache(python, tmp_path, monkeypatch):
    """With programs that pretend nvcc and g++, and no TensorRT's headers."""
    assert told(python, "kernels.version()") == kernels.version()
    for name, script in (("nvcc", NVCC), ("g++", "exit 0")):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    own = Path(told(python, "kernels.PACKAGE"), "lib")
    assert own != kernels.PACKAGE / "lib"
    for library in (own / LIBRARY, tmp_path / "cache" / "clip_ttrt" / "kernels" / LIBRARY):
        assert str(library) in build(python) and library.is_file()
        assert told(python, "kernels.find().path") == str(library)
        if own.is_dir():
            shutil.rmtree(own)
            own.touch()  # root may write to any folder, and no one into a file


def test_a_library_of_the_installed_sources_loads(python, monkeypatch):
    try:
        nvcc = build_kernels.find_nvcc()
    except build_kernels.CannotBuild as problem:
        pytest.skip(str(problem))
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    build(python)
    version = told(python, "kernels.library().clip_ttrt_version().decode()")
    assert version == kernels.version()
