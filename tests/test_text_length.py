"""Text length: trimming behind the end of text is exact, and cutting an end off is seen."""
import pytest
import torch

from clip_ttrt import lowering
from clip_ttrt.accuracy import errors
from clip_ttrt.checkpoint import load_checkpoint
from experiments import text_length
from experiments.prompts import CLASSES, TEMPLATES, prompts
from experiments.record import read_rows


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint("demo")


@pytest.mark.parametrize("backend", ["clip_ttrt_native", "eager_sdpa"])
def test_features_of_a_bucket_are_those_of_the_full_length(backend, checkpoint):
    whole, _, _ = text_length.encoder_of(backend, checkpoint, "fp32", 4, 77, "cpu")
    short, attention, seconds = text_length.encoder_of(backend, checkpoint, "fp32", 4, 16, "cpu")
    assert attention in ("native", "sdpa") and seconds >= 0
    fits, longer = text_length.texts(4, 16, 77), text_length.texts(4, 17, 77)
    with torch.no_grad():
        assert errors(short(fits[:, :16].contiguous()), whole(fits)).rel_max < text_length.BOUND["fp32"]
        assert errors(short(longer[:, :16].contiguous()), whole(longer)).rel_max > 0.01  # the longest one has lost its end
    if backend == "clip_ttrt_native" and lowering.can_export():
        with pytest.raises(RuntimeError):
            short(fits)  # compiled for 16 tokens and no other length


def test_texts_end_where_they_say():
    rows = text_length.texts(5, 16, 77)
    ends = rows.argmax(dim=1)
    assert ends.tolist() == sorted(ends.tolist(), reverse=True) and ends[0] == 15 and ends[-1] == 2
    assert (rows[:, 0] == text_length.START).all() and (rows.gather(1, ends[:, None]) == text_length.END).all()
    assert all((row[end + 1:] == 0).all() and (row[:end] < text_length.END).all() for row, end in zip(rows, ends))


def test_prompts_and_their_lengths():
    assert len(prompts()) == len(set(prompts())) == len(CLASSES) * len(TEMPLATES) == 1800
    lengths = text_length.prompt_lengths()
    assert lengths[0] == 9  # start, a, photo, of, a, ten, ch, ., end
    assert 8 < lengths.double().mean() < 12 and lengths.max() <= 32


def test_rows_of_the_experiment(tmp_path, monkeypatch, capsys):
    out = tmp_path / "text_length.csv"
    monkeypatch.setattr("sys.argv", ["text_length", "--device", "cpu", "--batch", "2", "--backends", "eager_sdpa", "--buckets", "16", "77", "--out", str(out)])
    assert text_length.main() == 0
    rows = read_rows(out)
    assert [row["tokens"] for row in rows] == ["77", "16"] and rows[0]["max_abs_error"] == "0"
    for row in rows:
        assert 0 < float(row["median_ms"]) <= float(row["p99_ms"]) and float(row["max_rel_error"]) < 1e-5 and row["prompts"] == "1800"
        assert float(row["fit_share"]) == pytest.approx((text_length.prompt_lengths() <= int(row["tokens"])).double().mean().item(), abs=1e-4)
    assert text_length.main() == 0 and read_rows(out) == rows  # nothing is measured twice
