"""The environment, hardware and software: python -m experiments.environment [--out results/h200]

Writes OUT/environment.json, from which `python -m experiments.tables` makes the documents' table, and prints it.
`experiments.accuracy` writes the same file.
"""
import argparse
from pathlib import Path

from experiments.record import write_environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/h200"))
    path = parser.parse_args().out / "environment.json"
    write_environment(path)
    print(path.read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
