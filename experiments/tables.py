"""Write README.md's tables from the CSV files in results/.

    python -m experiments.tables [--check]

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`.  `--check` changes nothing and fails where a table is
not what the CSV gives.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import Callable

import pandas as pd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "h200"


def markdown(frame: pd.DataFrame) -> str:
    """A data frame of strings as a Markdown table."""
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.values.tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name, dtype=str, keep_default_na=False)


def accuracy() -> str:
    """Errors of every compiled encoder."""
    rows = read("accuracy.csv")
    out = rows[["model", "weights", "encoder", "attention", "precision", "batch"]].copy()
    for kind in ("abs", "rel"):
        for statistic in ("max", "mean", "median"):
            out[f"{kind} {statistic}"] = rows[f"{kind}_{statistic}"].map(lambda value: f"{float(value):.1e}")
    out["cos min"] = rows["cos_min"].map(lambda value: f"{float(value):.7f}")
    top1 = [f"{float(a):.2f} / {float(b):.2f}" if weights == "demo" and a else "" for a, b, weights in zip(rows["top1_reference"], rows["top1_compiled"], rows["weights"])]
    out["top-1 % original / compiled"] = top1
    out["engine MiB"], out["build s"] = rows["engine_mib"], rows["build_s"]
    return markdown(out)


def dynamic_batch() -> str:
    """What a batch range costs at the size it is tuned for."""
    rows = read("dynamic_batch.csv")
    out = rows[["model", "encoder", "precision", "attention", "batch", "range", "static_ms", "dynamic_ms", "ratio", "eager_fp16_ms"]]
    return markdown(out)


def end_to_end() -> str:
    """Milliseconds of whole encoders and the strongest alternatives."""
    rows = read("end_to_end.csv")
    return markdown(rows[["model", "encoder", "batch", "backend", "attention", "median_ms", "per_second", "torch"]])


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy, "dynamic_batch": dynamic_batch, "end_to_end": end_to_end}


def fill(text: str) -> str:
    """README text with every table made anew.  Raises KeyError for an unknown table's name."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, readme = parser.parse_args().check, ROOT / "README.md"
    text = readme.read_text()
    filled = fill(text)
    if check:
        return 0 if filled == text else 1
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
