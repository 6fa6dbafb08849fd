"""The documents' tables: what they hold for made-up CSVs, and that the committed documents hold what the committed CSVs give."""
import json
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

from experiments import environment, plot, tables
from experiments.results import NoData, gpus, read_csv
from made_up import bug_rows, jpeg_rows, ladder_rows, load_rows, retrieval_rows, sweep_row, sweep_rows, text_length_rows, write

ROOT = Path(__file__).parent.parent


def test_committed_documents_hold_what_the_csvs_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("english, chinese", [("README.md", "README.zh-CN.md")])
def test_both_editions_show_the_same_tables_and_figures(english, chinese):
    first, second = (re.findall(r"<!-- (?:table|figure): (\S+) -->", (ROOT / name).read_text(encoding="utf-8")) for name in (english, chinese))
    assert first == second and set(first) & set(tables.FIGURES) and set(first) & set(tables.TABLES)


def test_committed_rows_lie_in_the_folder_of_their_gpu():
    for gpu in gpus(ROOT / "results"):
        for path in (ROOT / "results" / gpu).glob("*.csv"):
            names = set(read_csv(path)["gpu"].dropna())
            assert all(gpu.upper() in name for name in names) and (names or path.name == "bugs.csv"), f"{path} has rows of {names}"


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


@pytest.mark.parametrize("kind, known", [("table", "hackathon"), ("figure", "ladder")])
def test_an_unknown_name_is_an_error(kind, known, tmp_path):
    (tmp_path / "h100").mkdir()
    for name, said in (("nonsense", "nonsense"), ("nonsense@h100", "nonsense"), (f"{known}@", f"{known}@"), ("@h100", "''")):
        with pytest.raises(KeyError, match=said):
            tables.fill(f"<!-- {kind}: {name} -->\n<!-- end -->\n", tmp_path)


def test_every_plot_has_a_description():
    assert {f"{name}.png" for name in tables.FIGURES} == set(plot.FIGURES)


def test_what_is_not_measured_says_so(tmp_path):
    for name in tables.TABLES:
        assert tables.rendered(name, tmp_path) == tables.rendered(f"{name}@h100", tmp_path) == "*Not measured yet.*"
        assert tables.rendered(name, tmp_path, True) == tables.rendered(f"{name}@h100", tmp_path, True) == "*尚未测量。*"
    (tmp_path / "h100").mkdir()
    for name in set(tables.TABLES) - {"hackathon"}:
        assert tables.rendered(f"{name}@h100", tmp_path) == "*Not measured yet.*"
    assert tables.rendered("hackathon@h100", tmp_path).count("not yet measured") == 8
    assert tables.rendered("hackathon", tmp_path) == "*Not measured yet.*"


def test_a_table_is_of_the_folder_that_its_marker_names(tmp_path):
    """The hackathon's cases on two GPUs: the second has no sweep but of these, and none in fp32."""
    def rows(batches, factor, **other):
        times = (("clip_eager", False, 0.06), ("torch_compile_reduce_overhead", True, 0.033), ("clip_ttrt_plugin_range", True, 0.03 if factor == 1 else 0.02))
        return [sweep_row("ViT-B/32", "image", backend, batch, graph, ms * batch * factor, floor_ms="", **other) for batch in batches for backend, graph, ms in times]

    write(tmp_path, "sweep.csv", rows((64, 768, 1024), 2, gpu="another GPU"))
    (tmp_path / "h200").rename(tmp_path / "h100")
    write(tmp_path, "sweep.csv", rows((64,), 1) + rows((1024,), 1, precision="fp32"))
    names = ("hackathon@h100", "hackathon", "hackathon@h1000", "hackathon@h200")
    lines = tables.fill("".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in names), tmp_path).splitlines()
    heading = ("| precision | batch | entry of 2022, A10 | original, eager | ours ms | against the original | strongest other | its ms "
               "| against the strongest other | of the floor | error of the entry | our abs max |")
    other, unmeasured = "torch.compile reduce-overhead", "| not yet measured |  |  | not yet measured |  | "
    first = [
        "| fp16 | 64 | 6.73 | 7.680 | 2.560 | 3.00 | " + other + " | 4.224 | 1.65 |  | 1e-2 |  |",
        "| fp16 | 768 | 2.35 | 92.160 | 30.720 | 3.00 | " + other + " | 50.688 | 1.65 |  | 1e-2 |  |",
        "| fp16 | 1024 | 2.18 | 122.880 | 40.960 | 3.00 | " + other + " | 67.584 | 1.65 |  | 1e-2 |  |",
        "| fp32 | 1024 | 0.82 |  |  " + unmeasured + "6e-4 |  |",
    ]
    second = [
        "| fp16 | 64 | 6.73 | 3.840 | 1.920 | 2.00 | " + other + " | 2.112 | 1.10 |  | 1e-2 |  |",
        "| fp16 | 768 | 2.35 |  |  " + unmeasured + "1e-2 |  |",
        "| fp16 | 1024 | 2.18 |  |  " + unmeasured + "1e-2 |  |",
        "| fp32 | 1024 | 0.82 | 61.440 | 30.720 | 2.00 | " + other + " | 33.792 | 1.10 |  | 6e-4 |  |",
    ]
    rule = "|" + " --- |" * 12
    assert lines == ["<!-- table: hackathon@h100 -->", heading, rule, *first, "<!-- end -->",
                     "<!-- table: hackathon -->", heading, rule, *second, "<!-- end -->",
                     "<!-- table: hackathon@h1000 -->", "*Not measured yet.*", "<!-- end -->",
                     "<!-- table: hackathon@h200 -->", heading, rule, *second, "<!-- end -->"]
    for name in ("speed", "speed_short", "aims", "ladder"):  # no case of theirs is in the second GPU's sweep
        assert tables.rendered(f"{name}@h100", tmp_path) == "*Not measured yet.*"


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_of_another_gpu(name, chinese, tmp_path):
    (tmp_path / "h100").symlink_to(ROOT / "results" / "h200")
    table = tables.rendered(f"{name}@h100", tmp_path, chinese)
    assert table.startswith("| ") and table.count("\n") >= 2
    assert table == tables.rendered(name, ROOT / "results", chinese)
    assert tables.rendered(name, tmp_path, chinese) == tables.MISSING[chinese]


def test_tables_without_floors_leave_their_columns_out(tmp_path):
    write(tmp_path, "sweep.csv", [{**row, "floor_ms": ""} for row in sweep_rows(models=("ViT-B/32",), encoders=("image",))])
    (tmp_path / "h200").rename(tmp_path / "h100")
    heading, _, *lines = tables.rendered("speed@h100", tmp_path).splitlines()
    assert len(lines) == 5 and "floor" not in heading and "| of the strongest other |" in heading
    [first, *_] = tables.rendered("aims@h100", tmp_path).splitlines()[2:]
    assert first.startswith("| ViT-B/32 | image | 1 | clip_ttrt, plugins | 0.319 | torch.compile reduce-overhead |")


def test_documents_of_two_gpus_are_filled_and_checked(tmp_path, capsys):
    write(tmp_path / "results", "ladder.csv", [{**row, "median_ms": 2 * row["median_ms"]} for row in ladder_rows()])
    (tmp_path / "results" / "h200").rename(tmp_path / "results" / "h100")
    write(tmp_path / "results", "ladder.csv", ladder_rows())
    (tmp_path / "README.md").write_text("<!-- table: ladder -->\n<!-- end -->\n\n<!-- table: ladder@h100 -->\n<!-- end -->\n")
    assert tables.main(["--check"], tmp_path) == 1 and tables.main([], tmp_path) == 0 and tables.main(["--check"], tmp_path) == 0
    usual, other = (tmp_path / "README.md").read_text().split("\n\n")
    assert "| plugins | 1.500 |" in usual and "| plugins | 3.000 |" not in usual
    assert "| plugins | 3.000 |" in other and "| plugins | 1.500 |" not in other
    write(tmp_path / "results" / "new", "ladder.csv", ladder_rows())
    (tmp_path / "results" / "new" / "h200" / "ladder.csv").replace(tmp_path / "results" / "h100" / "ladder.csv")
    capsys.readouterr()
    assert tables.main(["--check"], tmp_path) == 1 and "README.md does not hold" in capsys.readouterr().err


def test_a_plot_is_of_the_folder_that_its_marker_names(tmp_path):
    document = "<!-- figure: ladder@h100 -->\n<!-- end -->\n"
    (tmp_path / "ladder.png").touch()
    assert "*Not measured yet.*" in tables.fill(document, tmp_path) and "*尚未测量。*" in tables.fill(document, tmp_path, True)
    (tmp_path / "ladder-h100.png").touch()
    shown = "![milliseconds after each step of the optimisation, H100](results/ladder-h100.png)\n"
    assert tables.fill(document, tmp_path) == document.replace("<!-- end", f"{shown}<!-- end")
    assert "](../results/ladder-h100.png)" in tables.fill(document, tmp_path, True, "../")
    for name in ("ladder", "ladder@h200"):
        assert "](results/ladder.png)" in tables.fill(document.replace("ladder@h100", name), tmp_path)
    assert "*Not measured yet.*" in tables.fill(document.replace("h100", "h1000"), tmp_path)


def test_speed_marks_the_fastest_and_compares_with_the_strongest_other(tmp_path):
    rows = sweep_rows(models=("ViT-B/32",), encoders=("image",))
    for row in rows:
        if row["backend"] == "tensorrt_onnx":
            row["median_ms"], row["error"] = 0.01, "wrong: smallest cosine 0.0004"
    write(tmp_path, "sweep.csv", rows)
    line = tables.speed(tmp_path / "h200").set_index("batch").loc[32]
    assert line["floor"] == "0.600" and line["original, eager"] == "6.240"  # 8 x 0.6 x 1.3: the original without a CUDA graph
    assert line["clip_ttrt, plugins"] == "**0.900**" and line["TensorRT through ONNX"] == "0.010†" and "ONNX Runtime" not in line
    assert line["times as fast as the original"] == "6.9" and line["of the strongest other"] == "0.75" and line["of the floor"] == "1.50"
    assert set(tables.speed_short(tmp_path / "h200")["batch"]) == {1, 32, 128}
    with pytest.raises(tables.NoData):  # none of its batches
        tables.speed_hackathon(tmp_path / "h200")
    write(tmp_path, "sweep.csv", [sweep_row("ViT-B/32", "image", "clip_ttrt_plugin", 768, True, 9.0), sweep_row("ViT-L/14", "image", "clip_ttrt_plugin", 768, True, 9.0), *sweep_rows()])
    found = tables.speed_hackathon(tmp_path / "h200")
    assert list(zip(found["model"], found["batch"])) == [("ViT-B/32", 768)]


def test_aims_say_by_how_much(tmp_path):
    rows = [row for row in sweep_rows() if row["encoder"] == "image"]
    for row in rows:
        if row["backend"] == "torch_compile_reduce_overhead" and row["batch"] == 1:
            row["median_ms"] = 0.1
    write(tmp_path, "sweep.csv", rows)
    found = tables.aims(tmp_path / "h200")
    assert list(zip(found["model"], found["batch"])) == [("ViT-B/32", 1), ("ViT-B/32", 32), ("ViT-B/32", 128), ("ViT-L/14", 32)]
    assert found["ours of the strongest"].tolist() == ["3.19", "0.75", "0.75", "0.75"]
    assert set(found["strongest other"]) == {"torch.compile reduce-overhead"}


def test_hackathon_puts_the_entry_beside_ours(tmp_path):
    rows = [sweep_row("ViT-B/32", "image", backend, batch, graph, ms, precision=precision, attention=attention if precision == "fp16" else "native", floor_ms=25.0 if precision == "fp16" else "")
            for backend, graph, ms, attention in (("clip_eager", False, 60.0, ""), ("torch_compile_max_autotune", True, 33.0, "sdpa"), ("clip_ttrt_plugin", True, 30.0, "plugin 64:1024:1024"))
            for precision, batch in (("fp16", 1024), ("fp32", 1024))]
    rows.append(sweep_row("ViT-B/32", "image", "clip_eager", 64, False, 9.0))  # beside nothing of ours
    write(tmp_path, "sweep.csv", rows)
    write(tmp_path, "accuracy.csv", [{"model": "ViT-B/32", "encoder": encoder, "attention": attention, "precision": precision, "batch": batch, "abs_max": error}
                                     for encoder, attention, precision, batch, error in (
                                         ("image", "plugin", "fp16", "64:1024:1024", 0.0038), ("image", "plugin", "fp16", "1024", 0.1), ("text", "plugin", "fp16", "64:1024:1024", 0.2),
                                         ("image", "native", "fp32", "1024", 0.0000012))])
    found = tables.hackathon(tmp_path / "h200").set_index(["precision", "batch"])
    assert found["of the floor"].tolist() == ["", "", "1.20", ""]
    assert found["error of the entry"].tolist() == ["1e-2", "1e-2", "1e-2", "6e-4"] and found["our abs max"].tolist() == ["", "", "3.8e-03", "1.2e-06"]
    assert found.loc[("fp16", 64), "original, eager"] == found.loc[("fp16", 64), "strongest other"] == ""
    assert found.loc[("fp16", 1024), ["entry of 2022, A10", "against the original", "against the strongest other"]].tolist() == ["2.18", "2.00", "1.10"]
    assert found.loc[("fp16", 64), "against the original"] == "not yet measured"


def test_native_range_stands_beside_a_static_engine(tmp_path):
    def row(recipe, batch, ms, ratio="", error="", commit="0123456789"):
        return {"model": "ViT-B/32", "encoder": "image", "range": "1:32:256", "recipe": recipe, "batch": batch, "median_ms": ms, "of_static": ratio,
                "cos_min": 0.99999 - batch / 1e8 if ms else "", "build_s": 50.5, "engine_mib": 168.4, "error": error, "commit": commit}

    write(tmp_path, "native_range.csv", [row("static", 32, 1.0, 1.0), row("range as it comes", 32, 1.25, 1.25), row("range as it comes", 256, 8.0),
                                         row("range, powers of two", 32, "", error="its engine is not there"),
                                         row("range as it comes", 32, 1.5, 1.2, commit="another")])
    found = tables.native_range(tmp_path / "h200").set_index("recipe")
    assert list(found.index) == ["static", "range as it comes", "range as it comes"] and found["commit"].tolist() == ["0123456789"] * 2 + ["another"]
    assert found["of static"].tolist() == ["1.000", "1.250", "1.200"]
    assert found["ms at 32"].tolist() == ["1.000", "1.250", "1.500"] and found["ms at 256"].tolist() == ["", "8.000", ""]
    assert found["smallest cosine"].tolist() == ["0.9999897", "0.9999874", "0.9999897"] and set(found["engine MiB"]) == {"168.4"}
    write(tmp_path, "native_range.csv", [row("static", 32, "", error="its engine is not there")])
    with pytest.raises(NoData):
        tables.native_range(tmp_path / "h200")


def test_an_environment_without_nvidia_smi(tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"gpu": {}, "driver": "", "processor": "made up", "cores": 2, "kernel": "6", "python": "3.11.7",
                                                           "versions": {"clip_ttrt": "0.1.0", "torch": "2.2.0"}}))
    found = tables.environment(tmp_path).set_index("what")["value"]
    assert found["driver, memory, clock"] == "" and found["processor"] == "made up, 2 cores" and found["torch"] == "2.2.0" and "clip_ttrt" not in found


def test_ladder_relates_each_step_to_the_one_before(tmp_path):
    write(tmp_path, "ladder.csv", ladder_rows())
    found = tables.ladder(tmp_path / "h200").set_index("step")
    assert found["of the step before"].tolist() == ["", "0.50", "0.50", "0.83"]
    assert found["of the original"].tolist() == ["1.00", "0.50", "0.25", "0.21"]
    assert found.loc["one engine, stock", "remark"] == "wrong: cosine 0" and found["ms, CUDA graph"].iloc[0] == ""


def test_load_text_length_retrieval_and_jpeg(tmp_path):
    write(tmp_path, "load.csv", load_rows())
    write(tmp_path, "text_length.csv", text_length_rows())
    write(tmp_path, "retrieval.csv", retrieval_rows())
    write(tmp_path, "jpeg.csv", jpeg_rows())
    assert tables.load(tmp_path / "h200")["items a second"].tolist() == ["5,500", "7,778", "11,000", "15,556"]
    found = tables.text_length(tmp_path / "h200")
    assert found[found["tokens"] == "16"]["of 77 tokens"].tolist() == ["0.21", "0.21"] and set(found["prompts that fit"]) == {"95%", "100%"}
    assert tables.retrieval(tmp_path / "h200")["top-1 %"].tolist() == ["99.50 / 99.25"]
    assert tables.jpeg(tmp_path / "h200")["encode"].tolist() == ["10.0%"] * 4


def test_accuracy_short_keeps_the_worst(tmp_path):
    (tmp_path / "h200").mkdir()
    shutil.copy(ROOT / "results" / "h200" / "accuracy.csv", tmp_path / "h200")
    short, full = tables.accuracy_short(tmp_path / "h200"), tables.accuracy(tmp_path / "h200")
    for _, line in short.iterrows():
        rows = full[(full["model"] == line["model"]) & (full["encoder"] == line["encoder"]) & (full["precision"] == line["precision"])]
        assert len(rows) == line["configurations"]
        assert float(line["rel max"]) == max(map(float, rows["rel max"])) and float(line["cos min"]) == min(map(float, rows["cos min"]))
    shutil.copy(ROOT / "results" / "h200" / "accuracy_level_0.csv", tmp_path / "h200")
    both = tables.accuracy_short(tmp_path / "h200")
    assert both["configurations"].sum() == short["configurations"].sum() + (tables.accuracy_level_0(tmp_path / "h200")["encoder"] != "logits").sum()


def test_profile_and_attention_of_the_committed_csvs():
    sums = tables.profile(ROOT / "results" / "h200").set_index("kind of kernel").loc["sum"].astype(float)
    assert sums["native"] > sums["plugin"] > 0
    assert len(tables.attention(ROOT / "results" / "h200")) > 10


def test_environment_names_gpu_and_versions(tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "environment.json").write_text(json.dumps(
        {"gpu": {"name": "GPU", "compute_capability": "9.0"}, "driver": "1", "processor": "CPU", "cores": 2, "kernel": "6", "python": "3.10", "versions": {"torch": "2.2.0"}, "commit": "0"}))
    assert "| GPU | GPU, compute capability 9.0 |" in tables.rendered("environment", tmp_path)
    assert "| 项目 | 内容 |" in tables.rendered("environment", tmp_path, True)
    write(tmp_path, "sweep.csv", [sweep_row("ViT-B/32", "image", "onnxruntime", 1, True, 1.0, attention="onnxruntime 1.31.1", torch="2.11.0"),
                                  sweep_row("ViT-B/32", "image", "clip_ttrt_plugin", 1, True, 1.0, attention="plugin")])
    found = tables.environment(tmp_path / "h200").set_index("what")["value"]
    assert found["torch"] == "2.2.0" and found["torch of other backends"] == "2.11.0" and found["onnxruntime"] == "1.31.1"
    (tmp_path / "h200").rename(tmp_path / "h100")
    assert "| GPU | GPU, compute capability 9.0 |" in tables.rendered("environment@h100", tmp_path)


def test_the_environment_is_written_by_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["environment", "--out", str(tmp_path / "h200")])
    assert environment.main() == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "h200" / "environment.json").read_text())
    found = tables.environment(tmp_path / "h200").set_index("what")["value"]
    assert found["torch"] == torch.__version__.split("+")[0] and found["Python"] == platform.python_version()
