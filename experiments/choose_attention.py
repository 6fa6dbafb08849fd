"""What `--attention auto` decides from: clip_ttrt/attention_measured.csv, made of the results' files.

    python -m experiments.choose_attention

Pairs of whole encoders in fp16 with native attention and with the plugins, alike in everything else, each pair from one run:
from dynamic_batch.csv (the range and its optimal batch, CUDA graphs), sweep.csv (static batches, CUDA graphs, full text length) and,
for attention of which neither has any, verified_speed.csv (calls without a CUDA graph, beside other work).
"""
import argparse
import csv
from pathlib import Path
from typing import Iterable, Iterator

from clip_ttrt.attention_choice import COLUMNS, MEASURED, shape_of
from clip_ttrt.models import MODELS
from experiments.record import read_rows

SHAPE = ("gpu", "heads", "tokens", "causal")

Measurement = tuple[tuple[str, ...], str, str]  # (file, gpu, commit, model, encoder, batch), attention, milliseconds


def from_dynamic_batch(path: Path) -> Iterator[Measurement]:
    for row in read_rows(path):
        if row["precision"] == "fp16":
            key = (path.name, row["gpu"], row["commit"], row["model"], row["encoder"])
            yield (*key, row["range"]), row["attention"], row["dynamic_ms"]
            yield (*key, row["batch"]), row["attention"], row["static_ms"]


def from_sweep(path: Path) -> Iterator[Measurement]:
    for row in read_rows(path):
        full_length = row["encoder"] == "image" or int(row["tokens"]) == MODELS[row["model"]].context_length
        if row["backend"] in ("clip_ttrt_native", "clip_ttrt_plugin") and row["precision"] == "fp16" and row["cuda_graph"] == "True" and row["median_ms"] and full_length:
            yield (path.name, row["gpu"], row["commit"], row["model"], row["encoder"], row["batch"]), row["backend"].removeprefix("clip_ttrt_"), row["median_ms"]


def from_verifications(path: Path) -> Iterator[Measurement]:
    for row in read_rows(path):
        if row["precision"] == "fp16":
            yield (path.name, row["gpu"], row["commit"], row["model"], row["encoder"], row["batch"]), row["attention"], row["ms"]


def table(measurements: Iterable[Measurement]) -> list[dict[str, str]]:
    """A row for each pair; of one shape and batch the first pair stands."""
    pairs: dict[tuple[str, ...], dict[str, str]] = {}
    for key, attention, milliseconds in measurements:
        pairs.setdefault(key, {})[attention] = milliseconds
    rows: dict[tuple, dict[str, str]] = {}
    for (_, gpu, commit, model, encoder, batch), pair in pairs.items():
        if pair.keys() >= {"native", "plugin"}:
            heads, tokens, causal = shape_of(MODELS[model], encoder)
            rows.setdefault((gpu, heads, tokens, causal, batch), dict(zip(COLUMNS, (gpu, heads, tokens, int(causal), batch, pair["native"], pair["plugin"], commit))))
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/h200"))
    parser.add_argument("--out", type=Path, default=MEASURED)
    options = parser.parse_args()
    rows = table([*from_dynamic_batch(options.results / "dynamic_batch.csv"), *from_sweep(options.results / "sweep.csv")])
    shapes = {tuple(row[name] for name in SHAPE) for row in rows}
    rows += [row for row in table(from_verifications(options.results / "verified_speed.csv")) if tuple(row[name] for name in SHAPE) not in shapes]
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{options.out}: {len(rows)} measurements")


if __name__ == "__main__":
    main()
