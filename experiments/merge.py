"""One sweep.csv from the parts of several runs: python -m experiments.merge results/h200/sweep.csv PART/sweep.csv...

A row that was measured in several runs on the same kind of GPU is kept once, from the run in which it took least, whatever the
backend: other work on the machine only ever adds to a time.  A row without a time gives way to one with it.  The file itself,
where it is there already, is one of the parts; `commit` says which run a row is from.  With --instead a row of the parts that
has a time takes the place of the file's own, whatever that took: so that what is compared is from one run.  With --floor FILE...
a row without `floor_ms`, such as `experiments.sweep --hold` leaves, gets that of its own run, if it is there.
"""
import argparse
import csv
import os
import sys
from pathlib import Path
from typing import Iterable

from clip_ttrt.models import MODELS
from experiments import floor
from experiments.baselines import BACKENDS
from experiments.record import read_rows
from experiments.sweep import COLUMNS, KEY


def merged(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The fastest row of each key, ordered by model, encoder, precision, tokens, batch and backend.

    Raises ValueError where rows with times come from GPUs of different kinds, or have other columns than a sweep's.
    """
    best: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if tuple(row) != COLUMNS:
            raise ValueError(f"a sweep's rows have the columns {', '.join(COLUMNS)}, and these {', '.join(row)}")
        key = tuple(row[name] for name in KEY)
        if key not in best or duration(row) < duration(best[key]):
            best[key] = row
    if len(gpus := sorted({row["gpu"] for row in best.values() if row["median_ms"]})) > 1:
        raise ValueError(f"times of different processors cannot stand in one file: {', '.join(gpu or 'cpu' for gpu in gpus)}")
    models, backends = list(MODELS), list(BACKENDS)
    return sorted(best.values(), key=lambda row: (models.index(row["model"]), row["encoder"], row["precision"], int(row["tokens"]), int(row["batch"]),
                                                  backends.index(row["backend"]), row["cuda_graph"]))


def with_floors(rows: Iterable[dict[str, str]], floors: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows, those with a time and without a floor with that of the same work, GPU and commit where there is one."""
    run = (*floor.KEY, "gpu", "commit")
    known = {tuple(row[name] for name in run): row["floor_ms"] for row in floors}
    return [{**row, "floor_ms": row["floor_ms"] or (known.get(tuple(row[name] for name in run), "") if row["median_ms"] else "")} for row in rows]


def duration(row: dict[str, str]) -> float:
    return float(row["median_ms"] or "inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=Path, nargs="*")
    parser.add_argument("--instead", action="store_true", help="measured rows of the parts replace the file's own")
    parser.add_argument("--floor", type=Path, nargs="+", default=[], metavar="FILE", help="floor.csv of the same runs")
    options = parser.parse_args()
    if missing := [str(path) for path in [*options.parts, *options.floor] if not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    try:
        own, given = read_rows(options.out), [row for path in options.parts for row in read_rows(path)]
        replaced = {tuple(row[name] for name in KEY) for row in given if row["median_ms"]} if options.instead else set()
        rows = merged([*(row for row in own if tuple(row[name] for name in KEY) not in replaced), *given])
        rows = with_floors(rows, [row for path in options.floor for row in read_rows(path)])
    except ValueError as problem:
        parser.error(str(problem))
    draft = options.out.with_suffix(".partial")
    with open(draft, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, options.out)
    print(f"{options.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
