"""Decoding by the GPU's JPEG engines, against Pillow's pixels."""
import io
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import needs
import numpy as np
import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt import kernels
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.decode import Bad, Decoder, Hardware

pytestmark = [pytest.mark.gpu, needs.engines, needs.nvimagecodec, needs.built]

LEVELS = 2  # of 255: the engines round their colours in their own way
SIZES = ((64, 64), (256, 256), (500, 375), (333, 501), (640, 480), (1281, 853))
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "grey")


def encoded(opened, size, sampling, quality=90):
    stream = io.BytesIO()
    mode, options = ("L", {}) if sampling == "grey" else ("RGB", {"subsampling": sampling})
    opened.convert(mode).resize(size).save(stream, "JPEG", quality=quality, **options)
    return stream.getvalue()


def full(data):
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return torch.from_numpy(pixels.copy() if pixels.ndim == 3 else pixels[..., None].copy()).cuda()


def distance(pixels, expected):
    assert pixels.shape == expected.shape
    return (pixels.int() - expected.int()).abs().max().item()


@pytest.fixture(scope="module")
def shipped():
    folder = Path(clip_ttrt.__file__).parent / "pictures"
    return [Image.open(path) for path in sorted(folder.glob("*.jpg"))]


@pytest.fixture(scope="module")
def decoder():
    return Decoder("gpu", 224, "cuda")


@pytest.fixture
def files(shipped):
    """40 of one size, so that memory that is used again holds a picture where another one was."""
    return [encoded(each, (320, 240), "4:2:0", quality)
            for quality in (95, 90, 85, 80, 75) for each in shipped]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", SIZES)
def test_close_to_pillow(decoder, shipped, size, sampling):
    files = [encoded(each, size, sampling, quality) for each in shipped for quality in (75, 95)]
    decoder.report()
    results = decoder.decode(files)
    assert [each.route for each in results] == ["gpu"] * len(files)
    assert max(distance(each.pixels, full(data)) for each, data in zip(results, files)) <= LEVELS
    report = decoder.report()
    assert report["fallbacks"] == report["silent_skips"] == 0


def test_mixed_batch(decoder, shipped, files):
    """All sizes and samplings at once, with what is not for the engines and what is no picture."""
    mixed = [encoded(shipped[number % len(shipped)], size, sampling)
             for number, size in enumerate(SIZES) for sampling in SAMPLINGS]
    stream = io.BytesIO()
    shipped[0].save(stream, "JPEG", progressive=True)
    others = [stream.getvalue(), b"", files[0][:5000], b"<html>", np.zeros((9, 7, 3), np.uint8)]
    items = [each for number, data in enumerate(mixed)
             for each in (data, others[number % len(others)])]
    for item, result in zip(items, decoder.decode(items)):
        if item is others[4]:
            assert result.pixels is item
        elif item in others[1:4]:
            assert isinstance(result, Bad)
        elif item is others[0]:
            assert result.route == "cpu" and torch.equal(result.pixels.cuda(), full(item))
        else:
            assert result.route == "gpu" and distance(result.pixels, full(item)) <= LEVELS


def test_sampled_pictures_are_close(decoder, files, monkeypatch):
    monkeypatch.setattr("clip_ttrt.pipeline.decode.SAMPLED", 1)
    decoder.report()
    results = decoder.decode(files)
    assert all(torch.equal(each.exact.cuda(), full(data)) for each, data in zip(results, files))
    assert 0 <= decoder.report()["largest_distance"] <= LEVELS


def test_silent_skips_are_found(decoder, files):
    """Every third picture never reaches the engines, which call all of them decoded."""
    class Skipping(Hardware):
        def create(self):
            decoder, stream = super().create()

            def decode(files, on):
                decoder(files[np.arange(len(files)) % 3 > 0], on)
                files["written"] = 1
            return decode, stream

    skipping = Decoder("gpu", 224, "cuda")
    skipping._hardware = Skipping(decoder._hardware.device, 4)
    skipped = len(range(0, len(files), 3))
    for trial in range(5):
        turned = files[trial:] + files[:trial]
        results = skipping.decode(turned)
        assert [each.route for each in results].count("cpu") == skipped
        for data, each in zip(turned, results):
            assert distance(each.pixels.cuda(), full(data)) <= LEVELS
        del results, each
    assert skipping.report()["silent_skips"] == 5 * skipped


def test_without_the_library(monkeypatch):
    def missing():
        raise UserError(f"libclip_ttrt_kernels-trt0.so is not built; {kernels.BUILD_IT}")

    monkeypatch.setattr(kernels, "library", missing)
    monkeypatch.setattr(kernels, "available", lambda: False)
    with pytest.raises(UserError, match=re.escape(kernels.BUILD_IT) + "$"):
        Decoder("gpu", 224, "cuda")
    assert Decoder("auto", 224, "cuda").report()["problem"].endswith(kernels.BUILD_IT)


def test_views_of_one_buffer(decoder, files):
    """What reading gives: files that follow each other, as memoryviews."""
    whole, ends = b"".join(files), np.cumsum([len(each) for each in files]).tolist()
    views = [memoryview(whole)[end - len(each):end] for each, end in zip(files, ends)]
    for result, expected in zip(decoder.decode(views), decoder.decode(files)):
        assert result.route == "gpu" and torch.equal(result.pixels, expected.pixels)


def test_nothing_is_printed(files):
    """In a process of its own, where nvImageCodec is loaded for the first time."""
    program = ("import sys\nfrom clip_ttrt.pipeline.decode import Decoder\n"
               "data = sys.stdin.buffer.read()\n"
               "first, second = Decoder('gpu', 224, 'cuda').decode([data, data[:700]])\n"
               "assert first.route == 'gpu' and isinstance(second, Exception)\n")
    done = subprocess.run([sys.executable, "-c", program], input=files[0], capture_output=True)
    printed = [line for line in (done.stdout + done.stderr).splitlines() if b"[TRT]" not in line]
    assert (done.returncode, printed) == (0, [])  # TensorRT tells of itself as it is loaded


def test_memory_is_read_before_it_is_written(decoder, files):
    """120 batches, dropped while the stream that copies them is still busy (the trials of
    meta-pytorch/torchcodec#1634)."""
    expected = torch.stack([full(data) for data in files]).short()
    reader, copies, places = torch.cuda.Stream(), [], set()
    with torch.cuda.stream(reader):
        for trial in range(120):
            shift = 7 * trial % len(files)
            results = decoder.decode(files[shift:] + files[:shift])
            places.add(results[0].pixels.untyped_storage().data_ptr())
            torch.cuda._sleep(20_000_000)  # some 10 ms: longer than the engines take
            copies.append((shift, torch.stack([each.pixels for each in results])))
            del results
            if len(copies) == 8:
                for shift, copy in copies:
                    gap = copy.short() - expected.roll(-shift, 0)
                    assert gap.abs().max().item() <= LEVELS
                copies.clear()
    assert len(places) < 20  # the memory was used again


def test_busy_caller_and_allocator(decoder, files):
    """Pending writes to memory that the allocator hands out do not end up in pictures."""
    expected = torch.stack([full(data) for data in files]).short()
    for _ in range(100):
        junk = [torch.empty(32 << 20, dtype=torch.uint8, device="cuda") for _ in range(3)]
        torch.cuda._sleep(5_000_000)
        for each in junk:
            each.fill_(255)
        del junk, each
        results = decoder.decode(files)
        torch.cuda.synchronize()
        pixels = torch.stack([each.pixels for each in results]).short()
        assert (pixels - expected).abs().max().item() <= LEVELS


def test_threads(decoder, files):
    expected = torch.stack([full(data) for data in files]).short()
    torch.cuda.synchronize()
    barrier = threading.Barrier(3)

    def work(number):
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for trial in range(30):
                shift = (11 * number + trial) % len(files)
                results = decoder.decode(files[shift:] + files[:shift])
                pixels = torch.stack([each.pixels for each in results]).short()
                del results
                assert (pixels - expected.roll(-shift, 0)).abs().max().item() <= LEVELS

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
