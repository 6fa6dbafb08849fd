"""Write the documents' tables and figures from what was measured: the CSV files in results/GPU/ and the plots in results/.

    python -m experiments.tables [--check]

The documents are README.md, README.zh-CN.md and docs/*.md.  Each table stands between `<!-- table: NAME -->` and
`<!-- end -->`, each plot (`python -m experiments.plot` draws them) between `<!-- figure: NAME -->` and `<!-- end -->`; where
it is not there yet, a line says so.  NAME alone is of results/h200/, NAME@GPU of results/GPU/ (or a folder in it): `<!-- table: hackathon@h100 -->` and
`<!-- figure: ladder@h100 -->`.  No table or figure has rows of two GPUs.  Documents whose name ends in .zh-CN.md get Chinese
headings.  `--check` changes nothing and fails where a document is not what the files give.
"""
import argparse
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Callable, Optional

import pandas as pd

from experiments.results import BATCHES, GPU, MODELS, NoData, best, full_length, percent, picture, present, read, read_accuracy, read_ladder, read_sweep

ROOT = Path(__file__).parent.parent

# Headings of columns of milliseconds, and the backends whose fastest row stands there.
SPEED_COLUMNS = {
    "original, eager": ("clip_eager",),
    "original, CUDA graph": ("clip_graph",),
    "our encoders, PyTorch": ("eager_sdpa",),
    "ONNX Runtime": ("onnxruntime",),
    "TensorRT through ONNX": ("tensorrt_onnx",),
    "torch.compile": ("torch_compile_reduce_overhead", "torch_compile_max_autotune"),
    "clip_ttrt, native": ("clip_ttrt_native",),
    "clip_ttrt, plugins": ("clip_ttrt_plugin",),
    "one engine for a range": ("clip_ttrt_plugin_range", "clip_ttrt_native_range"),
}
NAMES = {backend: heading for heading, backends in SPEED_COLUMNS.items() for backend in backends} | {
    "torch_compile_reduce_overhead": "torch.compile reduce-overhead", "torch_compile_max_autotune": "torch.compile max-autotune",
    "clip_ttrt_plugin_range": "clip_ttrt, plugins, batch range", "clip_ttrt_native_range": "clip_ttrt, native, batch range"}
# What the 2022 hackathon entry reported for ViT-B/32's image encoder on an A10 with TensorRT 8.4: times as fast as torch in the same precision.
HACKATHON = {("fp16", 64): 6.73, ("fp16", 768): 2.35, ("fp16", 1024): 2.18, ("fp32", 1024): 0.82}
HACKATHON_ERRORS = {"fp16": "1e-2", "fp32": "6e-4"}
# The cases for which the project set itself to be the fastest of all.
AIMS = (("ViT-B/32", "image", 1), ("ViT-B/32", "image", 32), ("ViT-B/32", "image", 128), ("ViT-L/14", "image", 32))

# Plots: what a reader who cannot see them is told, in English and in Chinese.
FIGURES = {
    "speedup": ("every backend's speed against the original in eager fp16, over the batch", "各后端相对原版 eager fp16 的加速比，随批大小变化"),
    "floor": ("milliseconds against the sum of the fastest library kernels", "耗时与最快库核函数之和（下限）的对比"),
    "load": ("throughput and p99 latency over the number of threads", "吞吐与 p99 延迟随线程数的变化"),
    "text_length": ("milliseconds over the text length", "耗时随文本长度的变化"),
    "errors": ("errors of the compiled encoders, by precision", "编译后编码器的误差，按精度"),
    "stages": ("where the time from JPEG files to features goes", "从 JPEG 文件到特征，各阶段的耗时占比"),
    "ladder": ("milliseconds after each step of the optimisation", "每一步优化之后的耗时"),
    "attention_ratio": ("time of the fused attention kernel over that of the fastest library", "融合注意力核函数与最快库的耗时之比"),
    "profile": ("kernels of ViT-L/14 with TensorRT's own attention and with the plugins", "ViT-L/14 的核函数耗时：TensorRT 自带注意力与插件"),
}

CHINESE = {
    "model": "模型", "weights": "权重", "encoder": "编码器", "attention": "注意力", "precision": "精度", "batch": "批大小", "backend": "后端", "tokens": "词元数",
    "abs max": "绝对误差 最大", "abs mean": "绝对误差 平均", "abs median": "绝对误差 中位", "rel max": "相对误差 最大", "rel mean": "相对误差 平均",
    "rel median": "相对误差 中位", "cos min": "最小余弦", "top-1 % original / compiled": "top-1 % 原版 / 编译后", "engine MiB": "引擎 MiB", "build s": "构建 秒",
    "configurations": "配置数", "step": "步骤", "ms": "毫秒", "ms, CUDA graph": "毫秒, CUDA graph", "of the step before": "与上一步之比", "of the original": "与原版之比",
    "engines": "引擎数", "remark": "备注", "bug": "问题", "seen": "是否重现", "what was seen": "实际现象", "on": "环境", "floor": "下限", "original, eager": "原版, eager", "error of the entry": "参赛作品误差", "our abs max": "我们的绝对误差 最大",
    "original, CUDA graph": "原版, CUDA graph", "our encoders, PyTorch": "我们的编码器, PyTorch", "our encoders, eager": "我们的编码器, eager", "TensorRT through ONNX": "TensorRT (经 ONNX)", "clip_ttrt, native": "clip_ttrt, 无插件",
    "clip_ttrt, plugins": "clip_ttrt, 插件", "one engine for a range": "一个引擎, 一段批大小", "times as fast as the original": "相对原版加速比",
    "of the strongest other": "与最强对手之比", "of the floor": "与下限之比", "strongest other": "最强对手", "its ms": "对手毫秒", "ours ms": "我们的毫秒",
    "ours of the strongest": "我们 / 最强对手", "entry of 2022, A10": "2022 年参赛作品, A10", "against the original": "相对原版加速比", "against the strongest other": "相对最强对手加速比",
    "threads": "线程数", "items a second": "每秒条数", "p50 ms": "p50 毫秒", "p95 ms": "p95 毫秒", "p99 ms": "p99 毫秒", "tokens of a prompt, mean": "提示的平均词元数", "prompts that fit": "可容纳的提示词",
    "of 77 tokens": "与 77 词元之比", "largest error": "最大误差", "smallest cosine": "最小余弦", "images": "图像数", "texts": "文本数",
    "top-1 %": "top-1 %", "image to text %": "图到文 recall@1 %", "text to image %": "文到图 recall@1 %", "agreement %": "一致率 %", "workers": "工作线程",
    "images a second": "每秒图像", "decode": "解码", "resize": "缩放", "normalise": "归一化", "copy": "拷贝", "encode": "编码",
    "range": "批范围", "builds": "构建次数", "static ms": "静态引擎 毫秒", "dynamic ms": "动态引擎 毫秒", "ratio": "比值", "eager fp16 ms": "原版 eager fp16 毫秒",
    "clip_ttrt, plugins, batch range": "clip_ttrt, 插件, 批范围", "clip_ttrt, native, batch range": "clip_ttrt, 无插件, 批范围", "what": "项目", "torch of other backends": "其他后端的 torch", "kind of kernel": "核函数类别", "sum": "合计", "matrix product": "矩阵乘", "copy and transpose": "拷贝与转置", "activation": "激活", "layer norm": "层归一化", "bias": "偏置", "other": "其他", "us": "微秒", "heads": "头数", "causal": "因果", "bytes at full bandwidth, us": "按满带宽读写, 微秒", "fastest library": "最快的库", "its us": "其微秒", "value": "内容", "median ms": "中位 毫秒", "a second": "每秒", "torch": "torch",
    "the original, eager": "原版, eager", "the original, CUDA graph": "原版, CUDA graph", "our encoders in PyTorch, CUDA graph": "我们的编码器, PyTorch, CUDA graph",
    "one engine of ours, TensorRT's kernels": "我们的一个引擎, TensorRT 自带核函数", "with the plugins": "加上插件", "stock Torch-TensorRT": "原装 Torch-TensorRT", "our converters, one engine": "我们的转换器, 一个引擎",
    "activations as rows": "激活按行存放", "attention plugin": "注意力插件", "fused elementwise kernels": "融合的逐元素核函数", "linear layers by cuBLASLt": "cuBLASLt 的线性层", "CUDA graph": "CUDA graph",
    "recipe": "构建方式", "commit": "提交", "of static": "与静态引擎之比", **{f"ms at {batch}": f"批大小 {batch}, 毫秒" for batch in (1, 5, 8, 32, 33, 64, 100, 128, 129, 256)},
    "static": "静态", "range as it comes": "一段批大小, 默认方式", "range, row maxima": "一段批大小, 逐行最大值", "range, powers of two, cuBLAS": "一段批大小, 按 2 的幂编译, cuBLAS",
    "range, row maxima, cuBLAS": "一段批大小, 逐行最大值, cuBLAS", "range, row maxima, separate MLPs": "一段批大小, 逐行最大值, MLP 独立",
    "range, row maxima, separate MLPs, cuBLAS": "一段批大小, 逐行最大值, MLP 独立, cuBLAS", "range, cuBLAS": "一段批大小, cuBLAS",
    "image": "图像", "text": "文本", "random": "随机", "demo": "demo", "yes": "是", "no": "否", "cannot run": "无法运行", "not yet measured": "尚未测量",
}


MISSING = {False: "*Not measured yet.*", True: "*尚未测量。*"}


def markdown(frame: pd.DataFrame) -> str:
    """A data frame of strings as a Markdown table."""
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.values.tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def text(value: object) -> str:
    """A cell of a CSV; empty where there is none."""
    return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def columns(rows: pd.DataFrame, **named: str) -> pd.DataFrame:
    """Columns of a CSV as they are, under the headings given (`_` for a space)."""
    return pd.DataFrame({heading.replace("_", " "): rows[column].map(text) for heading, column in named.items()})


def number(value: object, digits: int = 2) -> str:
    return "" if pd.isna(value) else f"{float(value):,.{digits}f}"


def accuracy(folder: Path, name: str = "accuracy.csv") -> pd.DataFrame:
    """Errors of every compiled encoder."""
    rows = read(folder, name)
    out = columns(rows, model="model", weights="weights", encoder="encoder", attention="attention", precision="precision", batch="batch")
    for kind in ("abs", "rel"):
        for statistic in ("max", "mean", "median"):
            out[f"{kind} {statistic}"] = rows[f"{kind}_{statistic}"].map(lambda value: f"{value:.1e}")
    out["cos min"] = rows["cos_min"].map(lambda value: f"{value:.7f}")
    out["top-1 % original / compiled"] = [f"{a:.2f} / {b:.2f}" if weights == "demo" and pd.notna(a) else ""
                                          for a, b, weights in zip(rows["top1_reference"], rows["top1_compiled"], rows["weights"])]
    out["engine MiB"], out["build s"] = rows["engine_mib"].map(text), rows["build_s"].map(text)
    return out


def accuracy_level_0(folder: Path) -> pd.DataFrame:
    """The same with TensorRT's builder at level 0."""
    return accuracy(folder, "accuracy_level_0.csv")


def accuracy_level_1(folder: Path) -> pd.DataFrame:
    """The same with TensorRT's builder at level 1."""
    return accuracy(folder, "accuracy_level_1.csv")


def accuracy_short(folder: Path) -> pd.DataFrame:
    """The worst of each error over all configurations of one model, encoder and precision, the builder's levels 3 and 0 among them."""
    rows = read_accuracy(folder)
    rows = rows[rows["encoder"] != "logits"].astype({"model": pd.CategoricalDtype(MODELS), "precision": pd.CategoricalDtype(["fp16", "tf32", "fp32"])})
    keys = ["model", "weights", "encoder", "precision"]
    errors = [f"{kind}_{statistic}" for kind in ("abs", "rel") for statistic in ("max", "mean", "median")]
    found = rows.groupby(keys, observed=True).agg(**{name: (name, "max") for name in errors}, cos_min=("cos_min", "min"), configurations=("batch", "size")).reset_index()
    out = found[keys].astype(str)
    for name in errors:
        out[name.replace("_", " ")] = found[name].map(lambda value: f"{value:.1e}")
    out["cos min"] = found["cos_min"].map(lambda value: f"{value:.7f}")
    out["configurations"] = found["configurations"]
    return out


def dynamic_batch(folder: Path) -> pd.DataFrame:
    """What a batch range costs at the size it is tuned for: medians over the builds of each engine, in brackets the fastest and the slowest build."""
    rows = read(folder, "dynamic_batch.csv")
    out = columns(rows, model="model", encoder="encoder", precision="precision", attention="attention", batch="batch", range="range", builds="builds")
    for kind in ("static", "dynamic"):
        out[f"{kind} ms"] = [number(row[f"{kind}_ms"], 3) + (f" ({number(row[f'{kind}_least_ms'], 3)} to {number(row[f'{kind}_most_ms'], 3)})" if row["builds"] > 1 else "")
                             for _, row in rows.iterrows()]
    out["ratio"] = rows["ratio"].map(lambda value: number(value, 3))
    out["commit"] = rows["commit"]
    return out


def fastest(rows: pd.DataFrame, backends: tuple[str, ...], right: bool = False) -> Optional[pd.Series]:
    """The fastest row of some backends; with `right` only of those whose features are right."""
    part = rows[rows["backend"].isin(backends) & ~(rows["wrong"] & right)]
    return None if part.empty else part.loc[part["median_ms"].idxmin()]


def sweep_cases(folder: Path, precision: str) -> list[tuple[tuple, pd.DataFrame]]:
    """The rows of a precision by (model, encoder, batch), in the order of the models."""
    rows = full_length(read_sweep(folder))
    rows = rows[rows["precision"] == precision]
    cases = [((model, encoder, batch), rows[(rows["model"] == model) & (rows["encoder"] == encoder) & (rows["batch"] == batch)])
             for model in present(rows, MODELS, "model") for encoder in ("image", "text") for batch in sorted(rows["batch"].unique())]
    found = [(case, part) for case, part in cases if not part.empty]
    if not found:
        raise NoData(f"the sweep has no row in {precision}")
    return found


OURS = ("clip_ttrt_plugin", "clip_ttrt_native", "clip_ttrt_plugin_range", "clip_ttrt_native_range")
OTHERS = tuple(backend for backends in SPEED_COLUMNS.values() for backend in backends if backend not in OURS)


def speed(folder: Path, precision: str = "fp16", models: tuple[str, ...] = (), batches: tuple[int, ...] = BATCHES) -> pd.DataFrame:
    """Milliseconds of every backend at its best, with or without a CUDA graph; the fastest with right features in bold, wrong ones marked."""
    lines = []
    for (model, encoder, batch), part in sweep_cases(folder, precision):
        if batch not in batches or (models and model not in models):
            continue
        ours, original = fastest(part, OURS, right=True), fastest(part, ("clip_eager",))
        other = fastest(part, OTHERS, right=True)
        floor = next((row["floor_ms"] for row in (ours, original, other) if row is not None and pd.notna(row["floor_ms"])), float("nan"))  # ours has that of its run
        line = {"model": model, "encoder": encoder, "batch": batch, "floor": number(floor, 3)}
        winner = fastest(part, OURS + OTHERS, right=True)
        for heading, backends in SPEED_COLUMNS.items():
            row = fastest(part, backends, right=True)
            row = fastest(part, backends) if row is None else row
            line[heading] = "" if row is None else number(row["median_ms"], 3) + ("†" if row["wrong"] else "")
            if row is not None and winner is not None and row.name == winner.name and part["backend"].nunique() > 1:
                line[heading] = f"**{line[heading]}**"
        line["times as fast as the original"] = "" if ours is None or original is None else number(original["median_ms"] / ours["median_ms"], 1)
        line["of the strongest other"] = "" if ours is None or other is None else number(ours["median_ms"] / other["median_ms"])
        line["of the floor"] = "" if ours is None else number(ours["median_ms"] / floor)
        lines.append(line)
    if not lines:
        raise NoData(f"the sweep has no such row in {precision}")
    frame = pd.DataFrame(lines)
    return frame[[column for column in frame if column not in (*SPEED_COLUMNS, "floor", "of the floor") or (frame[column] != "").any()]]


def speed_short(folder: Path) -> pd.DataFrame:
    return speed(folder, models=("ViT-B/32", "ViT-L/14"), batches=(1, 32, 128))


def speed_hackathon(folder: Path) -> pd.DataFrame:
    """Every backend at the batches of the 2022 entry in fp16."""
    return speed(folder, models=("ViT-B/32",), batches=tuple(batch for precision, batch in HACKATHON if precision == "fp16"))


def speed_fp32(folder: Path) -> pd.DataFrame:
    return speed(folder, precision="fp32")


def aims(folder: Path) -> pd.DataFrame:
    """Where clip_ttrt is to be the fastest of all: by how much it is, or is not."""
    lines = []
    for case, part in sweep_cases(folder, "fp16"):
        ours, other = fastest(part, OURS, right=True), fastest(part, OTHERS, right=True)
        if case in AIMS and ours is not None and other is not None:
            lines.append(dict(zip(("model", "encoder", "batch"), case)) | {
                "backend": NAMES[ours["backend"]], "ours ms": number(ours["median_ms"], 3), "strongest other": NAMES[other["backend"]],
                "its ms": number(other["median_ms"], 3), "ours of the strongest": number(ours["median_ms"] / other["median_ms"])})
    if not lines:
        raise NoData("the sweep has none of the cases")
    return pd.DataFrame(lines)


def hackathon(folder: Path) -> pd.DataFrame:
    """The 2022 entry's ratios and errors beside ours for the same batches; where ours was not measured nothing else is told."""
    try:
        errors = read(folder, "accuracy.csv").astype({"batch": str})
    except NoData:
        errors = pd.DataFrame(columns=["model", "encoder", "attention", "precision", "batch", "abs_max"])
    lines = []
    for (precision, batch), theirs in HACKATHON.items():
        try:
            found = dict(sweep_cases(folder, precision))
        except NoData:
            found = {}
        part = found.get(("ViT-B/32", "image", batch), pd.DataFrame({"backend": [], "wrong": pd.Series([], dtype=bool), "median_ms": []}))
        ours = fastest(part, OURS, right=True)
        original, other = (None, None) if ours is None else (fastest(part, ("clip_eager",)), fastest(part, OTHERS, right=True))
        error = float("nan")
        if ours is not None:
            attention, _, range_ = str(ours["attention"]).partition(" ")  # a range's row has it behind the attention
            mine = {"model": "ViT-B/32", "encoder": "image", "precision": precision, "attention": attention, "batch": range_ or str(batch)}
            error = errors.loc[(errors[list(mine)] == pd.Series(mine)).all(axis=1), "abs_max"].max()
        lines.append({"precision": precision, "batch": batch, "entry of 2022, A10": f"{theirs}",
                      "original, eager": "" if original is None else number(original["median_ms"], 3), "ours ms": "" if ours is None else number(ours["median_ms"], 3),
                      "against the original": "not yet measured" if ours is None or original is None else number(original["median_ms"] / ours["median_ms"]),
                      "strongest other": "" if other is None else NAMES[other["backend"]], "its ms": "" if other is None else number(other["median_ms"], 3),
                      "against the strongest other": "not yet measured" if ours is None or other is None else number(other["median_ms"] / ours["median_ms"]),
                      "of the floor": "" if ours is None else number(ours["median_ms"] / ours["floor_ms"]),
                      "error of the entry": HACKATHON_ERRORS[precision], "our abs max": "" if pd.isna(error) else f"{error:.1e}"})
    return pd.DataFrame(lines)


def native_range(folder: Path) -> pd.DataFrame:
    """What a range costs with TensorRT's own kernels in fp16, by recipe: milliseconds by batch, and at the range's optimum what it is of a static engine."""
    rows = read(folder, "native_range.csv")
    rows, lines = rows[rows["median_ms"].notna()], []
    batches = sorted(set(rows["batch"]))
    for (model, encoder, range_, recipe, commit), part in rows.groupby(["model", "encoder", "range", "recipe", "commit"], sort=False):
        times, first = part.set_index("batch")["median_ms"], part.iloc[0]
        ratio = part["of_static"].dropna()
        lines.append({"model": model, "encoder": encoder, "range": range_, "recipe": recipe, "of static": number(ratio.iloc[0], 3) if len(ratio) else "",
                      **{f"ms at {batch}": number(times.get(batch), 3) for batch in batches}, "smallest cosine": f"{part['cos_min'].min():.7f}",
                      "engine MiB": text(first["engine_mib"]), "build s": text(first["build_s"]), "commit": commit})
    if not lines:
        raise NoData("native_range.csv has no row with a time")
    return pd.DataFrame(lines)


def ladder(folder: Path) -> pd.DataFrame:
    """Each step's time, and what it is of the step before and, where it is the first, of the original."""
    rows, lines = read_ladder(folder), []
    for case, part in rows.groupby(["model", "encoder", "batch"], sort=False):
        before, first = None, part.iloc[0]
        original = first["median_ms"] if first["step"].startswith("the original") else None
        for _, row in part.iterrows():
            ms = row["median_ms"]
            lines.append(dict(zip(("model", "encoder", "batch"), case)) | {
                "step": row["step"], "ms": number(ms, 3), "ms, CUDA graph": number(row["graph_ms"], 3),
                "of the step before": number(ms / before) if before is not None and pd.notna(ms) else "",
                "of the original": number(ms / original) if original is not None and pd.notna(ms) else "", "engines": text(row["engines"]), "remark": text(row["error"])})
            before = ms if pd.notna(ms) else before
    frame = pd.DataFrame(lines)
    return frame[[column for column in frame if column not in ("ms, CUDA graph", "engines", "remark") or (frame[column] != "").any()]]


def bugs(folder: Path) -> pd.DataFrame:
    """What the bug scripts saw."""
    rows = read(folder, "bugs.csv")
    where = rows[["gpu", "torch"]].apply(lambda row: row["gpu"] if pd.notna(row["gpu"]) else f"CPU, torch {row['torch']}", axis=1)
    return pd.DataFrame({"bug": [f"[`{bug}`](BUGS/{bug}.py)" for bug in rows["bug"]], "seen": rows["seen"], "what was seen": rows["actual"].map(text), "on": where})


def load(folder: Path) -> pd.DataFrame:
    """Throughput and latency in a closed loop, the better of with and without a CUDA graph."""
    rows = read(folder, "load.csv")
    rows = rows[rows["items_per_second"].notna()]
    rows = rows.loc[rows.groupby(["model", "encoder", "batch", "backend", "threads"], sort=False)["items_per_second"].idxmax()]
    out = columns(rows, model="model", encoder="encoder", backend="backend", batch="batch", threads="threads")
    out["backend"] = rows["backend"].map(lambda backend: NAMES.get(backend, backend))
    out["items a second"] = rows["items_per_second"].map(lambda value: number(value, 0))
    for name in ("p50", "p95", "p99"):
        out[f"{name} ms"] = rows[f"{name}_ms"].map(number)
    return out


def text_length(folder: Path) -> pd.DataFrame:
    """Milliseconds by text length, the better of with and without a CUDA graph."""
    rows = read(folder, "text_length.csv")
    rows = best(rows[rows["median_ms"].notna()], "model", "backend", "batch", "tokens")
    full = rows[rows["tokens"] == 77].set_index(["model", "backend", "batch"])["median_ms"]
    out = columns(rows, model="model", backend="backend", batch="batch", tokens="tokens")
    out["backend"] = rows["backend"].map(lambda backend: NAMES.get(backend, backend))
    out["ms"] = rows["median_ms"].map(lambda value: number(value, 3))
    out["of 77 tokens"] = [number(ms / full.get(key, float("nan"))) for key, ms in zip(zip(rows["model"], rows["backend"], rows["batch"]), rows["median_ms"])]
    out["largest error"] = rows["max_abs_error"].map(lambda value: "" if pd.isna(value) else f"{value:.1e}")
    out["smallest cosine"] = rows["min_cosine"].map(lambda value: "" if pd.isna(value) else f"{value:.7f}")
    out["prompts that fit"] = rows["fit_share"].map(lambda value: "" if pd.isna(value) else percent(value))
    out["tokens of a prompt, mean"] = rows["mean_tokens"].map(lambda value: number(value, 1))
    return out


def retrieval(folder: Path) -> pd.DataFrame:
    """The embedded trained model before and after."""
    rows = read(folder, "retrieval.csv")
    out = columns(rows, model="model", backend="backend", precision="precision", images="images", texts="texts")
    out["backend"] = [NAMES.get(backend, backend) for backend in rows["backend"]]
    for heading, name in (("top-1 %", "top1"), ("image to text %", "recall_image_to_text"), ("text to image %", "recall_text_to_image")):
        out[heading] = [f"{number(a)} / {number(b)}" for a, b in zip(rows[f"{name}_original"], rows[f"{name}_compiled"])]
    out["agreement %"] = rows["agreement"].map(number)
    return out


def jpeg(folder: Path) -> pd.DataFrame:
    """From JPEG files to features: images a second, and the share of each stage."""
    rows = read(folder, "jpeg.csv")
    out = columns(rows, model="model", backend="backend", batch="batch", workers="workers")
    out["backend"] = rows["backend"].map(lambda backend: NAMES.get(backend, backend))
    out["images a second"] = rows["images_per_second"].map(lambda value: number(value, 0))
    for stage in ("decode", "resize", "normalise", "copy", "encode"):
        out[stage] = rows[f"{stage}_share"].map(lambda value: f"{value:.1%}")
    return out


def profile(folder: Path) -> pd.DataFrame:
    """Milliseconds of one call by kind of kernel, a column for each way of doing attention."""
    rows = read(folder, "profile.csv")
    totals = rows.pivot_table(index="kind", columns="attention", values="us", aggfunc="sum", fill_value=0) / 1e3
    totals = totals.loc[totals.sum(axis=1).sort_values(ascending=False).index, totals.sum().sort_values(ascending=False).index]
    out = pd.DataFrame({"kind of kernel": [*totals.index, "sum"]})
    for attention in totals:
        out[attention] = [number(value) for value in (*totals[attention], totals[attention].sum())]
    return out


def attention(folder: Path) -> pd.DataFrame:
    """The fused attention kernel beside the fastest library kernel."""
    rows = read(folder, "attention.csv")
    out = columns(rows, batch="batch", heads="heads", tokens="tokens")
    out["causal"] = rows["causal"].map({0: "", 1: "yes"})
    for heading, column, digits in (("us", "us", 1), ("TFLOP/s", "tflops", 0), ("GB/s", "gbps", 0), ("bytes at full bandwidth, us", "floor_us", 1)):
        out[heading] = rows[column].map(lambda value: number(value, digits))
    out["fastest library"], out["its us"], out["ratio"] = rows["best_library"], rows["best_library_us"].map(lambda value: number(value, 1)), rows["ratio"].map(number)
    return out


def environment(folder: Path) -> pd.DataFrame:
    """Hardware and software of the measurements: of environment.json, and what the sweep's rows say of backends that ran in another environment."""
    path = folder / "environment.json"
    if not path.exists():
        raise NoData(f"there is no {path}")
    found = json.loads(path.read_text())
    lines = [("GPU", f"{found['gpu'].get('name', '')}, compute capability {found['gpu'].get('compute_capability', '')}"), ("driver, memory, clock", next(iter(found["driver"].splitlines()), "")),
             ("processor", f"{found['processor']}, {found['cores']} cores"), ("kernel", found["kernel"]), ("Python", found["python"]),
             *((name, version) for name, version in found["versions"].items() if name != "clip_ttrt")]
    with contextlib.suppress(NoData):
        rows = read_sweep(folder)
        if newer := sorted(set(rows["torch"].dropna().astype(str)) - {found["versions"].get("torch")}):
            lines.append(("torch of other backends", ", ".join(newer)))
        if runtimes := sorted(set(rows.loc[rows["backend"] == "onnxruntime", "attention"].dropna().astype(str).str.removeprefix("onnxruntime "))):
            lines.append(("onnxruntime", ", ".join(runtimes)))
    return pd.DataFrame(lines, columns=["what", "value"])


TABLES: dict[str, Callable[[Path], pd.DataFrame]] = {table.__name__: table for table in (
    accuracy, accuracy_level_0, accuracy_level_1, accuracy_short, dynamic_batch, native_range, speed, speed_short, speed_hackathon, speed_fp32, aims, hackathon, ladder, bugs, load, text_length, retrieval, jpeg, profile, attention, environment)}


def in_chinese(frame: pd.DataFrame) -> pd.DataFrame:
    """Headings and fixed words of a table in Chinese."""
    cells = [[CHINESE.get(cell, cell) if isinstance(cell, str) else cell for cell in row] for row in frame.values.tolist()]
    return pd.DataFrame(cells, columns=[CHINESE.get(column, column) for column in frame])


def name_and_gpu(marked: str) -> tuple[str, str]:
    """What a marker names, NAME or NAME@GPU, as the name and the folder of its GPU."""
    name, _, gpu = marked.partition("@")
    return (name, gpu) if gpu else (marked, GPU)


def rendered(marked: str, results: Path, chinese: bool = False, root: str = "") -> str:
    """One table, NAME or NAME@GPU, as Markdown, or a line that says that it is not measured yet.  Raises KeyError for an unknown name.

    root: the way from the document to the repository's root.
    """
    name, gpu = name_and_gpu(marked)
    make, folder = TABLES[name], results / gpu
    if not folder.is_dir():  # `hackathon` has lines even where nothing is measured, and a GPU misspelt is to say so
        return MISSING[chinese]
    try:
        frame = make(folder)
    except NoData:
        return MISSING[chinese]
    return markdown(in_chinese(frame) if chinese else frame).replace("](BUGS/", f"]({root}experiments/bugs/")


def pictured(marked: str, results: Path, chinese: bool = False, root: str = "") -> str:
    """One plot, NAME or NAME@GPU, as Markdown, or a line that says that it is not measured yet.  Raises KeyError for an unknown name."""
    name, gpu = name_and_gpu(marked)
    told, file = FIGURES[name][chinese] + ("" if gpu == GPU else f", {gpu.upper()}"), picture(name, gpu)
    return f"![{told}]({root}results/{file})" if (results / file).exists() else MISSING[chinese]


def fill(document: str, results: Path, chinese: bool = False, root: str = "") -> str:
    """A document's text with every table and figure made anew.  Raises KeyError for an unknown name."""
    def made(found: re.Match) -> str:
        make = {"table": rendered, "figure": pictured}[found[2]]
        return f"{found[1]}{make(found[3], results, chinese, root)}\n{found[4]}"

    return re.sub(r"(<!-- (table|figure): (\S+) -->\n).*?(<!-- end -->)", made, document, flags=re.S)


def documents(root: Path) -> list[Path]:
    """Where tables may stand."""
    return [path for path in (root / "README.md", root / "README.zh-CN.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]


def main(arguments: Optional[list[str]] = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args(arguments).check, []
    for path in documents(root):
        before = path.read_text(encoding="utf-8")
        after = fill(before, root / "results", path.name.endswith(".zh-CN.md"), "" if path.parent == root else "../")
        if after != before:
            stale.append(path)
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale if check else ():
        print(f"{path.relative_to(root)} does not hold what the CSVs give: run python -m experiments.tables", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
