"""Texts are cut behind the longest pooled position of a batch, and padded to few lengths."""
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import clip_ttrt
from clip_ttrt import contexts, guard, verify
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange

START, END = 49406, 49407
LENGTHS = (16, 32, 48, 77)


def texts(*lengths, seed=0):
    """Tokens int32 [N, 77] of texts with so many tokens, start and end included."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, START, (len(lengths), 77), generator=generator, dtype=torch.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1], row[length:] = START, END, 0
    return tokens


@pytest.fixture(scope="module")
def original():
    return original_with_weights(load_checkpoint("demo"), "cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """On the CPU in fp32, where no GPU decides otherwise; unlike the others, for batches of 1."""
    return clip_ttrt.compile(batch="1:4:8", backend="torchscript", encoder="text",
                             output=tmp_path_factory.mktemp("short") / "a")


@pytest.fixture
def model(artifact):
    """Writes down the shapes that its module is called with."""
    found, _ = clip_ttrt.load(artifact.folder)
    encoder = found._encoders["text"]
    module, found.shapes = encoder.module, []
    encoder.module = lambda x: (found.shapes.append(tuple(x.shape)), module(x))[1]
    return found


def close(model, features, expected):
    """To rounding, of fp32 on the CPU."""
    error = (features.cpu() - expected).norm(dim=1) / expected.norm(dim=1)
    return error.max() < (1e-2 if model.device.type == "cuda" else 1e-5)


on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shapes of the CPU's calls")
