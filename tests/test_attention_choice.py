"""`--attention auto` decides each encoder from measurements, and says from which."""
import csv
from types import SimpleNamespace

import pytest

from clip_ttrt import attention_choice, plugin
from clip_ttrt.attention_choice import choose
from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from experiments import choose_attention

B32, L14 = MODELS["ViT-B/32"], MODELS["ViT-L/14"]
RANGE, STATIC = BatchRange(1, 32, 256), BatchRange(32, 32, 32)
shipped, load_library = attention_choice.measurements, plugin.library  # before the fixture replaces them
ROWS = [("12", "50", "0", "1:32:256", "1.2", "1.3"), ("12", "50", "0", "32", "1.1", "1.0"), ("12", "50", "0", "1", "0.3", "0.4"), ("8", "77", "1", "32", "1.3", "0.8")]


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    """A made-up table on a made-up GPU, and a library that is there with its plugins."""
    with open(tmp_path / "measured.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(attention_choice.COLUMNS)
        writer.writerows(["Some GPU", *row, "abc"] for row in ROWS)
    rows = attention_choice.measurements(tmp_path / "measured.csv")
    monkeypatch.setattr(attention_choice, "measurements", lambda: rows)
    monkeypatch.setattr("clip_ttrt.backends.gpu", lambda: {"name": "Some GPU"})
    monkeypatch.setattr(plugin, "library", lambda: SimpleNamespace(**dict.fromkeys(plugin.REGISTER)))


@pytest.mark.parametrize("batch, expected, said", [(RANGE, "native", "1:32:256"), (STATIC, "plugin", "batch 32"), (BatchRange(2, 2, 2), "native", "batch 1:"),
                                                   (BatchRange(64, 64, 64), "plugin", "batch 32"), (BatchRange(1, 8, 16), "native", "1:32:256")], ids=str)
def test_the_nearest_batch_of_the_same_kind_decides(batch, expected, said):
    choice = choose("auto", "tensorrt", "fp16", B32, "image", batch)
    assert choice.attention == expected and said in choice.reason and " ms" in choice.reason


def test_each_encoder_has_its_own():
    assert choose("auto", "tensorrt", "fp16", B32, "text", RANGE).attention == "plugin"  # only a static batch was measured


def test_what_was_not_measured_gets_the_plugin_and_says_so(monkeypatch):
    choice = choose("auto", "tensorrt", "fp16", L14, "image", RANGE)
    assert choice.attention == "plugin" and "16 heads of 257 tokens were not measured" in choice.reason
    monkeypatch.setattr("clip_ttrt.backends.gpu", lambda: {"name": "Another GPU"})
    assert "not measured on Another GPU" in choose("auto", "tensorrt", "fp16", B32, "image", STATIC).reason


def test_what_is_asked_for_is_not_second_guessed():
    assert choose("plugin", "tensorrt", "fp16", B32, "image", RANGE) == ("plugin", "as asked")
    assert choose("native", "tensorrt", "fp16", B32, "text", RANGE) == ("native", "as asked")


@pytest.mark.parametrize("backend, precision, obstacle", [("torchscript", "fp16", "TensorRT backend"), ("tensorrt", "fp32", "computes in fp16")])
def test_where_the_plugin_cannot_be(backend, precision, obstacle):
    assert choose("auto", backend, precision, B32, "image", RANGE).attention == "native"
    with pytest.raises(UserError, match=obstacle):
        choose("plugin", backend, precision, B32, "image", RANGE)


def test_a_library_without_the_plugins_is_none(monkeypatch):
    """As `python -m kernels.build` makes it without TensorRT's headers."""
    monkeypatch.setattr(plugin, "library", lambda: SimpleNamespace(clip_attention_launch=None))
    choice = choose("auto", "tensorrt", "fp16", B32, "text", RANGE)
    assert choice.attention == "native" and "built without the TensorRT plugin" in choice.reason and "TENSORRT_INCLUDE_DIR" in choice.reason
    for refused in (lambda: choose("plugin", "tensorrt", "fp16", B32, "text", RANGE), lambda: plugin.load(plugin.VERSION)):
        with pytest.raises(UserError, match="built without the TensorRT plugin"):
            refused()


def test_a_library_that_cannot_be_loaded_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "LIBRARY", tmp_path / "measured.csv")
    monkeypatch.setattr(plugin, "library", load_library)
    load_library.cache_clear()
    choice = choose("auto", "tensorrt", "fp16", B32, "text", RANGE)
    assert choice.attention == "native" and "measured.csv cannot be loaded" in choice.reason


def test_the_shipped_table_can_be_read():
    rows = shipped(attention_choice.MEASURED)
    assert rows
    for row in rows:
        assert tuple(row) == attention_choice.COLUMNS and float(row["native_ms"]) > 0 and float(row["plugin_ms"]) > 0 and row["gpu"]
        BatchRange.parse(row["batch"])


def test_a_library_that_cannot_be_loaded_is_a_warning_of_the_import(monkeypatch, tmp_path):
    """`import clip_ttrt` registers the plugins for plain torch.jit.load; a broken library must not break it."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(plugin, "LIBRARY", broken)
    monkeypatch.setattr(plugin, "library", load_library)
    load_library.cache_clear()
    with pytest.warns(UserWarning, match="broken.so cannot be loaded"):
        plugin.register()
    monkeypatch.setattr(plugin, "LIBRARY", tmp_path / "absent.so")
    plugin.register()  # nothing to say where nothing is built


def test_the_table_is_made_of_pairs_and_a_call_in_a_verification_is_for_shapes_that_nothing_else_measured(tmp_path, monkeypatch):
    def write(name, rows):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    where = {"gpu": "Some GPU", "commit": "abc", "precision": "fp16"}
    call = {"model": "ViT-B/32", "encoder": "image", "batch": "32", **where}
    write("verified_speed.csv", [{**call, "attention": "native", "ms": "3.0"}, {**call, "attention": "plugin", "ms": "2.0"},
                                 {**call, "model": "ViT-L/14", "encoder": "text", "attention": "native", "ms": "5.0"},
                                 {**call, "model": "ViT-L/14", "encoder": "text", "attention": "plugin", "ms": "4.0"},
                                 {**call, "batch": "1:4:8", "attention": "native", "ms": "0.1"}, {**call, "batch": "1:4:8", "attention": "plugin", "ms": "0.2"},
                                 {**call, "model": "ViT-B/16", "attention": "plugin", "ms": "1.0"}])
    write("dynamic_batch.csv", [{**call, "range": "1:32:256", "attention": kind, "static_ms": ms, "dynamic_ms": ms} for kind, ms in (("native", "1.5"), ("plugin", "1.0"))])
    monkeypatch.setattr("sys.argv", ["choose_attention", "--results", str(tmp_path), "--out", str(tmp_path / "table.csv")])
    choose_attention.main()
    rows = shipped(tmp_path / "table.csv")
    assert [(row["heads"], row["tokens"], row["batch"], row["native_ms"], row["plugin_ms"]) for row in rows] == [
        ("12", "50", "1:32:256", "1.5", "1.0"), ("12", "50", "32", "1.5", "1.0"), ("12", "77", "32", "5.0", "4.0")]
