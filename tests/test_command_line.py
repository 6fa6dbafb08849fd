"""The commands as a user types them: output, files and exit codes; and what an import brings."""
import dataclasses
import importlib
import inspect
import json
import signal
import subprocess
import sys

import pytest
import torch

import clip_ttrt
from clip_ttrt import build_kernels, cli, verify
from clip_ttrt.demo import scenes
from clip_ttrt.options import Options


def command(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"clip_ttrt.{name}", *arguments],
                          capture_output=True, text=True)


def test_the_function_stays_one_and_shows_its_options():
    assert importlib.import_module("clip_ttrt.compile") is clip_ttrt.compile
    assert inspect.isfunction(clip_ttrt.compile)
    parameters = inspect.signature(clip_ttrt.compile).parameters
    assert list(parameters) == [*(each.name for each in dataclasses.fields(Options)), "progress"]
    assert all(each.kind == each.KEYWORD_ONLY for each in parameters.values())
    with pytest.raises(TypeError, match="precison"):
        clip_ttrt.compile(precison="fp16")


def test_an_import_brings_what_loading_needs_and_no_compiler():
    compiler = {f"clip_ttrt.{name}" for name in ("engine", "graph", "converters", "cli",
                                                 "ops", "verify", "demo.scenes", "probe")}
    compiler |= {"torch_tensorrt", "torch._dynamo", "torch.export._trace", "clip"}
    code = ("import sys, torch; before = set(sys.modules); import clip_ttrt; clip_ttrt.Options(); "
            f"print(sorted({compiler} & (set(sys.modules) - before)))")
    assert subprocess.check_output([sys.executable, "-c", code]).strip() == b"[]"


def test_compile_verify_and_classify(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, report = str(tmp_path / "a"), tmp_path / "report.json"
    done = command("compile", "--batch", "1:4:8", "--backend", "torchscript", "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "verify against the original model" in done.stderr
    assert "\r" not in done.stderr and "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    names = ["image", "text", "text16", "text32", "text48", "logits"]
    assert [line.split()[0] for line in lines[2:8]] == names
    assert "zero-shot top-1" in done.stdout and lines[-1] == f"wrote {folder} (verified)"

    assert cli.main(["verify", folder, "--json", str(report)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    top1 = json.loads(report.read_text())["top1"]
    assert top1["compiled"] == top1["reference"] == top1["agreement"] == 100

    scenes.to_image(scenes.held_out_set(per_class=1)[0][3]).save(tmp_path / "scene.png")
    wrong, right, also_wrong = (scenes.held_out_classes()[index] for index in (50, 3, 90))
    (tmp_path / "labels.txt").write_text(f"{wrong}\n\n{right}\n{also_wrong}\n")
    done = subprocess.run([sys.executable, "-m", "clip_ttrt", "classify", folder,
                           str(tmp_path / "scene.png"), "--labels", str(tmp_path / "labels.txt")],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    path, *lines = done.stdout.splitlines()
    assert path.endswith("scene.png") and len(lines) == 3 and lines[0].endswith(right)
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.1)


def test_verify_fails_with_exit_code_1(demo_artifact, monkeypatch, capsys):
    original = verify.reference_features
    monkeypatch.setattr(verify, "reference_features", lambda *arguments: {
        name: features + 0.1 for name, features in original(*arguments).items()})
    assert cli.main(["verify", str(demo_artifact.folder)]) == 1
    assert "FAILED: image: smallest cosine" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, sentence", [
    (["--model", "ViT-H/14"], "unknown model 'ViT-H/14'; known: demo, ViT-B/32"),
    (["--weights", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--batch", "8:4:2"], "bad batch range"),
    (["--output", "/proc/nowhere/a"], "cannot be written"),
    (["--model", "ViT-B/32", "--weights", "demo"], "not those of ViT-B/32"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys):
    output = ["--output", str(tmp_path / "a")]
    assert cli.main(["compile", "--backend", "torchscript", *output, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("clip_ttrt: ") and sentence in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_commands_in_processes_of_their_own(tmp_path):
    done = command("compile", "--model", "nothing", "--output", str(tmp_path / "a"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1  # no RuntimeWarning either
    assert done.stderr.startswith("clip_ttrt: unknown model")
    done = command("info", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["compile"]["backend"]["reason"]


@pytest.mark.parametrize("raised, code, sentence", [
    (KeyboardInterrupt(), 2, "interrupted"),
    (torch.cuda.OutOfMemoryError("full"), 2, "out of GPU memory"),
    (OSError(28, "No space left on device", "a.json"), 2, "No space left on device: 'a.json'"),
    (clip_ttrt.VerificationError("a is marked unverified"), 1, "a is marked unverified"),
])
def test_what_stops_a_command_is_one_sentence(raised, code, sentence, monkeypatch, capsys):
    def stopped(arguments):
        assert arguments == ["--arch", "90a"]
        raise raised

    monkeypatch.setattr(build_kernels, "main", stopped)
    assert cli.main(["build-kernels", "--arch", "90a"]) == code
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["export the image encoder", "verify against"])
def test_ctrl_c_stops_a_compile_and_leaves_nothing(moment, tmp_path):
    process = subprocess.Popen(
        ["env", "--default-signal=INT",  # which jobs in the background ignore
         sys.executable, "-m", "clip_ttrt.compile", "--weights", "random", "--backend",
         "torchscript", "--output", str(tmp_path / "a")], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if moment in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 2, rest
    assert "interrupted; nothing was written" in rest and not list(tmp_path.iterdir())
