"""The wheel, made from the sdist and installed into an environment of its own: it holds the
kernels' sources and builds them, as far as the machine allows."""

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


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
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
def installed(wheel, tmp_path):
    """A Python with the wheel, which sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--disable-pip-version-check", "--no-deps", "--no-index", wheel)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (site / "seen.pth").write_text("\n".join(packages))
    return python


@pytest.fixture
def place(installed, tmp_path, monkeypatch):
    """The installed package, with programs that pretend nvcc and g++ and no TensorRT's headers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    for name, script in (("nvcc", NVCC), ("g++", "exit 0")):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Path(told(installed, "kernels.PACKAGE"))


def told(python, expression):
    """What an expression of clip_ttrt.kernels is in another Python."""
    code = f"from clip_ttrt import kernels; print({expression})"
    return run(python, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code, cwd="/").strip()


def build(python, *options):
    return run(python, "-m", "clip_ttrt.build_kernels", "--no-fetch", *options, cwd="/")


def sources():
    folder = kernels.sources()
    return {path.relative_to(folder).as_posix() for path in kernels.source_files()}


def test_wheel_and_sdist_hold_the_sources_and_no_module_kernels(sdist, wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"clip_ttrt"}
    inside = "clip_ttrt/kernel_sources/"
    assert {name[len(inside) :] for name in names if name.startswith(inside)} == sources()
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"kernels/{name}" for name in sources()} <= files


def test_wheel_holds_every_module(wheel):
    """setuptools does not look for packages here: pyproject.toml names them."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "clip_ttrt"
    ours = [path for path in package.rglob("*.py") if "kernel_sources" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in ours} <= names


def test_installed_sources_are_those_of_the_checkout(installed):
    assert told(installed, "kernels.version()") == kernels.version()
    assert told(installed, "kernels.PACKAGE") != str(kernels.PACKAGE)


def test_an_installed_package_builds_to_its_own_folder(installed, place):
    said = build(installed, "--arch", "80")
    library = place / "lib" / "libclip_ttrt_kernels-trt0.so"
    assert library.is_file() and str(library) in said
    assert told(installed, "kernels.find().path") == str(library)


def test_or_to_the_cache_where_that_cannot_be_written(installed, place, tmp_path):
    (place / "lib").touch()  # root may write to any folder, and no one into a file
    build(installed, "--arch", "80")
    library = tmp_path / "cache" / "clip_ttrt" / "kernels" / "libclip_ttrt_kernels-trt0.so"
    assert library.is_file()
    assert told(installed, "kernels.find().path") == str(library)


def test_what_is_missing_is_one_sentence(installed, place):
    code = "import sys; from clip_ttrt import build_kernels as b; b.TOOLKITS = ()"
    code += "; sys.exit(b.main([]))"
    environment = {"PATH": "", "HOME": str(place), "CUDA_HOME": ""}
    done = subprocess.run(
        [installed, "-c", code], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 2
    [line] = [one for one in done.stderr.splitlines() if one.startswith("build_kernels:")]
    assert "nvcc is missing" in line


def has_nvcc():
    try:
        return build_kernels.find_nvcc() and shutil.which("g++")
    except build_kernels.CannotBuild:
        return False


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc and g++")
def test_a_library_of_the_installed_sources_loads(installed, tmp_path, monkeypatch):
    nvcc = build_kernels.find_nvcc()
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build(installed, "--arch", "80")
    version = told(installed, "kernels.library().clip_ttrt_version().decode()")
    assert version == kernels.version()
