"""Zero-shot classification of pictures and frames of any number."""
import csv
import json
import sys
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence, Union

from clip_ttrt.artifact import read_artifact
from clip_ttrt.demo import captions
from clip_ttrt.errors import UserError
from clip_ttrt.labelled import embedded
from clip_ttrt.zeroshot import Head, Texts, best, read_texts, templates_for, text_features


def classify(artifact: Union[str, Path], inputs: Union[str, Sequence[str]], labels: Texts,
             templates: Optional[Texts] = None, multi: bool = False, top: int = 5,
             **options: Any) -> Iterator[dict[str, Any]]:
    """The best labels of pictures and frames, one after the other: what `embed` knows of each and
    `labels`, dicts of label and score, best first; of a bad one its image_path and `error`.

    inputs, options: as `embed` has them.  labels, templates, multi: as `ZeroShot` has them.
    Raises UserError for bad input, and what `embed` raises."""
    model, labels = read_artifact(artifact), read_texts(labels, "labels")
    if top < 1:
        raise UserError(f"bad top {top}: it must be above 0")
    if model.origin.kind == "demo" and (unknown := captions.unknown_words(labels)):
        print(f"clip_ttrt: the embedded model was never trained on {', '.join(unknown)}: its "
              "answer for labels with these words means nothing", file=sys.stderr)
    text = text_features(model, labels, templates_for(model, templates))
    head = Head(model, text.to(model.device))
    for features, rows, bad in embedded(model.folder, inputs, dtype="float32", **options):
        found = head.scores(head(features.to(model.device)), multi)
        found = best(found, labels, top)
        good = ({**row, "labels": [{"label": label, "score": score} for label, score in pairs]}
                for row, pairs in zip(rows, found))
        reasons = {each.pop("row"): each for each in bad}
        for row in range(len(rows) + len(bad)):
            yield reasons[row] if row in reasons else next(good)


def run(artifact: Path, inputs: list[str], as_json: bool, as_csv: bool, **options: Any) -> int:
    """Print a row for each picture.  3: none can be read."""
    table, read = csv.writer(sys.stdout), False
    if as_csv:
        table.writerow(["image_path", "time", "rank", "label", "score", "error"])
    for row in classify(artifact, inputs, **options):
        path = row["image_path"].encode(errors="backslashreplace").decode()
        pairs, time = row.get("labels", ()), row.get("time")
        read = read or bool(pairs)
        if as_json:
            print(json.dumps(row, default=str))
        elif as_csv:
            table.writerows([path, time, rank, each["label"], each["score"], None]
                            for rank, each in enumerate(pairs, 1))
            if not pairs:
                table.writerow([path, time, None, None, None, row["error"]])
        else:
            form = "{score:7.4f}  {label}" if options["multi"] else "{score:7.2%}  {label}"
            lines = [form.format(**each) for each in pairs] or [row["error"]]
            print(path if time is None else f"{path} at {time} s", *lines, sep="\n")
    return 0 if read else 3
