"""From JPEG files: the stages together are OpenAI's preprocessing, and their times add up."""
import subprocess
import sys

import pytest
import torch

from clip_ttrt import pictures
from clip_ttrt.model import preprocess
from experiments import jpeg
from experiments.record import read_rows


def test_stages_together_are_the_preprocessing(tmp_path):
    from PIL import Image

    stages, files = jpeg.Stages(112), jpeg.copies(tmp_path, 10)
    assert [path.read_bytes() for path in files[8:]] == [path.read_bytes() for path in files[:2]]
    expected, _ = pictures.load(112)
    for path, row in zip(files, expected):
        actual, seconds = stages(path)
        assert torch.equal(actual, row) and torch.equal(actual, preprocess(112)(Image.open(path)))
        assert len(seconds) == 3 and all(second >= 0 for second in seconds) and sum(seconds) > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_every_file_is_encoded_once_and_in_order(tmp_path, workers):
    files = jpeg.copies(tmp_path, 8)
    encoder = jpeg.Encoder(lambda rows: rows.mean(dim=(2, 3)), 4, 32, "cpu")
    wall, each, features = jpeg.measure(files, jpeg.Stages(32), encoder, 4, workers)
    expected, _ = pictures.load(32)
    assert torch.allclose(features, expected.mean(dim=(2, 3)), atol=1e-6)
    assert tuple(each) == jpeg.STAGES and all(value >= 0 for value in each.values())
    assert sum(each[name] for name in ("copy", "encode")) * len(files) <= wall * 1e3


def test_a_row_for_each_number_of_workers(tmp_path):
    out = tmp_path / "jpeg.csv"
    command = [sys.executable, "-m", "experiments.jpeg", "--device", "cpu", "--batch", "4", "--images", "6", "--range", "4", "--workers", "1", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(out)
    assert [(row["workers"], row["images"]) for row in rows] == [("1", "8"), ("2", "8")]
    for row in rows:
        assert float(row["images_per_second"]) > 0 and float(row["encode_ms"]) > 0
        assert sum(float(row[f"{name}_share"]) for name in jpeg.STAGES) == pytest.approx(1, abs=1e-3)


def test_a_backend_that_cannot_run_here_says_so(tmp_path):
    done = subprocess.run([sys.executable, "-m", "experiments.jpeg", "--device", "cpu", "--backend", "tensorrt_onnx", "--out", str(tmp_path / "jpeg.csv")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().endswith("tensorrt_onnx cannot run here: TensorRT needs a GPU")
