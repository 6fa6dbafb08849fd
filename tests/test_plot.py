"""Figures from made-up CSVs: what they show, what they say in their titles, and what happens where data is missing."""
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import plot
from experiments.results import BATCHES, SWEEP_LADDER, NoData, gpus, read_ladder, read_sweep
from made_up import MADE_UP, PROVENANCE, accuracy_rows, jpeg_rows, ladder_rows, load_rows, sweep_row, sweep_rows, text_length_rows, write


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def title_of(figure):
    return figure._suptitle.get_text().replace("\n", " ") if figure._suptitle else figure.axes[0].get_title()


@pytest.mark.parametrize("name", MADE_UP)
def test_every_figure_is_drawn_and_names_gpu_and_versions(name, tmp_path, capsys):
    file, rows = MADE_UP[name]
    write(tmp_path, file, rows())
    plot.main(["--results", str(tmp_path), "--only", name])
    assert capsys.readouterr().out.strip() == str(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000
    figure = plot.FIGURES[name](tmp_path / "h200")
    assert any("made-up GPU" in text.get_text() and "0000000000" in text.get_text() for text in figure.texts)


def test_a_missing_file_skips_its_figure_and_says_so(tmp_path, capsys):
    write(tmp_path, "load.csv", load_rows())
    plot.main(["--results", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(plot.FIGURES)
    assert f"speedup.png is skipped: there is no {tmp_path / 'h200' / 'sweep.csv'}" in said
    assert [path.name for path in tmp_path.glob("*.png")] == ["load.png"]


def test_every_other_folder_with_csvs_gets_figures_of_its_own(tmp_path, capsys):
    write(tmp_path, "ladder.csv", [{**row, "median_ms": 2 * row["median_ms"], "gpu": "another GPU"} for row in ladder_rows()])
    (tmp_path / "h200").rename(tmp_path / "h100")
    write(tmp_path, "ladder.csv", ladder_rows())
    write(tmp_path, "load.csv", load_rows())
    (tmp_path / "a100").mkdir()
    (tmp_path / "a100" / "environment.json").write_text("{}")
    assert gpus(tmp_path) == ["h200", "h100"]
    plot.main(["--results", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * len(plot.FIGURES)
    drawn = [line for line in said if "is skipped" not in line]
    assert drawn == [str(tmp_path / name) for name in ("load.png", "ladder.png", "ladder-h100.png")]
    assert f"load-h100.png is skipped: there is no {tmp_path / 'h100' / 'load.csv'}" in said
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["ladder-h100.png", "ladder.png", "load.png"]
    for gpu, name, title in (("h200", "made-up GPU", "from 6.00 to 1.25 ms"), ("h100", "another GPU", "from 12.00 to 2.50 ms")):
        figure = plot.ladder(tmp_path / gpu)
        assert figure.axes[0].get_title().endswith(title) and [text.get_text().split(",")[0] for text in figure.texts] == [name]
        figure.savefig(tmp_path / "again.png", dpi=130)
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / ("ladder.png" if gpu == "h200" else "ladder-h100.png")).read_bytes()


def test_one_figure_alone_is_drawn_of_every_folder(tmp_path, capsys):
    for file, rows in (("ladder.csv", ladder_rows), ("load.csv", load_rows)):
        write(tmp_path, file, rows())
    (tmp_path / "h100").symlink_to(tmp_path / "h200")
    plot.main(["--results", str(tmp_path), "--only", "ladder.png"])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "ladder.png"), str(tmp_path / "ladder-h100.png")]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["ladder-h100.png", "ladder.png"]


def test_a_folder_with_other_batches_alone_gets_no_figure(tmp_path, capsys):
    write(tmp_path, "sweep.csv", [sweep_row("ViT-B/32", "image", backend, batch, graph, 1.0) for batch in (64, 768, 1024)
                                  for backend, graph in (("clip_eager", False), ("torch_compile_reduce_overhead", True), ("clip_ttrt_plugin_range", True))])
    (tmp_path / "h200").rename(tmp_path / "h100")
    plot.main(["--results", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * len(plot.FIGURES) and all("is skipped" in line for line in said)
    assert "speedup-h100.png is skipped: sweep.csv has no fp16 rows beside clip_eager's" in said
    assert "ladder-h100.png is skipped: neither ladder.csv nor the sweep has steps" in said


@pytest.mark.parametrize("name", plot.FIGURES)
def test_a_title_says_what_the_rows_say_whatever_the_gpu(name, tmp_path):
    committed = Path(__file__).parent.parent / "results" / "h200"
    (tmp_path / "h100").symlink_to(committed)
    figures = [plot.FIGURES[name](folder) for folder in (committed, tmp_path / "h100")]
    first, second = ([title_of(figure), *(axes.get_title() for axes in figure.axes)] for figure in figures)
    assert first == second and first[0] and "h200" not in " ".join(first).lower()


def test_the_profile_says_which_way_the_plugins_take_the_time(tmp_path):
    rows = [{"model": "ViT-L/14", "encoder": "image", "batch": 32, "attention": attention, "kind": "matrix product", "us": us, **PROVENANCE}
            for attention, us in (("native", 4000), ("plugin", 5000))]
    write(tmp_path, "profile.csv", rows)
    assert title_of(plot.kernel_profile(tmp_path / "h200")) == "ViT-L/14 image at batch 32: plugins take kernels from 4.0 to 5.0 ms"
    write(tmp_path, "profile.csv", rows[:1])
    with pytest.raises(NoData, match="not both"):
        plot.kernel_profile(tmp_path / "h200")


def test_speedup_without_ours_has_a_title_that_claims_nothing(tmp_path):
    write(tmp_path, "sweep.csv", [row for row in sweep_rows() if not row["backend"].startswith("clip_ttrt")])
    assert title_of(plot.speedup(tmp_path / "h200")) == "Times as fast as the original in eager fp16"


def test_speedup_divides_the_eager_original_by_the_best_row(tmp_path):
    write(tmp_path, "sweep.csv", sweep_rows())
    figure = plot.speedup(tmp_path / "h200")
    assert title_of(figure) == "clip_ttrt is the fastest in 20 of 20 cases, up to 6.9 times as fast as the original in eager fp16"
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    plugin = lines["clip_ttrt, plugins"]
    assert list(kernels.get_xdata()) == list(BATCHES)
    assert kernels.get_ydata() == pytest.approx([8 * 1.3 / 1.5] * 5, rel=1e-3)
    assert "the original, eager" not in lines


def test_speedup_of_a_single_batch_puts_its_backends_side_by_side(tmp_path):
    write(tmp_path, "sweep.csv", [row for row in sweep_rows() if row["model"] == "ViT-B/32" or (row["batch"] == 32 and row["encoder"] == "image")])
    panels = {axes.get_title(): axes for axes in plot.speedup(tmp_path / "h200").axes if axes.get_visible()}
    assert list(panels) == ["ViT-B/32 image", "ViT-B/32 text", "ViT-L/14 image"]
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in panels["ViT-L/14 image"].get_lines() if len(line.get_xdata()) == 1}
    assert len(points) == 6 and sorted(points.values()) == sorted(points.values(), key=lambda point: point[1])  # the further right the faster
    assert [place for place, _ in sorted(points.values())] == list(range(6))
    assert panels["ViT-L/14 image"].get_xlabel() == "batch 32" and panels["ViT-B/32 text"].get_xlabel() == "batch"


def test_speedup_counts_where_another_backend_is_faster(tmp_path):
    rows = sweep_rows(models=("ViT-B/32",), encoders=("image",))
    for row in rows:
        if row["backend"] == "torch_compile_reduce_overhead" and row["batch"] == 1:
            row["median_ms"] = 0.1
    write(tmp_path, "sweep.csv", rows)
    assert "fastest in 4 of 5 cases" in title_of(plot.speedup(tmp_path / "h200"))


def test_failed_rows_are_left_out_and_wrong_ones_are_hollow_and_not_counted(tmp_path):
    rows = sweep_rows(models=("ViT-B/32",), encoders=("image",))
    for row in rows:
        if row["backend"] == "tensorrt_onnx":
            row["median_ms"], row["error"] = 0.01, "wrong: smallest cosine 0.0004"
        if row["backend"] == "torch_compile_reduce_overhead":
            row["median_ms"], row["error"] = "", "skipped: not installed"
    write(tmp_path, "sweep.csv", rows)
    figure = plot.speedup(tmp_path / "h200")
    assert "fastest in 5 of 5 cases" in title_of(figure)
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "torch.compile reduce-overhead" not in labels
    assert sum(line.get_markerfacecolor() == "white" for line in figure.axes[0].get_lines()) == 1


def test_of_what_was_measured_twice_the_fastest_counts(tmp_path):
    write(tmp_path, "sweep.csv", sweep_rows(models=("ViT-B/32",), encoders=("image",)))
    write(tmp_path, "sweep_2.csv", [sweep_row("ViT-B/32", "image", "clip_ttrt_plugin", batch, True, ms) for batch, ms in ((32, 0.3), (128, 99))])
    rows = read_sweep(tmp_path / "h200")
    rows = rows[(rows["backend"] == "clip_ttrt_plugin") & (rows["cuda_graph"].astype(str) == "True")].set_index("batch")["median_ms"]
    assert rows[32] == 0.3 and rows[128] == 2.7


def test_floor_gives_the_ratio_of_our_best_rows(tmp_path):
    write(tmp_path, "sweep.csv", sweep_rows())
    assert title_of(plot.against_floor(tmp_path / "h200")) == "clip_ttrt takes 1.50 to 1.50 times the floor, 1.50 in the median"


def test_a_row_has_the_floor_of_its_run_alone(tmp_path):
    write(tmp_path, "sweep.csv", [{**row, "floor_ms": 0.7 if row["backend"] == "clip_ttrt_plugin" else ""} for row in sweep_rows()])
    write(tmp_path, "floor.csv", [{"model": "ViT-B/32", "encoder": "image", "precision": "fp16", "batch": 32, "tokens": 50, "floor_ms": 0.3}])
    rows = read_sweep(tmp_path / "h200")
    own = rows["backend"] == "clip_ttrt_plugin"
    assert set(rows[own]["floor_ms"]) == {0.7} and rows[~own]["floor_ms"].isna().all()


def test_without_its_own_file_the_ladder_is_what_the_sweep_knows(tmp_path):
    write(tmp_path, "sweep.csv", sweep_rows(models=("ViT-B/32",)))
    rows = read_ladder(tmp_path / "h200")
    assert list(zip(rows["encoder"], rows["step"]))[:6] == [*(("image", step) for step, _, _ in SWEEP_LADDER), ("text", "the original, eager")]
    assert rows["median_ms"].head(5).tolist() == pytest.approx([8 * 0.6 * 1.3, 8 * 0.6, 4 * 0.6, 1.9 * 0.6, 1.5 * 0.6])
    assert [axes.get_title() for axes in plot.ladder(tmp_path / "h200").axes][0] == "ViT-B/32 image, batch 32, fp16: from 6.24 to 0.90 ms"


def test_text_length_compares_the_shortest_with_the_longest_and_names_the_mean(tmp_path):
    write(tmp_path, "text_length.csv", text_length_rows())
    figure = plot.text_length(tmp_path / "h200")
    assert title_of(figure) == "Texts of 16 tokens take 0.21 of the time of 77; prompts have 10.2 in the mean"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["16\n95%", "32\n100%", "48\n100%", "77\n100%"]


def test_load_takes_the_better_of_graph_and_no_graph(tmp_path):
    write(tmp_path, "load.csv", load_rows())
    figure = plot.under_load(tmp_path / "h200")
    assert title_of(figure) == "ViT-B/32 image, requests of 8: 5,500 a second from 1 thread, 15,556 from 8; p99 from 1.5 to 12 ms"
    write(tmp_path, "load.csv", [{**row, "batch": batch, "items_per_second": row["items_per_second"] * batch} for row in load_rows() for batch in (1, 2)])
    assert title_of(plot.under_load(tmp_path / "h200")) == (
        "ViT-B/32 image, requests of 1: 5,500 a second from 1 thread, 15,556 from 8; p99 from 1.5 to 12 ms. "
        "ViT-B/32 image, requests of 2: 11,000 a second from 1 thread, 31,113 from 8; p99 from 1.5 to 12 ms")


def test_errors_tells_trained_from_random_weights(tmp_path):
    write(tmp_path, "accuracy.csv", accuracy_rows())
    figure = plot.errors(tmp_path / "h200")
    assert title_of(figure) == "Largest relative error of any feature row: 3.0e-06 in fp32, 9.0e-04 in tf32, 6.0e-03 in fp16"
    points = {line.get_marker(): 0 for line in figure.axes[0].get_lines()}
    for line in figure.axes[0].get_lines():
        points[line.get_marker()] += len(line.get_xdata())
    assert points == {"o": 18, "*": 18}  # 3 precisions x 2 encoders x 3 statistics; logits are left out


def test_words_on_bars_are_white_on_dark_and_black_on_light():
    assert [plot.readable_on(colour) for colour in ("#000000", "#0072B2", "#E69F00", "#56B4E9", "#FFFFFF")] == ["white", "white", "black", "black", "black"]


def test_stages_stacks_to_one(tmp_path):
    write(tmp_path, "jpeg.csv", jpeg_rows())
    figure = plot.stages(tmp_path / "h200")
    bars = figure.axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(4)
    assert title_of(figure) == "From JPEG files, decoding, resizing and normalising are 88% of the work, the encoder 10%"


def test_ladder_starts_at_the_top_and_marks_wrong_steps(tmp_path):
    write(tmp_path, "ladder.csv", ladder_rows())
    [axes] = plot.ladder(tmp_path / "h200").axes
    assert axes.get_title() == "ViT-B/32 image, batch 32, fp16: from 6.00 to 1.25 ms"
    heights = {label.get_text(): bar for label, bar in zip(axes.get_yticklabels(), axes.patches)}
    assert list(heights)[-1] == "the original, eager"
    assert heights["one engine, stock"].get_facecolor()[:3] == (1, 1, 1)


def test_an_empty_file_is_no_data(tmp_path):
    write(tmp_path, "load.csv", load_rows())
    (tmp_path / "h200" / "load.csv").write_text((tmp_path / "h200" / "load.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(NoData, match="has no rows"):
        plot.under_load(tmp_path / "h200")


def test_committed_results_are_drawn(tmp_path, capsys):
    """What is committed is what the plots expect: none but missing files may be skipped."""
    (tmp_path / "h200").symlink_to(Path(__file__).parent.parent / "results" / "h200")
    plot.main(["--results", str(tmp_path)])
    skipped = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert all("there is no" in line for line in skipped), skipped
