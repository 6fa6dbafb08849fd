"""The commands as a user types them: output, files and exit codes; and what an import brings."""
import dataclasses
import importlib
import inspect
import io
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import clip_ttrt
from clip_ttrt import build_kernels, classify, cli, progress, verify
from clip_ttrt.demo import scenes
from clip_ttrt.options import Options


def command(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_the_function_stays_one_and_shows_its_options():
    assert importlib.import_module("clip_ttrt.compile") is clip_ttrt.compile
    assert inspect.isfunction(clip_ttrt.compile)
    parameters = inspect.signature(clip_ttrt.compile).parameters
    assert list(parameters) == [*(each.name for each in dataclasses.fields(Options)), "progress"]
    assert all(each.kind == each.KEYWORD_ONLY for each in parameters.values())
    assert parameters["precision"].default == clip_ttrt.Options().precision == "fp16"
    with pytest.raises(TypeError, match="precison"):
        clip_ttrt.compile(precison="fp16")


def test_an_import_brings_what_loading_needs_and_no_compiler():
    compiler = {f"clip_ttrt.{name}" for name in ("engine", "graph", "converters", "cli",
                                                 "ops", "verify", "demo.scenes")}
    compiler |= {"torch_tensorrt", "torch._dynamo", "torch.export._trace", "clip"}
    code = ("import sys, torch; before = set(sys.modules); import clip_ttrt; clip_ttrt.Options(); "
            f"print(sorted({compiler} & (set(sys.modules) - before)))")
    assert command("-c", code).stdout.strip() == "[]"


def test_compile_writes_prints_and_classify_reads(tmp_path):
    folder = str(tmp_path / "a")
    done = command("-m", "clip_ttrt.compile", "--batch", "1:4:8", "--backend", "torchscript",
                   "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "verify against the original model" in done.stderr
    assert not any(unwanted in done.stderr for unwanted in ("\r", "\x1b", "Warning"))
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["image", "text", "logits"]
    assert "zero-shot top-1" in done.stdout and lines[-1] == f"wrote {folder} (verified)"
    images, labels = scenes.held_out_set(per_class=1)
    scenes.to_image(images[3]).save(tmp_path / "scene.png")
    captions = scenes.held_out_classes()
    right = captions[labels[3]]
    (tmp_path / "labels.txt").write_text("\n\n".join([captions[50], right, captions[90]]) + "\n")
    done = command("-m", "clip_ttrt.classify", folder, "--image", str(tmp_path / "scene.png"),
                   "--labels", str(tmp_path / "labels.txt"))
    assert done.returncode == 0 and "never trained" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].endswith(right)
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.1)


def test_verify_prints_and_writes_json(demo_artifact, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert cli.main(["verify", str(demo_artifact.folder), "--json", str(file)]) == 0
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    assert printed.splitlines()[-1] == "passed" and "zero-shot top-1" in printed
    assert set(report["errors"]) == {"image", "text", "logits"}
    change = report["top1"]["compiled"] - report["top1"]["reference"]
    assert abs(change) <= verify.TOP1_BOUND["fp16"]


def test_verify_fails_with_exit_code_1(demo_artifact, monkeypatch, capsys):
    original = verify.reference_features
    monkeypatch.setattr(verify, "reference_features", lambda *arguments: {
        name: features + 0.1 for name, features in original(*arguments).items()})
    assert cli.main(["verify", str(demo_artifact.folder)]) == 1
    assert "FAILED: image: smallest cosine" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, sentence", [
    (["--model", "ViT-H/14"], "unknown model 'ViT-H/14'; known: demo, ViT-B/32"),
    (["--model", "RN50"], "not supported yet"),
    (["--weights", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--batch", "8:4:2"], "bad batch range"),
    (["--precision", "fp8"], "unknown precision 'fp8'"),
    (["--output", "/proc/nowhere/a"], "cannot be written"),
    (["--model", "ViT-B/32", "--weights", "demo"], "are not ViT-B/32"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys):
    output = ["--output", str(tmp_path / "a")]
    assert cli.main(["compile", "--backend", "torchscript", *output, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("clip_ttrt: ") and sentence in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = command("-m", "clip_ttrt.compile", "--model", "nothing", "--output", str(tmp_path / "a"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1  # no RuntimeWarning either
    assert done.stderr.startswith("clip_ttrt: unknown model")


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


@pytest.mark.parametrize("moment", ["RANDOM weights", "export the image encoder", "verify against"])
def test_ctrl_c_stops_a_compile_and_leaves_nothing(moment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_ttrt.compile", "--weights", "random", "--backend",
         "torchscript", "--output", str(tmp_path / "a")], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # jobs behind ignore it
    for line in process.stderr:
        if moment in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 2, rest
    assert "interrupted; nothing was written" in rest and not list(tmp_path.iterdir())


@pytest.fixture
def classified(demo_artifact, tmp_path, capsys):
    """A function that classifies a picture: exit code and standard error."""
    scenes.to_image(scenes.held_out_set(per_class=1)[0][0]).save(tmp_path / "a.png")

    def run(*labels, folder=demo_artifact.folder):
        code = cli.main(["classify", str(folder), "--image", str(tmp_path / "a.png"),
                         "--labels", *map(str, labels)])
        return code, capsys.readouterr().err
    return run


def test_words_that_the_embedded_model_never_saw_are_named(classified, demo_artifact, tmp_path):
    code, said = classified("a photo of two Red circles, on a blue background", "a tabby cat!")
    assert code == 0 and "never trained on tabby, cat, !: " in said
    assert classified("two red circles", "one large star at the top") == (0, "")
    other = shutil.copytree(demo_artifact.folder, tmp_path / "copy")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["weights"] |= {"kind": "random", "seed": 0}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert classified("a tabby cat", "a dog", folder=other) == (0, "")


def test_labels_that_cannot_be(classified, tmp_path):
    for content in (b"alone\n\n", b"a\n\xff\n"):
        (tmp_path / "labels.txt").write_bytes(content)
        code, said = classified(tmp_path / "labels.txt")
        assert code == 2 and "at least two" in said and len(said.splitlines()) == 1
    for labels, sentence in ((["a cat"], "'a cat' is one text and no file"),
                             (["word " * 90], "is one text and no file"),
                             (["word " * 90, "b"], "too long")):
        code, said = classified(*labels)
        assert code == 2 and sentence in said
    (tmp_path / "a.png").write_text("no picture")
    code, said = classified("a", "b")
    assert code == 2 and "cannot identify image file" in said
    assert classify.read_labels(["a", str(tmp_path / "a.png")])[1].endswith("a.png")


def test_progress_on_a_terminal_is_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress.Progress(stream).stage("work") as result:
        assert stream.getvalue() == "work ..."
    assert stream.getvalue() == f"work ...\r\x1b[Kwork: {result['seconds']:.1f} s\n"
