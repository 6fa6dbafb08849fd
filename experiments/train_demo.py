r"""Trains the embedded model: a small CLIP on procedural scenes, drawn on the device as it goes.

    python -m experiments.train_demo --device cuda --seconds 150 --out demo.safetensors \
        --report demo.json

writes the weights (layout: `clip_ttrt/demo/packing.py`) and a JSON report with the figures of
exactly the written file: it is read back and evaluated in fp32 through the package's encoders.
Both are also written along the way, marked unfinished, so that a killed run leaves something.

The loss is CLIP's symmetric cross-entropy with a learnt scale, with two changes.  Captions of
the same combination in one batch are all right answers, none a negative.  And a share of the
pictures is matched a second time with short captions ("a red star", "green rings at the top")
that leave out the same attributes for all, so that short labels work for classification too.

To find shapes, numbers and places within minutes, the features of pictures and of full captions
also go through the same linear classifiers of the six attributes, with a loss of their own.
They are a crutch of the training: the shipped model has none of them.
"""
# ruff: noqa: E402 (PyTorch is imported after the clock starts: the budget counts that too)
import time

STARTED = time.monotonic()

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from clip_ttrt import demo, encoders
from clip_ttrt.demo import captions, packing, scenes
from clip_ttrt.models import MODELS, Dimensions
from experiments.record import commit

BLOCK_STEPS = 16  # steps whose scenes are drawn and sent to the device at once
ARTICLE_SHARE = 0.3  # of the captions of single objects that say "a" instead of "one"
RESERVE = 12.0  # seconds of the budget kept for the last evaluation and the files


@dataclass(frozen=True)
class Options:
    """One training run.  Times are in seconds, shares between 0 and 1."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 150.0  # for everything, imports and evaluation included
    steps: Optional[int] = None  # instead of what fits into `seconds`
    batch: int = 1024  # pictures, each with its full caption
    short: int = 256  # pictures of them that get a short caption too
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    warm_up: float = 0.05  # share of the training
    short_weight: float = 0.5  # of the short captions' loss
    attribute_weight: float = 1.0  # of the attributes' classifiers' loss
    seed: int = 0
    evaluations: int = 8  # during the training, each writes the files
    log_every: int = 100  # steps
    per_class: int = 8  # pictures of each class in the evaluation
    out: str = str(demo.WEIGHTS)
    report: str = ""


class CaptionTokens:
    """Token ids of every caption that training can use, composed from those of their words.

    `ids`: int64 [K], the token ids in use, ascending.  `table`: int16 [captions, templates, T],
    indices into `ids`, padded with that of id 0, where T is the longest caption's length with
    start and end of text.  The order of `ids` keeps end of text the highest, which is how the
    text encoder finds it.
    """

    def __init__(self):
        rows = [captions.word_tokens(line) for line in captions.all_captions()]
        self.ids = torch.tensor(sorted({0, *(token for row in rows for token in row)}))
        compact = {token: index for index, token in enumerate(self.ids.tolist())}
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        codes = [[compact[token] for token in row] for row in padded]
        table = torch.tensor(codes, dtype=torch.int16)
        self.table = table.view(-1, captions.TEMPLATES, longest)

    def to(self, device) -> "CaptionTokens":
        """Move the table to a device; returns itself."""
        self.table = self.table.to(device)
        return self

    def __call__(self, codes: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
        """Tokens of captions, as indices into `ids`.

        codes: int64 [N, 6]; template: int64 [N].  Returns int64 [N, T].
        """
        return self.table[captions.code_of(codes, captions.CAPTION_SIZES), template].long()


class DemoClip(nn.Module):
    """Both encoders and the logit scale, as they are trained, with `words` rows of token embedding.

    `classifiers` reads all attributes from features, [N, E] -> [N, sum of SIZES]; it is not packed.
    """

    def __init__(self, dims: Dimensions, words: int):
        super().__init__()
        self.dims = dims
        self.image = encoders.ImageEncoder(dims).differentiable()
        self.text = encoders.TextEncoder(replace(dims, vocab_size=words)).differentiable()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.classifiers = nn.Linear(dims.embed_dim, sum(captions.SIZES))

    def initialise(self, generator: torch.Generator) -> "DemoClip":
        """Random start from a CPU generator, but for embeddings OpenAI's.

        That is `initialize_parameters` of `clip/model.py`.  Places and words start several times
        larger and patches smaller: with OpenAI's numbers a place is a few percent of what a plain
        background's patch holds, and a training this short spends a good part of itself on
        finding it.
        """
        def normal(parameter, deviation):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)

        widths = (self.dims.image_width, self.dims.text_width)
        for encoder, width in zip((self.image, self.text), widths):
            for block in encoder.blocks:
                residual = width ** -0.5 * (2 * len(encoder.blocks)) ** -0.5
                for layer, deviation in ((block.qkv, width ** -0.5), (block.out, residual),
                                         (block.up, (2 * width) ** -0.5), (block.down, residual)):
                    normal(layer.weight, deviation)
                    nn.init.zeros_(layer.bias)
            normal(encoder.projection.weight, width ** -0.5)
        width = self.dims.image_width
        normal(self.image.patches.weight, 0.5 * (3 * self.dims.patch_size ** 2) ** -0.5)
        normal(self.image.class_embedding, width ** -0.5)
        normal(self.image.positional_embedding, 0.5)
        normal(self.text.token_embedding.weight, 0.1)
        normal(self.text.positional_embedding, 0.05)
        normal(self.classifiers.weight, self.dims.embed_dim ** -0.5)
        nn.init.zeros_(self.classifiers.bias)
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Weight decay for matrices of layers; none for embeddings, biases, norms and the scale."""
        tables = (self.image.positional_embedding, self.text.positional_embedding,
                  self.text.token_embedding.weight)
        embeddings = {id(p) for p in tables}
        decayed = [p for p in self.parameters() if p.ndim >= 2 and id(p) not in embeddings]
        others = [p for p in self.parameters() if p.ndim < 2 or id(p) in embeddings]
        return [{"params": decayed, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0}]

    def packed(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors of the weights' file, where `ids` are the token ids of the embedding's rows."""
        out = {"logit_scale": self.logit_scale}
        for encoder in (self.image, self.text):
            out |= encoder.in_openai_naming()
        return packing.pack(out, ids)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy where every pair with equal keys is a right one.

    images, texts: features [N, E]; keys: int64 [N]; scale: [], what the cosines are multiplied
    with.  The target of a row is uniform over its right pairs; their entropy is subtracted, so
    that 0 is the optimum.  Computed in fp32.
    """
    logits = scale * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    right = (keys.unsqueeze(0) == keys.unsqueeze(1)).float()
    count = right.sum(1)
    targets = right / count.unsqueeze(1)  # symmetric: rows of equal keys have equal sums
    rows = -(targets * logits.log_softmax(1)).sum(1) - count.log()
    columns = -(targets * logits.T.log_softmax(1)).sum(1) - count.log()
    return (rows.mean() + columns.mean()) / 2


def attribute_loss(logits: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the six: logits [N, sum of SIZES], attributes int64 [N, 6]."""
    parts = logits.float().split(captions.SIZES, dim=1)
    losses = [F.cross_entropy(part, truth) for part, truth in zip(parts, attributes.T)]
    return torch.stack(losses).mean()


def full_codes(attributes: torch.Tensor, article: torch.Tensor) -> torch.Tensor:
    """Caption codes that name everything; `article` bool [N] says "a" where there is one object."""
    codes = attributes.clone()
    number = attributes[:, 0]
    codes[:, 0] = torch.where(article & (number == 0), captions.SINGULAR, number)
    return codes


def short_codes(attributes: torch.Tensor, named: tuple[bool, ...]) -> torch.Tensor:
    """Caption codes that leave out what `named` (six flags) does not name, but for the shape."""
    codes = attributes.clone()
    for column, keep in enumerate(named):
        if keep or captions.NAMES[column] == "shape":
            continue
        if captions.NAMES[column] == "number":
            codes[:, 0] = torch.where(attributes[:, 0] == 0, captions.SINGULAR, captions.PLURAL)
        else:
            codes[:, column] = captions.SIZES[column]
    return codes


def batch_losses(
    model: DemoClip, tokens: CaptionTokens, batch: scenes.Scenes, wording: torch.Tensor,
    named: tuple[bool, ...], short: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of a batch of scenes: full captions, short ones of the first `short`, attributes.

    wording: uniform random numbers [N, 3], for the choice of templates and articles.
    """
    attributes = batch.attributes
    full = full_codes(attributes, wording[:, 0] < ARTICLE_SHARE)
    part = short_codes(attributes[:short], named)
    template = (wording[:, 1:] * captions.TEMPLATES).long().clamp_max(captions.TEMPLATES - 1)
    texts = torch.cat([tokens(full, template[:, 0]), tokens(part, template[:short, 1])])
    pictures = scenes.to_input(scenes.render(batch, model.dims.image_resolution))
    device_type = attributes.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
        image_features = model.image(pictures)
        text_features = model.text(texts)
        classes = model.classifiers(torch.cat([image_features, text_features[:len(batch)]]))
    scale = model.logit_scale.exp()
    keys = captions.code_of(attributes)
    full_loss = contrastive_loss(image_features, text_features[:len(batch)], keys, scale)
    short_loss = torch.zeros_like(full_loss)
    if short:
        keys = captions.code_of(part, captions.CAPTION_SIZES)
        rest = text_features[len(batch):]
        short_loss = contrastive_loss(image_features[:short], rest, keys, scale)
    return full_loss, short_loss, attribute_loss(classes, attributes.repeat(2, 1))


class Evaluation:
    """Held-out and training pictures and captions, and the figures of a weights' file on them."""

    def __init__(self, device: str, per_class: int = 8, dims: Dimensions = MODELS["demo"]):
        self.device, self.dims, resolution = device, dims, dims.image_resolution
        held_out = captions.held_out_sample()
        self.everything = captions.held_out_combinations()
        trained = captions.training_sample()
        self.pictures, self.labels = scenes.held_out_set(per_class, resolution=resolution)
        self.trained_pictures, self.trained_labels = scenes.picture_set(
            trained, per_class, 2, resolution)
        self.truth = held_out[self.labels]
        self.texts, self.trained_texts, self.everything_texts = (
            captions.tokenize([captions.caption(row) for row in rows.tolist()])
            for rows in (held_out, trained, self.everything))

    @torch.no_grad()
    def __call__(self, path: str) -> dict:
        """Figures of a weights' file in fp32: accuracies in [0, 1], over texts of 77 tokens.

        - `held_out_top1`: of the pictures of the 128 held-out classes, the share whose nearest
          of the 128 captions is right; `held_out_top1_of_all`: nearest of the captions of all
          held-out combinations; `train_top1`: as the first, for 128 combinations seen in training.
        - `held_out_attributes`: share of right attributes in the nearest of all held-out captions.
        - `recall_image_to_text`, `recall_text_to_image`: recall@1 between the 128 captions and
          the first picture of each class.
        - `largest_activation`: the largest absolute value after any block, of either encoder.
        """
        state_dict = read_weights(path)
        image, text = (make(self.dims).load(state_dict).to(self.device)
                       for make in encoders.ENCODERS.values())
        largest = []
        for block in (*image.blocks, *text.blocks):
            block.register_forward_hook(lambda *call: largest.append(call[-1].abs().max()))

        def features(encoder, inputs):
            parts = (part.to(self.device) for part in inputs.split(256))
            parts = (scenes.to_input(part) if encoder is image else part for part in parts)
            return torch.cat([F.normalize(encoder(part), dim=-1) for part in parts])

        images = features(image, self.pictures)
        texts, everything = features(text, self.texts), features(text, self.everything_texts)
        predicted = (images @ texts.T).argmax(1).cpu()
        predicted_row = self.everything[(images @ everything.T).argmax(1).cpu()]
        right = predicted_row == self.truth
        trained = (features(image, self.trained_pictures)
                   @ features(text, self.trained_texts).T).argmax(1).cpu()
        first = len(self.labels) // len(self.texts)
        similarity = (images[::first] @ texts.T).cpu()
        diagonal = torch.arange(len(similarity))

        def share(hits):
            return round(float(hits.float().mean()), 4)

        return {
            "held_out_top1": share(predicted == self.labels),
            "held_out_classes": len(self.texts),
            "held_out_pictures": len(self.labels),
            "held_out_top1_of_all": share(right.all(1)),
            "held_out_combinations": len(self.everything),
            "held_out_attributes": {
                name: share(right[:, column]) for column, name in enumerate(captions.NAMES)},
            "train_top1": share(trained == self.trained_labels),
            "recall_image_to_text": share(similarity.argmax(1) == diagonal),
            "recall_text_to_image": share(similarity.argmax(0) == diagonal),
            "logit_scale": round(float(state_dict["logit_scale"].exp()), 2),
            "largest_activation": round(float(torch.stack(largest).max()), 2),
        }


def read_weights(path) -> dict[str, torch.Tensor]:
    """A state dict in OpenAI's naming, fp32, from a file that `save_weights` wrote."""
    with safe_open(str(path), framework="pt") as file:
        vocab_size = int(file.metadata()["vocab_size"])
        return packing.unpack({name: file.get_tensor(name) for name in file.keys()}, vocab_size)


def save_weights(path: str, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Write the weights' file in one piece: a reader sees the old file or the new one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": packing.FORMAT, **{name: str(value) for name, value in facts.items()}}
    save_file(tensors, f"{path}.partial", metadata=metadata)
    os.chmod(f"{path}.partial", 0o644)  # safetensors makes its files private
    os.replace(f"{path}.partial", path)


def save_report(path: str, report: dict) -> None:
    """Write the report in one piece."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.partial").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(f"{path}.partial", path)


def device_name(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def learning_rate_share(progress: float, warm_up: float) -> float:
    """Linear warm-up, then half a cosine to zero; `progress` in [0, 1]."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def train(
    options: Options, dims: Dimensions = MODELS["demo"], started: Optional[float] = None
) -> dict:
    """Train, write the weights and the report, and return the report.

    `started` is the `time.monotonic()` that the budget counts from, by default the call.
    Raises ValueError for options that cannot work and FloatingPointError where the loss is
    no longer finite (the last files stay).
    """
    started = time.monotonic() if started is None else started
    if options.batch % 2 or not 0 <= options.short <= options.batch:
        raise ValueError(f"batch {options.batch} must be even and at least short {options.short}")
    device = options.device
    torch.backends.cudnn.allow_tf32 = False  # the figures are fp32's; the training is bf16
    generator = torch.Generator().manual_seed(options.seed)

    tokens = CaptionTokens().to(device)
    evaluation = Evaluation(device, options.per_class, dims)
    model = DemoClip(dims, len(tokens.ids)).initialise(generator).to(device)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(options.weight_decay), lr=0.0, betas=(0.9, 0.98), eps=1e-6,
        fused=device.startswith("cuda"))
    facts = {"vocab_size": dims.vocab_size, "seed": options.seed, "batch": options.batch,
             "torch": torch.__version__, "device": device_name(device), "commit": commit()}
    shipped = [p for name, p in model.named_parameters() if not name.startswith("classifiers.")]
    report = {"finished": False, **facts, "options": asdict(options),
              "parameters": sum(p.numel() for p in shipped), "token_rows": len(tokens.ids),
              "history": []}
    report_path = options.report or f"{options.out}.json"

    def checkpoint(step: int, finished: bool) -> None:
        recipe = {**facts, "steps": step, "finished": finished,
                  "recipe": "experiments/train_demo.py"}
        save_weights(options.out, model.packed(tokens.ids), recipe)
        figures = evaluation(options.out)
        report.update(finished=finished, steps=step, seconds=round(time.monotonic() - started, 1),
                      bytes=os.path.getsize(options.out), figures=figures)
        save_report(report_path, report)
        attributes = " ".join(f"{name} {value:.3f}" for name, value
                              in figures["held_out_attributes"].items())
        print(f"step {step}: held-out top-1 {figures['held_out_top1']:.4f} "
              f"({figures['held_out_top1_of_all']:.4f} of all), train {figures['train_top1']:.4f}, "
              f"recall@1 {figures['recall_image_to_text']:.4f} / "
              f"{figures['recall_text_to_image']:.4f}, "
              f"largest activation {figures['largest_activation']}, " + attributes, flush=True)

    setup = time.monotonic() - started
    print(f"{facts['device']}, torch {facts['torch']}: {report['parameters']} parameters, "
          f"{len(tokens.ids)} token rows, texts of at most {tokens.table.shape[-1]} tokens, "
          f"set up in {setup:.1f} s", flush=True)
    training_seconds = math.inf if options.steps is not None else options.seconds - setup - RESERVE
    if training_seconds <= 0:
        raise ValueError(f"{options.seconds} s leave no time to train after {setup:.1f} s of "
                         f"set-up and {RESERVE} s kept for the end")

    begun = logged_at = time.monotonic()
    step = logged_step = 0
    evaluated = 1
    while True:
        progress = (time.monotonic() - begun) / training_seconds
        if options.steps is not None:
            progress = step / options.steps
        if progress >= 1:
            break
        if progress >= evaluated / (options.evaluations + 1):
            checkpoint(step, finished=False)
            evaluated += 1
        within = step % BLOCK_STEPS
        if within == 0:
            block = scenes.training_scenes(BLOCK_STEPS * options.batch, generator).to(device)
            wordings = torch.rand(BLOCK_STEPS * options.batch, 3, generator=generator).to(device)
            named = torch.rand(BLOCK_STEPS, len(captions.NAMES), generator=generator) < 0.5
        rows = slice(within * options.batch, (within + 1) * options.batch)

        share = learning_rate_share(progress, options.warm_up)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * share
        full, short, attribute = batch_losses(
            model, tokens, block[rows], wordings[rows], tuple(named[within].tolist()),
            options.short)
        optimizer.zero_grad(set_to_none=True)
        (full + options.short_weight * short + options.attribute_weight * attribute).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step += 1

        if step % options.log_every == 0 or step == 1:
            losses = {"step": step, "loss": round(full.item(), 4),
                      "short_loss": round(short.item(), 4),
                      "attribute_loss": round(attribute.item(), 4)}
            now = time.monotonic()
            each = (now - logged_at) / (step - logged_step)
            logged_at, logged_step = now, step
            report["history"].append(losses)
            print(f"{now - started:6.1f} s  step {step}  loss {losses['loss']:.4f}  "
                  f"short {losses['short_loss']:.4f}  attributes {losses['attribute_loss']:.4f}  "
                  f"gradient {float(norm):.2f}  scale {model.logit_scale.exp().item():.1f}  "
                  f"rate {options.learning_rate * share:.2e}  "
                  f"{each * 1e3:.1f} ms/step  {options.batch / each:.0f} pictures/s", flush=True)
            if not math.isfinite(losses["loss"] + losses["short_loss"] + losses["attribute_loss"]):
                raise FloatingPointError(f"the loss is not finite at step {step}: try another "
                                         "--seed or a lower --learning-rate")

    checkpoint(step, finished=True)
    print(f"{options.out}: {report['bytes']} bytes, {step} steps, {report['seconds']} s; "
          f"report in {report_path}", flush=True)
    return report


def parse(arguments=None) -> Options:
    """Options from the command line; the defaults are those of the dataclass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for field in fields(Options):
        kind = {"steps": int}.get(field.name, type(field.default))
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    return Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    train(parse(), started=STARTED)
