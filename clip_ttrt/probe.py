"""The linear probe of CLIP's paper: logistic regression on features.

`fit` minimises what scikit-learn's LogisticRegression does, C * sum of cross entropies +
||W||^2 / 2, where the features are, on a GPU or not; `probe` does it for artifacts and files.
"""
import math
import sys
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from clip_ttrt.artifact import Artifact, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.labelled import difference, features_of, labels_of, numbered, read_rows, wilson
from clip_ttrt.options import ProbeOptions

ROWS = 1 << 14  # whose logits are in memory at once
ROUND, HISTORY = 40, 20  # iterations between two preconditioners; steps that L-BFGS remembers
TARGET = {torch.float32: 1e-5, torch.float64: 1e-11}  # norm of the gradient at which a fit ends
PER_DECADE, DECADES = 8, 6  # of the sweep: C from 1e-6 to 1e6


@dataclass(frozen=True)
class LinearProbe:
    """weight [K, E] and bias [K], of which each sums to 0 over the classes; scikit-learn has one
    row for two classes: weight[1] - weight[0].  gradient_norm: in coordinates in which the Hessian
    is about the identity, so that the objective is about gradient_norm ** 2 / 2 nats a row above
    its minimum."""
    c: float
    weight: Tensor
    bias: Tensor
    iterations: int
    gradient_norm: float

    @property
    def converged(self) -> bool:
        return self.gradient_norm <= 100 * TARGET[self.weight.dtype]

    def top(self, features: Tensor, k: int = 1) -> Tensor:
        """The k most probable classes of features [N, E], best first: int64 [N, k]."""
        return torch.cat([torch.addmm(self.bias, block, self.weight.T).topk(k).indices
                          for block in features.split(ROWS)])


def fit(x: Tensor, y: Tensor, c: float = 0.316, start: Optional[LinearProbe] = None,
        max_iter: int = 1000) -> LinearProbe:
    """Fit to features x [N, E], float32 or float64, and at least two classes y [N], numbers from 0,
    by L-BFGS with strong Wolfe line search.  c: scikit-learn's C.  start: a probe of the same
    classes to go on from."""
    classes = len(start.bias) if start else int(y.max()) + 1
    # Two rows that differ by w have half of its square norm: scikit-learn's penalty is twice.
    objective = Objective(x, y, classes, (2 if classes == 2 else 1) / (c * len(x)))
    mean, axes, at = objective.mean, objective.axes, x.new_zeros(classes, x.shape[1] + 1)
    if start:
        at = torch.cat([start.weight @ axes, (start.bias + start.weight @ mean)[:, None]], 1)
    iterations, taken = 0, ROUND
    while taken == ROUND:
        at, taken, norm = objective.descend(at, min(ROUND, max_iter - iterations), "strong_wolfe")
        iterations += taken
    # Near the minimum values are too coarse for a line search, and gradients are not.
    last, taken, lower = objective.descend(at, min(ROUND, max_iter - iterations), None)
    at, norm = (last, lower) if lower < norm else (at, norm)
    weight = (at[:, :-1] - at[:, :-1].mean(0)) @ axes.T
    bias = at[:, -1] - weight @ mean
    return LinearProbe(c, weight, bias - bias.mean(), iterations + taken, norm)


class Objective:
    """Mean cross entropy of x [N, E] with classes y, + decay / 2 * ||W||^2, of [K, E + 1]: weights
    along the principal axes of x, and the bias that belongs to x less its mean."""

    def __init__(self, x: Tensor, y: Tensor, classes: int, decay: float):
        self.mean, self.classes, self.decay = x.mean(0), classes, decay
        centred, self.count = x - self.mean, len(x)
        covariance = sum(block.T @ block for block in centred.split(ROWS)) / len(x)
        values, axes = torch.linalg.eigh(covariance.double())
        self.axes, self.values = axes.to(x), pad(values.clamp_min(0), (0, 1), value=1).to(x)
        self.blocks = [*zip(pad(centred @ self.axes, (0, 1), value=1).split(ROWS), y.split(ROWS))]

    def __call__(self, at: Tensor) -> tuple[float, Tensor]:
        """The objective and its gradient.  In float32 its sum is still float64, or line searches
        would end too early."""
        at = at.detach().requires_grad_()
        total = self.decay / 2 * at[:, :-1].double().square().sum()
        total.backward()
        for block, y in self.blocks:
            losses = cross_entropy(block @ at.T, y, reduction="none")
            loss = losses.double().sum() / self.count
            loss.backward()
            total = total.detach() + loss.detach()
        return float(total), at.grad

    def descend(self, at: Tensor, steps: int, search: Optional[str]) -> tuple[Tensor, int, float]:
        """Up to so many steps: where they lead, how many they are, and the gradient's norm there.

        torch's L-BFGS keeps no pair of steps whose product is below 1e-10 and begins with a step
        of length 1: in its units the gradient's is 1, and the first step is the identity's."""
        spread = sum((1 - (block @ at.T).softmax(1).square().sum(1)).clamp_min(0).sum()
                     for block, _ in self.blocks) / self.count / (self.classes - 1)
        # Units of coordinates [E + 1] in which the Hessian is about the identity.
        scale, target = (self.values * spread + self.decay).rsqrt(), TARGET[at.dtype]
        gradient = self(at)[1] * scale
        if (norm := float(gradient.norm())) <= target or steps < 1:
            return at, 0, norm
        unit = float(gradient.abs().sum())
        moved = at / scale / unit

        def evaluate() -> float:
            value, gradient = self(moved * scale * unit)
            moved.grad = gradient * scale / unit
            return value / unit**2

        optimizer = torch.optim.LBFGS(
            [moved], max_iter=steps, max_eval=sys.maxsize, history_size=HISTORY,
            tolerance_grad=target / unit / math.sqrt(at.numel()), line_search_fn=search,
            tolerance_change=0.1 * torch.finfo(at.dtype).eps / unit**2 if search else 0)
        optimizer.step(evaluate)
        evaluate()
        taken, norm = optimizer.state[moved]["n_iter"], float(moved.grad.norm()) * unit
        return moved * scale * unit, taken, norm


def sweep(x: Tensor, y: Tensor, held: Tensor) -> tuple[dict[float, float], LinearProbe]:
    """Accuracies on the rows `held` for values of C from 1e-6 to 1e6, by the search of CLIP's paper
    (appendix A.3), of fits to the others; and the last fit, from which another may go on."""
    accuracy, last, step, model = {}, 2 * DECADES * PER_DECADE, 2 * PER_DECADE, None
    wanted, train = range(0, last + 1, step), (x[~held], y[~held])
    while step:
        for index in wanted:
            model = fit(*train, 10 ** (index / PER_DECADE - DECADES), model)
            accuracy[index] = float((model.top(x[held])[:, 0] == y[held]).double().mean())
        best, step = max(sorted(accuracy), key=accuracy.get), step // 2
        wanted = [index for index in (best - step, best + step) if 0 <= index <= last]
    return {10 ** (index / PER_DECADE - DECADES): accuracy[index] for index in accuracy}, model


def split(y: Tensor) -> Tensor:
    """Which rows validate, bool [N]: a tenth of each class, of at least two rows one or more."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    order, counts = order[y[order].argsort(stable=True)], y.bincount()
    place = torch.arange(len(y), device=y.device) - (counts.cumsum(0) - counts)[y[order]]
    return torch.zeros_like(y, dtype=torch.bool).index_put((order,), place % 10 == 1)


def probe(artifacts: Sequence, train: Any, test: Any, **options: Any) -> dict[str, Any]:
    """Fit a probe to each artifact's features of the pictures of `train`, and try it on `test`.

    train, test: a folder with a folder of pictures a class, or a table with columns of paths and
    labels, as `read_rows` takes them.  options: of `ProbeOptions`.  Returns for each artifact
    counts, C, shares of right answers with 95 % intervals and, from the second one on, the
    difference to the first on the same pictures.  Raises UserError for bad input, before anything
    is embedded, and what `embed` raises."""
    options, report, first = ProbeOptions(**options), [], {}
    rows = {part: read_rows(str(source), options) for part, source in
            (("train", train), ("test", test))}
    names = {part: labels_of(part, rows[part], options) for part in rows}
    classes = np.unique(names["train"])
    if len(classes) < 2:
        raise UserError(f"train has one class only, {classes[0]}; a probe needs at least two")
    if unknown := sorted({*names["test"].tolist()} - {*classes.tolist()}):
        raise UserError(f"test has labels that train has not: {', '.join(unknown[:5])}")
    parts = {part: numbered(rows[part], np.searchsorted(classes, names[part])) for part in rows}
    for artifact in map(read_artifact, artifacts):
        found, right = probe_one(artifact, parts, len(classes), options)
        if both := [path for path in first if path in right]:
            found["difference"] = difference(*(np.array([each[path] for path in both])
                                               for each in (first, right)))
        report.append(found)
        first = first or right
    return {"artifacts": report}


def probe_one(artifact: Artifact, parts: dict, classes: int, options: ProbeOptions) -> tuple:
    """An artifact's report, and of each picture of test whether its first answer is right."""
    data, start, c, report = {}, None, options.c, {"artifact": str(artifact.folder)}
    for part, rows in parts.items():
        x, y, paths, bad = features_of(artifact, rows, gpus=options.gpus, force=options.force)
        data[part] = x.to(artifact.device, getattr(torch, options.dtype)), y.to(artifact.device)
        report[part] = {"images": len(x), "bad": bad}
    if options.sweep:
        report["sweep"], start = sweep(*data["train"], split(data["train"][1]))
        c = max(sorted(report["sweep"]), key=report["sweep"].get)  # of equals the smallest
    model = fit(*data["train"], c, start)
    x, y = data["test"]
    hits = (model.top(x, min(5, len(model.bias))) == y[:, None]).cpu().numpy()
    report |= {"classes": classes, "c": c, "iterations": model.iterations,
               "gradient_norm": model.gradient_norm, "converged": model.converged,
               "top-1": wilson(hits[:, 0]), "top-5": wilson(hits.any(1))}
    return report, dict(zip(paths, hits[:, 0]))
