"""The linear probe of CLIP's paper: logistic regression on features, `python -m clip_ttrt.probe`.

`LinearProbe` minimises what scikit-learn's LogisticRegression does, C * sum of cross entropies +
||W||^2 / 2, on a GPU where there is one; `probe` does it for artifacts and files.
"""
import json
import math
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Iterator, Optional, Sequence

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from clip_ttrt.artifact import MANIFEST, read_artifact
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.labelled import difference, read_table, shards, wilson, with_labels, written
from clip_ttrt.options import ProbeOptions

NUMBERS = {"cuda": 2**26, "cpu": 2**20}  # of a block of rows: its logits, or its features
ROUND, HISTORY = 40, 20  # iterations between two preconditioners; steps that L-BFGS remembers
TARGET = {torch.float32: 1e-5, torch.float64: 1e-11}  # norm of the gradient at which a fit ends
ENOUGH = {torch.float32: 1e-4, torch.float64: 1e-8}  # and up to which it counts as converged
PER_DECADE, DECADES = 8, 6  # of the sweep: C from 1e-6 to 1e6


class LinearProbe:
    """Multinomial logistic regression with an L2 penalty, of which the bias has none.

    c: scikit-learn's C.  dtype: float32 or float64, of the whole fit.  device: default cuda where
    there is one.  max_iter: of L-BFGS.  After `fit`: classes [K], sorted; weight [K, E] and bias
    [K], of which each sums to 0 over the classes; iterations; converged; gradient_norm, the
    gradient's in coordinates in which the Hessian is about the identity, so that the objective
    is about gradient_norm ** 2 / 2 nats a row above its minimum.  scikit-learn has one row for two
    classes: weight[1] - weight[0]."""

    def __init__(self, c: float = 0.316, dtype: str = "float32", device: Optional[str] = None,
                 max_iter: int = 1000):
        self.c, self.dtype, self.max_iter = c, getattr(torch, dtype), max_iter
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def fit(self, features: Any, labels: Any, start: Optional["LinearProbe"] = None):
        """Fit to features [N, E] and N labels, numbers or texts, and return self.

        features are copied once, and not if they are of this dtype and device.  start: a probe of
        the same classes to go on from.  Raises UserError for fewer than two classes or lengths
        that differ, warns where the minimum is not reached."""
        self.classes, codes = np.unique(as_array(labels), return_inverse=True)
        x, count = self.place(features), len(self.classes)
        if count < 2:
            raise UserError(f"there is one class only, {', '.join(map(str, self.classes))}; a "
                            "probe needs at least two")
        if len(codes) != len(x):
            raise UserError(f"{len(x)} features have {len(codes)} labels; give one for each")
        # Two rows that differ by w have half of its square norm: scikit-learn's penalty is twice.
        objective = Objective(x, torch.from_numpy(codes).to(x.device), count,
                              (2 if count == 2 else 1) / (self.c * len(x)))
        if start is None:
            prior = torch.bincount(objective.y, minlength=count).to(x).log()
            weight, bias = x.new_zeros(count, x.shape[1]), prior - prior.mean()
        else:
            weight = self.place(start.weight)
            bias = self.place(start.bias) + weight @ objective.mean
        self.iterations, self.gradient_norm, search = 0, math.inf, True
        while self.iterations < self.max_iter:
            steps = min(ROUND, self.max_iter - self.iterations)
            *found, taken, before, after = descend(objective, weight, bias, steps, search)
            self.iterations += taken
            better = math.isfinite(after) if search else after < before
            self.gradient_norm = after if better else before
            weight, bias = found if better else (weight, bias)
            if self.gradient_norm <= TARGET[self.dtype] or not (search or after < before / 2):
                break
            search = search and better and taken == steps
        bias = bias - weight @ objective.mean
        self.weight, self.bias = weight, bias - bias.mean()
        self.converged = self.gradient_norm <= ENOUGH[self.dtype]
        if not self.converged:
            warnings.warn(self.trouble(), RuntimeWarning, stacklevel=2)
        return self

    def trouble(self) -> str:
        return (f"C = {self.c:.4g} has not converged after {self.iterations} iterations: the "
                f"gradient's norm is {self.gradient_norm:.1e}; raise max_iter or use float64")

    def logits(self, features: Any) -> Iterator[Tensor]:
        """[rows, K] of one block of rows after the other, on the device."""
        x, weight, bias = self.place(features), self.weight, self.bias
        for block in x.split(rows_of(x, len(weight))):
            yield torch.addmm(bias, block, weight.T)

    def predict(self, features: Any) -> np.ndarray:
        """The most probable class of each row."""
        return self.classes[torch.cat([z.argmax(1) for z in self.logits(features)]).cpu().numpy()]

    def predict_proba(self, features: Any) -> Tensor:
        """[N, K], on the device."""
        return torch.cat([z.softmax(1) for z in self.logits(features)])

    def score(self, features: Any, labels: Any) -> float:
        """The share of rows whose class is predicted."""
        return float((self.predict(features) == as_array(labels)).mean())

    def place(self, values: Any) -> Tensor:
        return torch.as_tensor(values).detach().to(self.device, self.dtype)


class Objective:
    """Mean cross entropy of x [N, E] with classes y, + decay / 2 * ||W||^2.

    The bias is that of features less their mean, which only changes what it means."""

    def __init__(self, x: Tensor, y: Tensor, classes: int, decay: float):
        self.x, self.y, self.decay, self.classes = x, y, decay, classes
        self.mean, self.rows = x.mean(0), rows_of(x, classes)

    def blocks(self, weight: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Centred features [rows, E], classes [rows, 1] and logits [rows, K]."""
        for block, y in zip(self.x.split(self.rows), self.y[:, None].split(self.rows)):
            block = block - self.mean
            yield block, y, torch.addmm(bias, block, weight.T)

    def __call__(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The objective, in float64, and its gradients."""
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for block, y, z in self.blocks(weight, bias):
            total = z.logsumexp(1, keepdim=True)
            loss += (total - z.gather(1, y)).sum(dtype=torch.float64)
            residual = z.sub_(total).exp_()
            residual.scatter_add_(1, y, z.new_full((1, 1), -1).expand_as(y))
            by_weight.addmm_(residual.T, block)
            by_bias += residual.sum(0)
        count, penalty = len(self.x), weight.square().sum(dtype=torch.float64) * self.decay / 2
        return (loss / count + penalty, by_weight / count + self.decay * weight, by_bias / count)

    def curvature(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The Hessian's mean over the classes, float64 [E, E], of the bias []; without the decay.

        It is exact for two classes, and for more of them where all are as probable."""
        whole, of_bias = self.x.new_zeros(2, dtype=torch.float64)[:, None, None]
        for block, _, z in self.blocks(weight, bias):
            spread = (1 - z.softmax(1).square().sum(1, keepdim=True)).clamp_min(0)
            whole = whole + (block * spread).T @ block
            of_bias = of_bias + spread.sum()
        share = len(self.x) * (self.classes - 1)
        return whole / share, of_bias.squeeze() / share


def descend(objective: Objective, weight: Tensor, bias: Tensor, steps: int, search: bool):
    """Up to so many steps of L-BFGS in coordinates in which the Hessian is about the identity.

    search: with strong Wolfe line search, which ends early near the minimum, where the objective's
    values are too coarse for it.  Without, steps are those that the gradients alone suggest.
    Returns weight, bias, the steps taken, and the gradient's norm before and after."""
    curvature, of_bias = objective.curvature(weight, bias)
    values, axes = torch.linalg.eigh(curvature)
    roots = torch.cat([values.clamp_min(0), of_bias[None]]).add(objective.decay).sqrt().to(weight)
    axes, scale = axes.to(weight), 1.0
    at = torch.cat([weight @ axes, bias[:, None]], 1) * roots

    def parameters() -> tuple[Tensor, Tensor]:
        found = at * scale / roots
        return found[:, :-1] @ axes.T, found[:, -1]

    def evaluate() -> Tensor:
        value, by_weight, by_bias = objective(*parameters())
        at.grad = torch.cat([by_weight @ axes, by_bias[:, None]], 1) / roots / scale
        return value / scale**2

    evaluate()
    before, target = float(at.grad.norm()), TARGET[at.dtype]
    if before <= target:
        return weight, bias, 0, before, before
    # torch's L-BFGS keeps no pair of steps whose product is below 1e-10 and begins with a step of
    # length 1: in these units the gradient's is 1, and the first step is that of the identity.
    scale = float(at.grad.abs().sum())
    at /= scale
    optimizer = torch.optim.LBFGS(
        [at], max_iter=steps, max_eval=sys.maxsize, history_size=HISTORY,
        tolerance_grad=target / scale / math.sqrt(at.numel()),
        tolerance_change=0.1 * torch.finfo(at.dtype).eps / scale**2 if search else 0,
        line_search_fn="strong_wolfe" if search else None)
    optimizer.step(evaluate)
    evaluate()
    return *parameters(), optimizer.state[at]["n_iter"], before, float(at.grad.norm()) * scale


def sweep(make: Callable, x: Tensor, y: np.ndarray, training: int) -> tuple[LinearProbe, dict]:
    """The best C on the rows from `training` on, by the search of CLIP's paper (appendix A.3).

    make: C -> a probe, which is fit to the other rows from the nearest one's weights.  Returns the
    best probe, of equals that with the smallest C, and the accuracy for each C, from 1e-6 to 1e6.
    """
    fits, accuracy, last, step = {}, {}, 2 * DECADES * PER_DECADE, 2 * PER_DECADE
    wanted = [(index, index - step) for index in range(0, last + 1, step)]
    while step:
        for index, near in wanted:
            c = 10 ** (index / PER_DECADE - DECADES)
            fits[index] = make(c).fit(x[:training], y[:training], fits.get(near))
            accuracy[index] = fits[index].score(x[training:], y[training:])
        best, step = max(accuracy, key=lambda index: (accuracy[index], -index)), step // 2
        wanted = [(index, best) for index in (best - step, best + step) if 0 <= index <= last]
    return fits[best], {fits[index].c: accuracy[index] for index in sorted(fits)}


def split(y: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """An order of rows that ends with a tenth of each class, at least a row; where that begins."""
    order = np.random.default_rng(seed).permutation(len(y))
    order, counts = order[np.argsort(y[order], kind="stable")], np.bincount(y)
    place = np.arange(len(y)) - np.repeat(counts.cumsum() - counts, counts)
    held = place < np.repeat(np.maximum(1, counts // 10), counts)
    return np.concatenate([order[~held], order[held]]), int((~held).sum())


def probe(artifacts: Sequence, train: Any, test: Any, **options: Any) -> dict[str, Any]:
    """Fit a probe to each artifact's features of the pictures of `train`, and try it on `test`.

    train, test: a folder with a folder of pictures a class, or a .csv or .parquet with columns of
    paths and labels.  options: of `ProbeOptions`.  Returns for each artifact counts, C, seconds,
    shares of right answers with 95 % intervals and, from the second one on, the difference to the
    first on the same pictures.  Raises UserError for bad input, before anything is embedded, and
    what `embed` raises."""
    options, report, first = ProbeOptions(**options), [], None
    sources = {"train": train, "val": options.val, "test": test}
    rows = {part: with_labels(source, read_table(str(source), options), options)
            for part, source in sources.items() if source}
    classes_of({part: labels for part, (_, labels) in rows.items()}, options)
    for artifact in [read_artifact(each).folder for each in artifacts]:
        name = f"{artifact.name}-{sha256_of_file(artifact / MANIFEST)[:8]}"
        with nullcontext(options.output) if options.output else TemporaryDirectory() as output:
            found, right = probe_one(artifact, rows, Path(output, name), options)
        if first is not None:
            found["difference"] = difference(first, right)
        first = right if first is None else first
        report.append(found)
    return {"artifacts": report}


def probe_one(artifact: Path, rows: dict, folder: Path, options: ProbeOptions) -> tuple:
    """An artifact's report, and float [rows of test]: 1 right, 0 wrong, nan a bad picture."""
    x, labels, good, seconds = {}, {}, {}, 0.0
    report = {"artifact": str(artifact)}
    for part, (paths, names) in rows.items():
        x[part], good[part], spent = features(artifact, part, paths, folder, options)
        labels[part], seconds = names[good[part]], seconds + spent
        report |= {part: {"images": len(x[part]), "bad": int((~good[part]).sum())}}
    classes, begun = classes_of(labels, options), time.perf_counter()
    y = {part: np.searchsorted(classes, names) for part, names in labels.items()}
    make = partial(LinearProbe, dtype=options.dtype, max_iter=options.max_iter)
    model, start = make(options.c or 0.316), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options.sweep:
            order, training = split(y["train"], options.seed)
            if options.val:
                x["train"] = torch.cat([x["train"], x["val"]])
                y["train"] = np.concatenate([y["train"], y["val"]])
                order, training = slice(None), len(labels["train"])
            x["train"], y["train"] = model.place(x["train"][order]), y["train"][order]
            start, report["sweep"] = sweep(make, x["train"], y["train"], training)
            model.c = start.c
        model.fit(x["train"], y["train"], start)
    answers = [z.topk(min(5, len(classes))).indices.cpu() for z in model.logits(x["test"])]
    hits = torch.cat(answers).numpy() == y["test"][:, None]
    per_class = [hits[y["test"] == each, 0].mean() for each in np.unique(y["test"])]
    report |= {"classes": len(classes), "top1": wilson(hits[:, 0]),
               "top5": wilson(hits.any(1)) if len(classes) > 5 else None,
               "per_class": float(np.mean(per_class)), "c": model.c,
               "iterations": model.iterations, "gradient_norm": model.gradient_norm,
               "warning": None if model.converged else model.trouble(),
               "seconds_to_embed": seconds, "seconds_to_fit": time.perf_counter() - begun}
    if options.output:
        weights = {"weight": model.weight.cpu(), "bias": model.bias.cpu()}
        save_file(weights, folder / "probe.safetensors", {"classes": json.dumps(list(classes))})
    right = np.full(len(good["test"]), np.nan)
    right[good["test"]] = hits[:, 0]
    return report, right


def classes_of(labels: dict[str, np.ndarray], options: ProbeOptions) -> np.ndarray:
    """Those of train, sorted; UserError where they do not serve."""
    classes, counts = np.unique(labels["train"], return_counts=True)
    if len(classes) < 2:
        raise UserError(f"train has one class only, {classes[0]}; a probe needs at least two")
    if options.sweep and not options.val and counts.min() < 2:
        raise UserError(f"{classes[counts.argmin()]} has fewer than two pictures, and one of them "
                        "is to validate C; give --val, or leave --sweep away")
    for part, names in labels.items():
        if unknown := sorted(set(names.tolist()) - set(classes.tolist())):
            raise UserError(f"{part} has labels that train has not: {', '.join(unknown[:5])}")
    return classes


def features(artifact: Path, part: str, paths: list[str], folder: Path, options: ProbeOptions):
    """Embed pictures into folder/part: float32 [good, E], bool [paths] (good), seconds."""
    from clip_ttrt.pipeline.embed import embed

    out = folder / part
    more = {name: getattr(options, name) for name in ("gpus", "force", "overwrite")}
    done = embed(artifact, shards(paths), out, normalize=False, dtype="float32", **more)
    found, good = [], []
    for each, metadata, bad in written(out):
        good.append(np.ones(len(metadata) + len(bad), bool))
        good[-1][[row["row"] for row in bad]] = False
        found += [each] * bool(metadata)
    if not found:
        raise UserError(f"no picture of {part} can be read: {options.output and out / 'bad'}")
    return torch.cat(found), np.concatenate(good), done["seconds"]


def as_array(labels: Any) -> np.ndarray:
    return np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)


def rows_of(x: Tensor, classes: int) -> int:
    """So many rows that memory stays bounded."""
    return max(1, NUMBERS[x.device.type] // max(classes, x.shape[1]))


if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["probe", *sys.argv[1:]]))
