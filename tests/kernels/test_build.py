"""`python -m kernels.build --if-possible`, with which `make compile` begins: programs that pretend a GPU, nvcc and g++, and none of them."""

import pytest

from kernels import build

H100 = 'case "$1" in -L) echo "GPU 0: NVIDIA H100" ;; *) echo 9.0 ;; esac'
# Writes down its arguments and makes the file behind -o.
NVCC = 'echo "$@" >> "$LOG"; while [ "$1" != -o ]; do shift; done; echo library > "$2"'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A copy's folders, a PATH with nothing but what `install` puts there, TensorRT's packages and headers, and kernels that run."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path / "include"))
    monkeypatch.setattr(build, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(build, "BUILD", tmp_path / "build" / "kernels")
    monkeypatch.setattr(build, "OUTPUT", tmp_path / "clip_ttrt" / "lib" / build.OUTPUT.name)
    monkeypatch.setattr(build, "TENSORRT_PACKAGES", ("json",))
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setattr(build, "try_out", lambda library: None)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / build.TENSORRT_HEADER).touch()
    for name, script in (("nvidia-smi", H100), ("nvcc", NVCC), ("g++", "exit 0")):
        install(tmp_path, name, script)
    return tmp_path


def install(folder, name, script):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_it_builds_once_with_the_plugin_and_for_the_gpu_that_is_there(machine, capsys):
    assert build.main(["--if-possible"]) == 0
    commands = (machine / "log").read_text().splitlines()
    assert len(commands) == len(build.KERNEL_SOURCES) + len(build.PLUGIN_SOURCES) + 1
    assert "code=sm_90a" in commands[0] and not any("sm_80" in command for command in commands)
    assert build.OUTPUT.read_text() == "library\n"
    first, last = capsys.readouterr().out.splitlines()
    assert "building" in first and "sm_90a" in first and last.endswith("libclip_ttrt_kernels.so for sm_90a, with the TensorRT plugin")
    assert build.main(["--if-possible"]) == 0
    assert (machine / "log").read_text().splitlines() == commands and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("lacking", ["nvidia-smi", "a GPU", "TensorRT"])
def test_where_the_kernels_are_of_no_use_it_does_and_says_nothing(lacking, machine, monkeypatch, capsys):
    if lacking == "nvidia-smi":
        (machine / "bin" / "nvidia-smi").unlink()
    elif lacking == "a GPU":
        install(machine, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    else:
        monkeypatch.setattr(build, "TENSORRT_PACKAGES", ("json", "no_such_package"))
    assert build.main(["--if-possible"]) == 0
    assert capsys.readouterr() == ("", "") and not (machine / "log").exists() and not build.OUTPUT.exists()


def without_headers(machine, monkeypatch):
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
    monkeypatch.setattr(build, "SYSTEM_INCLUDES", ())
    install(machine, "git", "exit 128")


def do_not_run(library):
    assert library.read_text() == "library\n"
    raise build.CannotBuild("kernels.build: the kernels do not run here: CUDA error 35", 1)


@pytest.mark.parametrize("expected, prepare", [
    ("nvcc is missing", lambda machine, _: (machine / "bin" / "nvcc").unlink()),
    ("a C++ compiler is missing", lambda machine, _: (machine / "bin" / "g++").unlink()),
    ("headers are missing and cannot be fetched", without_headers),
    ("which holds no NvInferRuntime.h", lambda machine, _: (machine / "include" / build.TENSORRT_HEADER).unlink()),
    ("failed: a.cu(3): error: none", lambda machine, _: install(machine, "nvcc", "exec >&2; echo a warning; echo 'a.cu(3): error: none'; echo end; exit 2")),
    ("failed: nvcc fatal", lambda machine, _: install(machine, "nvcc", "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_90a'\" >&2; exit 1")),
    ("no GPU here is one of sm_80,", lambda machine, _: install(machine, "nvidia-smi", H100.replace("9.0", "7.5"))),
    ("CUDA error 35", lambda _, monkeypatch: monkeypatch.setattr(build, "try_out", do_not_run)),
    ("kernels.build: [Errno", lambda machine, _: (machine / "build").touch()),  # a folder that cannot be made
])
def test_what_goes_wrong_is_one_line_and_no_failure(expected, prepare, machine, monkeypatch, capsys):
    prepare(machine, monkeypatch)
    assert build.main(["--if-possible"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line and line.startswith("kernels.build: ") and line.endswith("; for now TensorRT's own kernels serve, which are slower")
    assert not build.OUTPUT.exists()


@pytest.mark.parametrize("said, expected", [
    ("echo 9.0", ["90a"]), ("echo 9.0; echo 8.9; echo 9.0", ["89", "90a"]), ("echo 7.5; echo 8.6", ["86"]), ("echo 10.0", []),
    ("echo '[N/A]'", ["80", "86", "89", "90a"]), ("echo 'not a valid field'; exit 2", ["80", "86", "89", "90a"]),
])
def test_the_driver_tells_what_to_build_for(said, expected, machine):
    install(machine, "nvidia-smi", f'if [ "$1" = -L ]; then echo "GPU 0: one"; else {said}; fi')
    assert build.architectures_here() == expected


def test_a_library_that_does_not_run_is_said_to(tmp_path):
    (tmp_path / "library.so").write_text("no library")
    with pytest.raises(build.CannotBuild, match="do not run here: .*library.so cannot be loaded"):
        build.try_out(tmp_path / "library.so")


def test_a_build_that_was_asked_for_still_fails(machine, capsys):
    install(machine, "nvcc", "exit 1")
    assert build.main([]) == 1 and "kernels.build: failed: " in capsys.readouterr().err
    (machine / "bin" / "g++").unlink()
    assert build.main([]) == 2 and "C++ compiler is missing" in capsys.readouterr().err
