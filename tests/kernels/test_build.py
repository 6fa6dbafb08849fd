"""`python -m clip_ttrt.build_kernels`: with programs that pretend a GPU, nvcc and g++, with none of
them, and with the compilers where they are."""
import shutil
import subprocess

import pytest
import toolchain

from clip_ttrt import build_kernels, kernels, stack

H100 = "echo 'NVIDIA H100, 580.1, 81559 MiB, 9.0'"
# Writes down its arguments and makes the file behind -o, with what it is told of a library.
NVCC = """echo "$@" >> "$LOG"
for a in "$@"; do case "$a" in
  -DCLIP_TTRT_VERSION=*) version=${a#*=} ;;
  -DCLIP_TTRT_ARCHITECTURES=*) architectures=${a#*=} ;;
  -DCLIP_TTRT_PLUGINS) major=10 ;; esac; done
if [ -n "$version" ]; then
  echo "clip_ttrt kernels: version=$version architectures=$architectures tensorrt=${major:-0};" |
    tr -d '"' > "$LOG.about"
fi
while [ "$1" != -o ]; do shift; done
cp "$LOG.about" "$2" 2>/dev/null || echo object > "$2"
"""
INSTALLED = {"tensorrt": "10.15.1", "torch-tensorrt": "2.11.0"}
LIBRARY = "libclip_ttrt_kernels-trt10.so"


def install(folder, name, script):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def write_headers(folder, version):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "NvInferRuntime.h").touch()
    text = f"#define TRT_MAJOR_ENTERPRISE {version}\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE"
    (folder / "NvInferVersion.h").write_text(text)


def forget():
    kernels.version.cache_clear()
    kernels.tensorrt_major.cache_clear()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A checkout's folders, a PATH with what `install` puts there alone, TensorRT 10.15 with its
    headers, and kernels that run."""
    package = tmp_path / "checkout" / "clip_ttrt"
    package.mkdir(parents=True)
    shutil.copytree(kernels.sources(), package.with_name("kernels"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path / "include"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernels, "PACKAGE", package)
    monkeypatch.setattr(build_kernels, "TOOLKITS", ())
    monkeypatch.setattr(build_kernels, "try_out", lambda library: None)
    monkeypatch.setattr(build_kernels.sysconfig, "get_paths", dict(purelib="", platlib="").copy)
    monkeypatch.setattr(stack, "versions", INSTALLED.copy)
    forget()
    (tmp_path / "bin").mkdir()
    for name in ("cat", "cp", "mkdir", "tr", "sh"):  # what the scripts call
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write_headers(tmp_path / "include", 10)
    for name, script in (("nvidia-smi", H100), ("nvcc", NVCC), ("g++", "exit 0")):
        install(tmp_path, name, script)
    yield tmp_path
    forget()


def built(machine):
    return machine / "checkout" / "clip_ttrt" / "lib" / LIBRARY


def commands(machine):
    return (machine / "log").read_text().splitlines() if (machine / "log").exists() else []


# --if-possible


def test_it_builds_once_with_the_plugins_and_for_the_gpu_that_is_there(machine, capsys):
    assert build_kernels.main(["--if-possible"]) == 0
    first = commands(machine)
    assert len(first) == len(build_kernels.compiled_sources()) + 1
    assert "code=sm_90a" in first[0] and not any("sm_80" in command for command in first)
    assert kernels.find() == kernels.Library(built(machine), kernels.version(), ("90a",), 10)
    begin, end = capsys.readouterr().out.splitlines()
    assert "building" in begin and "sm_90a" in begin
    assert end.endswith(f"{LIBRARY} for sm_90a, with the plugins for TensorRT 10")
    assert build_kernels.main(["--if-possible"]) == 0
    assert commands(machine) == first and capsys.readouterr() == ("", "")


def rewritten(machine, old, new):
    built(machine).write_bytes(built(machine).read_bytes().replace(old, new))


CHANGES = {
    "another source": lambda machine: (machine / "checkout/kernels/plugin.h").write_text("//"),
    "another GPU": lambda machine: install(machine, "nvidia-smi", H100.replace("9.0", "8.6")),
    "another TensorRT": lambda machine: rewritten(machine, b"tensorrt=10", b"tensorrt=11"),
    "no plugins": lambda machine: rewritten(machine, b"tensorrt=10", b"tensorrt=0"),
    "not ours": lambda machine: built(machine).write_text("no library"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_library_that_does_not_serve_is_built_anew(machine, change):
    build_kernels.main(["--if-possible"])
    before = len(commands(machine))
    CHANGES[change](machine)
    forget()
    build_kernels.main(["--if-possible"])
    assert len(commands(machine)) == 2 * before
    found = kernels.find()
    assert (found.version, found.tensorrt_major) == (kernels.version(), 10)


def test_a_library_for_more_gpus_than_these_is_kept(machine, capsys):
    assert build_kernels.main(["--arch", "80", "--arch", "90a"]) == 0
    before = commands(machine)
    for capability in ("9.0", "8.0", "8.6"):  # code for sm_80 runs on 8.6
        install(machine, "nvidia-smi", H100.replace("9.0", capability))
        build_kernels.main(["--if-possible"])
    assert commands(machine) == before


@pytest.mark.parametrize("missing", ["a GPU", "tensorrt", "torch-tensorrt"])
def test_where_the_kernels_are_of_no_use_it_is_silent(missing, machine, monkeypatch, capsys):
    install(machine, "nvidia-smi", "echo failed; exit 9" if missing == "a GPU" else H100)
    others = {name: one for name, one in INSTALLED.items() if name != missing}
    monkeypatch.setattr(stack, "versions", others.copy)
    assert build_kernels.main(["--if-possible"]) == 0
    assert capsys.readouterr() == ("", "") and not commands(machine) and kernels.find() is None


def without_headers(machine, monkeypatch):
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
    monkeypatch.setattr(build_kernels, "SYSTEM_INCLUDES", ())
    install(machine, "git", "exit 128")


def do_not_run(library):
    assert "clip_ttrt kernels" in library.read_text()
    raise build_kernels.CannotBuild("the kernels do not run here: CUDA error 35", 1)


def no_folder(machine, monkeypatch):
    for folder in kernels.folders():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch()


ERROR = "exec >&2; echo a warning; echo 'a.cu(3): error: none'; echo end; exit 2"
FATAL = "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_90a'\" >&2; exit 1"


@pytest.mark.parametrize("expected, prepare", [
    ("nvcc is missing", lambda machine, _: (machine / "bin" / "nvcc").unlink()),
    ("a C++ compiler is missing", lambda machine, _: (machine / "bin" / "g++").unlink()),
    ("headers are missing and cannot be fetched", without_headers),
    ("at v10.15", without_headers),
    ("which holds no headers",
     lambda machine, _: (machine / "include" / "NvInferVersion.h").unlink()),
    ("the headers of TensorRT 11, and TensorRT 10.15.1 is installed",
     lambda machine, _: write_headers(machine / "include", 11)),
    ("failed: a.cu(3): error: none", lambda machine, _: install(machine, "nvcc", ERROR)),
    ("failed: nvcc fatal", lambda machine, _: install(machine, "nvcc", FATAL)),
    ("no GPU here runs code for sm_80,",
     lambda machine, _: install(machine, "nvidia-smi", H100.replace("9.0", "7.5"))),
    ("CUDA error 35",
     lambda _, monkeypatch: monkeypatch.setattr(build_kernels, "try_out", do_not_run)),
    ("the library cannot be written: [Errno", no_folder),
])  # fmt: skip
def test_what_goes_wrong_is_one_line_and_no_failure(
    expected, prepare, machine, monkeypatch, capsys
):
    prepare(machine, monkeypatch)
    assert build_kernels.main(["--if-possible"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line and line.startswith("build_kernels: ")
    assert line.endswith("; for now TensorRT's own kernels serve, which are slower")
    assert not built(machine).exists()


@pytest.mark.parametrize("capabilities, expected", [
    ("9.0", "90a"), ("9.0 8.9 9.0", "89 90a"), ("7.5 8.6", "86"), ("8.7", "86"), ("10.3", "100"),
    ("12.1", "120"), ("13.0", "120"), ("[N/A]", " ".join(build_kernels.ARCHITECTURES)),
])  # fmt: skip
def test_the_driver_tells_what_to_build_for(capabilities, expected, machine, capsys):
    told = "; ".join(H100.replace("9.0", one) for one in capabilities.split())
    install(machine, "nvidia-smi", told)
    build_kernels.main(["--if-possible"])
    assert kernels.find().architectures == tuple(expected.split())


def test_a_library_that_does_not_run_is_found_out(tmp_path):
    (tmp_path / "library.so").write_text("no library")
    with pytest.raises(build_kernels.CannotBuild, match="do not run here: library.so is stale"):
        build_kernels.try_out(tmp_path / "library.so")


# A build that was asked for


def test_it_fails_with_one_sentence(machine, capsys):
    install(machine, "nvcc", "exit 1")
    assert build_kernels.main([]) == 1 and "build_kernels: failed: " in capsys.readouterr().err
    (machine / "bin" / "g++").unlink()
    assert build_kernels.main([]) == 2 and "C++ compiler is missing" in capsys.readouterr().err
    (machine / "bin" / "nvcc").unlink()
    assert build_kernels.main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "nvcc is missing" in line and "'nvidia-cuda-nvcc==" in line


def test_without_headers_it_builds_for_pytorch_and_says_so(machine, monkeypatch, capsys):
    without_headers(machine, monkeypatch)
    assert build_kernels.main([]) == 0
    out, err = capsys.readouterr()
    assert "without plugins" in out and "set TENSORRT_INCLUDE_DIR" in err
    assert not any("plugin" in command for command in commands(machine))
    found = kernels.find()
    assert (found.path.name, found.tensorrt_major) == ("libclip_ttrt_kernels-trt0.so", 0)


def test_it_compiles_for_every_architecture(machine, capsys):
    (machine / "checkout" / "clip_ttrt" / "lib").touch()  # so that the cache has to serve
    assert build_kernels.main([]) == 0
    [attention] = [one for one in commands(machine) if "attention.cu.o" in one and " -c " in one]
    # wgmma needs the target with the "a"; the newest comes as PTX too.
    for flag in ("compute_90a,code=sm_90a", "compute_120,code=[sm_120,compute_120]"):
        assert f"-gencode=arch={flag}" in attention
    assert attention.count("-gencode") == 6
    path, architectures = kernels.cache() / LIBRARY, build_kernels.ARCHITECTURES
    assert kernels.find() == kernels.Library(path, kernels.version(), architectures, 10)


# Tools and headers


def test_nvcc_is_found_without_path(tmp_path, monkeypatch):
    packages = str(tmp_path / "packages")
    places = ("cuda", "packages/nvidia/cu13", "packages/nvidia/cu12", "system")
    monkeypatch.setattr(build_kernels.sysconfig, "get_paths",
                        dict(purelib=packages, platlib=packages).copy)
    monkeypatch.setattr(build_kernels, "TOOLKITS", (str(tmp_path / "system"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = [tmp_path / place / "bin" / "nvcc" for place in places]
    for path in found:
        path.parent.mkdir(parents=True)
        path.touch()
    for path in found:
        assert build_kernels.find_nvcc() == path
        path.unlink()
    with pytest.raises(build_kernels.CannotBuild, match="nvcc is missing"):
        build_kernels.find_nvcc()


@pytest.mark.parametrize("installed, tag", [
    ("10.6.0", "v10.6.0"), ("10.14.1.48", "v10.6.0"), ("10.15.1", "v10.15"), ("10.16.1", "v10.15"),
    ("10.3.0", "v10.6.0"), ("11.0.0", "v11.1"), ("11.1.2.3", "v11.1"), ("12.0", None),
])  # fmt: skip
def test_headers_are_those_of_the_installed_version_or_the_next_older(installed, tag):
    assert build_kernels.tag_for(installed) == tag


def test_headers_are_fetched_once(machine, monkeypatch):
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
    write_headers(machine / "system", 11)  # of another TensorRT than the installed one
    monkeypatch.setattr(build_kernels, "SYSTEM_INCLUDES", (str(machine / "system"),))
    monkeypatch.setenv("HEADERS", str(machine / "include"))
    install(machine, "git", """echo "git $@" >> "$LOG"
for last; do :; done
case "$1" in clone) mkdir -p "$last/include"; cp "$HEADERS"/* "$last/include" ;; esac""")
    assert build_kernels.find_tensorrt(fetch=False) is None
    for fetch in (True, True, False):
        found = build_kernels.find_tensorrt(fetch)
        assert found == kernels.cache() / "tensorrt-v10.15" / "include"
    clones = [one for one in commands(machine) if one.startswith("git clone")]
    assert len(clones) == 1 and "--branch v10.15" in clones[0]


def test_without_tensorrt_only_the_named_headers_count(machine, monkeypatch):
    monkeypatch.setattr(stack, "versions", dict)
    assert build_kernels.find_tensorrt(fetch=True) == machine / "include"
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
    assert build_kernels.find_tensorrt(fetch=True) is None


# The compilers, where they are


def compile_all(commands):
    for command in commands:
        command = [*command, "-Xcompiler", "-Werror"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr


@toolchain.needs_nvcc
@pytest.mark.parametrize("headers", toolchain.each_headers())
def test_plugins_compile_without_a_warning(headers, tmp_path):
    """As they are built, with every warning an error."""
    every = build_kernels.build_commands(toolchain.NVCC, ["90a"], headers, tmp_path)
    host = [one for one in every[:-1] if one[-1].endswith(".cpp")]
    assert len(host) == 5
    compile_all(host)


@pytest.mark.slow
@toolchain.needs_nvcc
@pytest.mark.parametrize(
    "source", [one for one in build_kernels.compiled_sources() if one.endswith(".cu")]
)
def test_kernels_compile_for_every_architecture(source, tmp_path):
    architectures = list(build_kernels.ARCHITECTURES)
    every = build_kernels.build_commands(toolchain.NVCC, architectures, None, tmp_path, threads=2)
    compile_all(one for one in every if one[-1].endswith(f"/{source}"))
