"""The commands as a user types them: output, files and exit codes."""
import dataclasses
import importlib
import inspect
import io
import json
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt import accuracy, classify, engine, progress, shell, verify
from clip_ttrt.demo import scenes
from clip_ttrt.options import Options


def command(*arguments, **settings):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, **settings)


def test_the_function_stays_one_and_shows_its_options():
    program = importlib.import_module("clip_ttrt.compile")
    assert callable(program.main) and clip_ttrt.compile is engine.compile
    parameters = inspect.signature(clip_ttrt.compile).parameters
    assert list(parameters) == [*(field.name for field in dataclasses.fields(Options)), "progress"]
    assert parameters["precision"].default == Options().precision == "fp16"
    with pytest.raises(TypeError, match="precison"):
        clip_ttrt.compile(precison="fp16")


def test_the_programs_do_not_shadow_the_function():
    done = command("clip_ttrt.compile", "--help")
    assert done.returncode == 0 and "RuntimeWarning" not in done.stderr
    assert callable(clip_ttrt.compile)


def test_compile_writes_prints_and_classify_reads(tmp_path):
    done = command("clip_ttrt.compile", "--precision", "fp16", "--batch", "1:4:8", "--backend", "torchscript", "--output", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert "verify against the original model" in done.stderr and "\r" not in done.stderr and "\x1b" not in done.stderr
    assert "Warning" not in done.stderr
    header, image, text, top1, wrote = done.stdout.splitlines()
    assert header.split()[0] == "encoder" and image.startswith("image") and text.startswith("text")
    assert "(verified)" in wrote
    images, labels = scenes.held_out_set(per_class=1)
    Image.fromarray(images[3].permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    captions = scenes.held_out_classes()
    right = captions[labels[3]]
    done = command("clip_ttrt.classify", str(tmp_path / "a"), "--image", str(tmp_path / "scene.png"), "--labels", captions[50], right, captions[90])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].endswith(right)
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.1)


def test_verify_prints_and_writes_json(demo_artifact, tmp_path, capsys):
    assert verify.main([str(demo_artifact.folder), "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert printed.splitlines()[-1] == "passed" and "zero-shot top-1" in printed
    assert set(report["errors"]) == {"image", "text", "logits"}
    assert report["top1"]["compiled"] == pytest.approx(report["top1"]["reference"], abs=accuracy.TOP1_BOUND["fp16"])


def test_verify_fails_with_exit_code_1(demo_artifact, monkeypatch, capsys):
    original = accuracy.reference_features

    def shifted(*arguments):
        return {name: features + 0.1 for name, features in original(*arguments).items()}

    monkeypatch.setattr(accuracy, "reference_features", shifted)
    assert shell.run(verify.main, [str(demo_artifact.folder)]) == 1
    assert "FAILED: image: smallest cosine" in capsys.readouterr().out


BAD_INPUT = [
    (["--model", "ViT-H/14"], "unknown model 'ViT-H/14'; known: demo, ViT-B/32"),
    (["--model", "RN50"], "not supported yet"),
    (["--weights", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--batch", "8:4:2"], "bad batch range"),
    (["--batch", "many"], "bad batch range"),
    (["--precision", "fp8"], "unknown precision 'fp8'"),
    (["--output", "/proc/nowhere/a"], "cannot be written"),
    (["--model", "ViT-B/32", "--weights", "demo"], "are not ViT-B/32"),
]


@pytest.mark.parametrize("arguments, sentence", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys):
    main = runpy.run_module("clip_ttrt.compile", run_name="not_main")["main"]
    arguments = arguments if "--output" in arguments else [*arguments, "--output", str(tmp_path / "a")]
    assert shell.run(main, ["--backend", "torchscript", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("clip_ttrt: ") and sentence in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not list(tmp_path.iterdir())


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = command("clip_ttrt.compile", "--model", "nothing", "--output", str(tmp_path / "a"))
    assert done.returncode == 2 and done.stderr.startswith("clip_ttrt: unknown model") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("raised, sentence", [(KeyboardInterrupt(), "interrupted"), (torch.cuda.OutOfMemoryError("full"), "out of GPU memory")])
def test_interruptions_are_one_sentence_too(raised, sentence, capsys):
    def main(arguments):
        raise raised

    assert shell.run(main) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["RANDOM weights", "export the image encoder", "verify against"])
def test_ctrl_c_stops_a_compile_and_leaves_nothing(moment, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "clip_ttrt.compile", "--weights", "random", "--backend", "torchscript", "--output", str(tmp_path / "a")],
                               stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it
    for line in process.stderr:
        if moment in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 2, rest
    assert "interrupted; nothing was written" in rest
    assert not list(tmp_path.iterdir())


def test_classify_with_a_file_that_is_no_picture(demo_artifact, tmp_path, capsys):
    (tmp_path / "a.png").write_text("no picture")
    assert shell.run(classify.main, [str(demo_artifact.folder), "--image", str(tmp_path / "a.png"), "--labels", "a", "b"]) == 2
    assert "is not a picture" in capsys.readouterr().err


def test_classify_with_a_label_that_is_too_long(demo_artifact, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert shell.run(classify.main, [str(demo_artifact.folder), "--image", str(tmp_path / "a.png"), "--labels", "word " * 90]) == 2
    assert "too long" in capsys.readouterr().err


def test_progress_on_a_terminal_is_one_live_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress.Progress(stream).stage("work") as result:
        pass
    assert stream.getvalue().startswith("\r\x1b[Kwork ... 0 s") and stream.getvalue().splitlines()[-1].endswith("work: 0.0 s")
    assert result["seconds"] >= 0
