"""The documents' tables: what they hold for made-up CSVs, and that the committed documents hold what the committed CSVs give."""
import json
import re
import shutil
from pathlib import Path

import pytest

from experiments import plot, tables
from made_up import bug_rows, floor_rows, jpeg_rows, ladder_rows, load_rows, retrieval_rows, sweep_row, sweep_rows, text_length_rows, write

ROOT = Path(__file__).parent.parent


def test_committed_documents_hold_what_the_csvs_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("english, chinese", [("README.md", "README.zh-CN.md")])
def test_both_editions_show_the_same_tables_and_figures(english, chinese):
    first, second = (re.findall(r"<!-- (?:table|figure): (\w+) -->", (ROOT / name).read_text(encoding="utf-8")) for name in (english, chinese))
    assert first == second and set(first) & set(tables.FIGURES) and set(first) & set(tables.TABLES)


@pytest.mark.parametrize("path", ["README.md", "README.zh-CN.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_of_the_documents_lead_somewhere(path):
    document = (ROOT / path).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", document) if not link.startswith(("http:", "https:"))]
    missing = [link for link in links if link and not ((ROOT / path).parent / link).exists()]
    assert not missing


def test_documents_are_filled_checked_and_left_alone(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- table: bugs -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "README.zh-CN.md").write_text("<!-- table: bugs -->\n<!-- end -->\n")
    (tmp_path / "docs" / "report.md").write_text("<!-- table: bugs -->\n<!-- end -->\nno table\n")
    write(tmp_path / "results", "bugs.csv", bug_rows())
    assert tables.main(["--check"], tmp_path) == 1
    assert "README.md does not hold" in capsys.readouterr().err and "old" in (tmp_path / "README.md").read_text()
    assert tables.main([], tmp_path) == 0 and tables.main(["--check"], tmp_path) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- table: bugs -->\n| bug | seen |") and readme.endswith("<!-- end -->\nafter\n")
    assert "| [`dropped_mask`](experiments/bugs/dropped_mask.py) | yes | error 0.26 \\| of 1 | made-up GPU |" in readme
    assert "| [`export_python_312`](experiments/bugs/export_python_312.py) | cannot run | needs Python 3.12 | CPU, torch 2.2.0 |" in readme
    assert "| 问题 | 是否重现 |" in (tmp_path / "README.zh-CN.md").read_text(encoding="utf-8")
    assert "](../experiments/bugs/dropped_mask.py)" in (tmp_path / "docs" / "report.md").read_text()


def test_a_plot_stands_in_the_document_once_it_is_drawn(tmp_path):
    document = "<!-- figure: speedup -->\n<!-- end -->\n"
    assert "*Not measured yet.*" in tables.fill(document, tmp_path)
    (tmp_path / "speedup.png").touch()
    assert "](results/speedup.png)" in tables.fill(document, tmp_path) and "](../results/speedup.png)" in tables.fill(document, tmp_path, True, "../")


@pytest.mark.parametrize("kind", ["table", "figure"])
def test_an_unknown_name_is_an_error(kind, tmp_path):
    with pytest.raises(KeyError, match="nonsense"):
        tables.fill(f"<!-- {kind}: nonsense -->\n<!-- end -->\n", tmp_path)


def test_every_plot_has_a_description():
    assert {f"{name}.png" for name in tables.FIGURES} == set(plot.FIGURES)


def test_what_is_not_measured_says_so(tmp_path):
    for name in set(tables.TABLES) - {"hackathon"}:
        assert tables.rendered(name, tmp_path) == "*Not measured yet.*"
        assert tables.rendered(name, tmp_path, True) == "*尚未测量。*"
    assert tables.rendered("hackathon", tmp_path).count("not yet measured") == 8


def test_speed_marks_the_fastest_and_compares_with_the_strongest_other(tmp_path):
    rows = sweep_rows(models=("ViT-B/32",), encoders=("image",))
    for row in rows:
        if row["backend"] == "tensorrt_onnx":
            row["median_ms"], row["error"] = 0.01, "wrong: smallest cosine 0.0004"
    write(tmp_path, "sweep.csv", rows)
    write(tmp_path, "floor.csv", floor_rows())
    line = tables.speed(tmp_path).set_index("batch").loc[32]
    assert line["floor"] == "0.600" and line["original, eager"] == "6.240"  # 8 x 0.6 x 1.3: the original without a CUDA graph
    assert line["clip_ttrt, plugins"] == "**0.900**" and line["TensorRT through ONNX"] == "0.010†" and "ONNX Runtime" not in line
    assert line["times as fast as the original"] == "6.9" and line["of the strongest other"] == "0.75" and line["of the floor"] == "1.50"
    assert set(tables.speed_short(tmp_path)["batch"]) == {1, 32, 128}


def test_aims_say_by_how_much(tmp_path):
    rows = [row for row in sweep_rows() if row["encoder"] == "image"]
    for row in rows:
        if row["backend"] == "torch_compile_reduce_overhead" and row["batch"] == 1:
            row["median_ms"] = 0.1
    write(tmp_path, "sweep.csv", rows)
    found = tables.aims(tmp_path)
    assert list(zip(found["model"], found["batch"])) == [("ViT-B/32", 1), ("ViT-B/32", 32), ("ViT-B/32", 128), ("ViT-L/14", 32)]
    assert found["ours of the strongest"].tolist() == ["3.19", "0.75", "0.75", "0.75"]
    assert set(found["strongest other"]) == {"torch.compile reduce-overhead"}


def test_hackathon_puts_the_entry_beside_ours(tmp_path):
    rows = [sweep_row("ViT-B/32", "image", backend, batch, graph, ms, precision=precision)
            for backend, graph, ms in (("clip_eager", False, 60.0), ("torch_compile_max_autotune", True, 33.0), ("clip_ttrt_plugin", True, 30.0))
            for precision, batch in (("fp16", 1024), ("fp32", 1024))]
    write(tmp_path, "sweep.csv", rows)
    found = tables.hackathon(tmp_path).set_index(["precision", "batch"])
    assert found.loc[("fp16", 1024), ["entry of 2022, A10", "against the original", "against the strongest other"]].tolist() == ["2.18", "2.00", "1.10"]
    assert found.loc[("fp16", 64), "against the original"] == "not yet measured"


def test_ladder_relates_each_step_to_the_one_before(tmp_path):
    write(tmp_path, "ladder.csv", ladder_rows())
    found = tables.ladder(tmp_path).set_index("step")
    assert found["of the step before"].tolist() == ["", "0.50", "0.50", "0.83"]
    assert found["of the original"].tolist() == ["1.00", "0.50", "0.25", "0.21"]
    assert found.loc["one engine, stock", "remark"] == "wrong: cosine 0" and found["ms, CUDA graph"].iloc[0] == ""


def test_load_text_length_retrieval_and_jpeg(tmp_path):
    write(tmp_path, "load.csv", load_rows())
    write(tmp_path, "text_length.csv", text_length_rows())
    write(tmp_path, "retrieval.csv", retrieval_rows())
    write(tmp_path, "jpeg.csv", jpeg_rows())
    assert tables.load(tmp_path)["items a second"].tolist() == ["5,500", "7,778", "11,000", "15,556"]
    found = tables.text_length(tmp_path)
    assert found[found["tokens"] == "16"]["of 77 tokens"].tolist() == ["0.21", "0.21"] and set(found["prompts that fit"]) == {"95%", "100%"}
    assert tables.retrieval(tmp_path)["top-1 %"].tolist() == ["99.50 / 99.25"]
    assert tables.jpeg(tmp_path)["encode"].tolist() == ["10.0%"] * 4


def test_accuracy_short_keeps_the_worst(tmp_path):
    (tmp_path / "h200").mkdir()
    shutil.copy(ROOT / "results" / "h200" / "accuracy.csv", tmp_path / "h200")
    short, full = tables.accuracy_short(tmp_path), tables.accuracy(tmp_path)
    for _, line in short.iterrows():
        rows = full[(full["model"] == line["model"]) & (full["encoder"] == line["encoder"]) & (full["precision"] == line["precision"])]
        assert len(rows) == line["configurations"]
        assert float(line["rel max"]) == max(map(float, rows["rel max"])) and float(line["cos min"]) == min(map(float, rows["cos min"]))
    shutil.copy(ROOT / "results" / "h200" / "accuracy_level_0.csv", tmp_path / "h200")
    both = tables.accuracy_short(tmp_path)
    assert both["configurations"].sum() == short["configurations"].sum() + (tables.accuracy_level_0(tmp_path)["encoder"] != "logits").sum()


def test_profile_and_attention_of_the_committed_csvs():
    sums = tables.profile(ROOT / "results").set_index("kind of kernel").loc["sum"].astype(float)
    assert sums["native"] > sums["plugin"] > 0
    assert len(tables.attention(ROOT / "results")) > 10


def test_environment_names_gpu_and_versions(tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "environment.json").write_text(json.dumps(
        {"gpu": {"name": "GPU", "compute_capability": "9.0"}, "driver": "1", "processor": "CPU", "cores": 2, "kernel": "6", "python": "3.10", "versions": {"torch": "2.2.0"}, "commit": "0"}))
    assert "| GPU | GPU, compute capability 9.0 |" in tables.rendered("environment", tmp_path)
    assert "| 项目 | 内容 |" in tables.rendered("environment", tmp_path, True)
