"""Decoding: the routes, and pixels and refusals against Pillow's own."""
import ctypes
import io
import random
import shutil
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from clip_ttrt import kernels
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline import decode
from clip_ttrt.pipeline.decode import Bad, Decoder, Hardware, Picture

pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")
SIDE = 32


def picture(width=96, height=80, mode="RGB"):
    """Smooth colours under noise, the same in every run."""
    noise = np.random.default_rng(width * height).integers(0, 40, (height, width, 3))
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.3, 1, 3)
    return Image.fromarray((ramp + noise).astype(np.uint8)).convert(mode)


def file(format="JPEG", mode="RGB", size=(96, 80), **options):
    stream = io.BytesIO()
    picture(*size, mode).save(stream, format, **options)
    return stream.getvalue()


def resampled(data, old, new):
    """A JPEG whose luma sampling is told otherwise: the same blocks in another arrangement."""
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == old
    return data[:at] + bytes([new]) + data[at + 1:]


def renamed(data, ids):
    """A JPEG whose components have other ids, in its frame and in its scan."""
    data, frame, scan = bytearray(data), data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for number, name in enumerate(ids):
        data[frame + 10 + 3 * number] = data[scan + 5 + 2 * number] = name
    return bytes(data)


def adobe(data, transform):
    return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + data[2:]


def separate_scans():
    """A baseline JPEG, 4:4:4, with a scan for each component: three grey JPEGs in one."""
    greys = [file(mode="L")] * 3
    frame, tables = greys[0].index(b"\xff\xc0"), greys[0].index(b"\xff\xc4")
    head = (greys[0][:frame] + b"\xff\xc0\0\x11\x08\0\x50\0\x60\3\1\x11\0\2\x11\0\3\x11\0"
            + greys[0][tables:greys[0].index(b"\xff\xda")])
    scans = [b"\xff\xda\0\x08\1" + bytes([number]) + grey[grey.index(b"\xff\xda") + 6:-2]
             for number, grey in enumerate(greys, 1)]
    return head + b"".join(scans) + b"\xff\xd9"


def mpo():
    """Two JPEGs in a file, of which Pillow gives the first."""
    stream = io.BytesIO()
    picture().save(stream, "MPO", save_all=True, append_images=[picture(60, 40)])
    return stream.getvalue()


def grey16():
    stream = io.BytesIO()
    values = np.arange(96 * 80, dtype=np.uint16).reshape(80, 96) * 8
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


JPEG = file(quality=90, subsampling="4:2:0")
FILES = {  # name: (bytes, route)
    "4:4:4": (file(subsampling="4:4:4"), "gpu"),
    "4:2:2": (file(subsampling="4:2:2"), "gpu"),
    "4:2:0": (JPEG, "gpu"),
    "grey": (file(mode="L"), "gpu"),
    "odd sides": (file(size=(97, 51)), "gpu"),
    "restarts": (file(restart_marker_blocks=3), "gpu"),
    "exif": (file(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"), "gpu"),
    "some bytes behind": (JPEG + b"x" * 100, "gpu"),
    "many bytes behind": (JPEG + b"x" * 2000, "cpu"),
    "YCbCr by Adobe": (adobe(JPEG, 1), "gpu"),
    "two in a file": (mpo(), "gpu"),
    "progressive": (file(progressive=True), "cpu"),
    "progressive 4:4:4": (file(progressive=True, subsampling="4:4:4"), "cpu"),
    "progressive grey": (file(mode="L", progressive=True), "cpu"),
    "4:4:0": (resampled(file(size=(96, 96), subsampling="4:2:2"), 0x21, 0x12), "pillow"),
    "4:1:1": (resampled(file(size=(96, 96)), 0x22, 0x41), "cpu"),
    "a scan for each component": (separate_scans(), "cpu"),
    "1x1": (file(size=(1, 1)), "cpu"),
    "narrow": (file(size=(5, 90)), "cpu"),
    "ids 0, 1, 2": (renamed(JPEG, (0, 1, 2)), "cpu"),
    "ids R, G, B": (renamed(file(subsampling="4:4:4"), b"RGB"), "pillow"),
    "RGB by Adobe": (adobe(file(subsampling="4:4:4"), 0), "pillow"),
    "CMYK": (file(mode="CMYK"), "pillow"),
    "PNG": (file("PNG"), "pillow"),
    "PNG grey": (file("PNG", "L"), "pillow"),
    "PNG alpha": (file("PNG", "RGBA"), "pillow"),
    "PNG grey alpha": (file("PNG", "LA"), "pillow"),
    "PNG palette": (file("PNG", "P"), "pillow"),
    "PNG 1 bit": (file("PNG", "1"), "pillow"),
    "GIF": (file("GIF", "P"), "pillow"),
    "WebP": (file("WEBP"), "pillow"),
    "BMP": (file("BMP"), "pillow"),
    "TIFF": (file("TIFF"), "pillow"),
}
if int(PIL.__version__.split(".")[0]) > 10:  # which cannot resize it
    FILES["PNG 16 bit"] = (grey16(), "pillow")
REFUSED = {
    "empty": b"", "HTML": b"<!doctype html><p>404", "half": JPEG[:len(JPEG) // 2],
    "header": JPEG[:100], "a few bytes short": JPEG[:-10], "PNG half": FILES["PNG"][0][:2000],
    "half progressive": FILES["progressive"][0][:1000], "SOI": b"\xff\xd8\xff",
    "12 bits": JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
}


def full(data):
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def original(data, side=SIDE):
    """OpenAI's resize and crop by Pillow alone."""
    opened = Image.open(io.BytesIO(data))
    width, height = opened.size
    short = min(width, height)
    size = tuple(side if each == short else int(side * each / short) for each in opened.size)
    left, top = (int(round((each - side) / 2)) for each in size)
    opened = opened.resize(size, Image.BICUBIC).crop((left, top, left + side, top + side))
    return np.asarray(opened.convert("RGB"))


CUDA = """
#pragma once
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """kernels/jpeg of these sources, without CUDA."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("jpeg")
    (folder / "cuda_runtime_api.h").write_text(CUDA)
    subprocess.run(["g++", "-O2", "-Wall", "-Wextra", "-Werror", "-std=c++17", "-shared", "-fPIC",
                    "-I", folder, "-o", folder / "jpeg.so", kernels.sources() / "jpeg/jpeg.cpp",
                    "-ldl"], check=True)
    return ctypes.CDLL(str(folder / "jpeg.so"))


@pytest.fixture(autouse=True)
def library(built, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: built)
    monkeypatch.setattr(kernels, "available", lambda: True)
    return built


def route_of(data):
    return ("gpu", "cpu", "pillow")[decode.scan([data])["route"][0]]


@pytest.fixture(scope="module")
def decoder():
    return Decoder("exact", SIDE, threads=2)


@pytest.mark.parametrize("name", FILES)
def test_route(name):
    data, route = FILES[name]
    assert route_of(data) == route


def test_route_of_what_is_refused():
    """Pillow says why; what only its pixels show is the first decoder's to find."""
    routes = {name: route_of(data) for name, data in REFUSED.items()}
    assert routes.pop("half progressive") == "cpu" and routes.pop("half") == "cpu"
    assert routes.pop("a few bytes short") == "cpu"
    assert set(routes.values()) == {"pillow"}


def test_route_without_the_library(monkeypatch):
    """As if there were no engines, which need it."""
    monkeypatch.setattr(kernels, "available", lambda: False)
    for data, route in FILES.values():
        assert route_of(data) == {"gpu": "cpu"}.get(route, route)
    files = [data for data, _ in FILES.values()] + [*REFUSED.values()]
    for data, each in zip(files, Decoder("exact", SIDE, threads=1).decode(files)):
        if data in REFUSED.values():
            assert isinstance(each, Bad)
        else:
            assert each.pixels.shape[:2] == (SIDE, SIDE) or np.array_equal(each.pixels, full(data))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", ["exact", "auto", "pillow"])
def test_pixels_equal_pillows(name, mode):
    data, route = FILES[name]
    result, = Decoder(mode, SIDE, threads=1).decode([data])
    with Image.open(io.BytesIO(data)) as opened:
        size, whole = opened.size, opened.mode in ("L", "RGB") and mode != "pillow"
    assert result.route == ("pillow" if "pillow" in (mode, route) else "cpu")
    assert (result.width, result.height) == size
    assert result.pixels.dtype == torch.uint8
    assert np.array_equal(result.pixels, full(data) if whole else original(data))


def test_accepts_what_pillow_accepts(decoder):
    """600 files with one byte changed, half of them in the header."""
    chance, files = random.Random(7), []
    for name in ("4:2:0", "grey", "progressive", "4:4:4", "restarts", "YCbCr by Adobe"):
        data = FILES[name][0]
        scan = data.index(b"\xff\xda")
        for number in range(100):
            at = chance.randrange(*((2, scan + 12) if number % 2 else (scan + 12, len(data))))
            files.append(data[:at] + bytes([chance.randrange(256)]) + data[at + 1:])
    refused = 0
    for data, result in zip(files, decoder.decode(files)):
        try:
            expected = full(data)
        except Exception:
            assert isinstance(result, Bad)
            refused += 1
        else:
            assert np.array_equal(result.pixels, expected)
    assert 20 < refused < 300


@pytest.mark.parametrize("mode", ["exact", "pillow"])
def test_refusals_keep_their_place(mode):
    good = [data for data, _ in FILES.values()]
    items = [each for pair in zip(good, REFUSED.values()) for each in pair] + good
    decoder = Decoder(mode, SIDE, threads=3)
    results = decoder.decode(items)
    for item, result in zip(items, results):
        if item in good:
            assert np.array_equal(result.pixels, decoder.decode([item])[0].pixels)
        else:
            assert isinstance(result, Bad)
            with pytest.raises(Exception) as refusal:
                full(item)
            reason = str(result)
            assert reason.startswith(refusal.type.__name__ + ": ")
            assert "\n" not in reason and " 0x" not in reason
    assert decoder.report()["bad"] == len(REFUSED)


def test_pixel_limit_by_the_header_alone():
    at = JPEG.index(b"\xff\xc0")
    bomb = JPEG[:at + 5] + (20_000).to_bytes(2, "big") * 2 + JPEG[at + 9:]
    with pytest.raises(Image.DecompressionBombError) as pillows:
        Image.open(io.BytesIO(bomb))
    reason = f"DecompressionBombError: {pillows.value}"
    good, bad = Decoder("cpu", SIDE).decode([JPEG, bomb])
    assert isinstance(good, Picture) and str(bad) == reason
    png = bytearray(FILES["PNG"][0])
    png[16:24] = (20_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    bad, = Decoder("cpu", SIDE).decode([bytes(png)])
    assert str(bad) == reason


def test_large_pictures_are_resized_by_pillow(monkeypatch):
    for name in ("LARGE", "LARGE_OTHER"):
        monkeypatch.setattr(decode, name, 96 * 80 - 1)
    for name in ("4:2:0", "PNG"):
        result, = Decoder("exact", SIDE).decode([FILES[name][0]])
        assert result.route == "pillow"
        assert np.array_equal(result.pixels, original(FILES[name][0]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_larger_than_pillows_warning():
    stream = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(stream, "PNG")
    result, = Decoder("exact", SIDE).decode([stream.getvalue()])
    assert np.array_equal(result.pixels, original(stream.getvalue()))


def test_arrays_and_pictures(decoder):
    rgb, grey = np.asarray(picture()), np.asarray(picture(mode="L"))
    opened = Image.open(io.BytesIO(FILES["PNG palette"][0]))
    results = decoder.decode([rgb, grey, grey[..., None], picture(), opened])
    assert [each.route for each in results] == ["cpu"] * 3 + ["pillow"] * 2
    for result, expected in zip(results, (rgb, grey[..., None], grey[..., None], rgb,
                                          original(FILES["PNG palette"][0]))):
        assert np.array_equal(result.pixels, expected)
    wrong = [rgb.astype(np.float32), rgb[..., :2], rgb[:0], rgb[None], None, "name.jpg"]
    assert all(isinstance(each, Bad) for each in decoder.decode(wrong))
    assert str(decoder.decode(wrong)[0]).startswith("ValueError: an array of float32 [80, 96, 3]")
    assert decoder.decode([]) == []


def test_any_bytes(decoder):
    """One buffer in which files follow each other, and copies of it in other types."""
    names = ("4:2:0", "grey", "progressive", "PNG", "CMYK")
    files, start = [FILES[name][0] for name in names] + [JPEG[:700], b""], 0
    whole, views = b"".join(files), []
    for data in files:
        views.append(memoryview(whole)[start:start + len(data)])
        start += len(data)
    assert (decode.scan(views)["route"] == decode.scan(files)["route"]).all()
    assert (decode.scan(views)["hash"] == decode.scan(files)["hash"]).all()
    for kind in (memoryview, bytearray, bytes):
        results = decoder.decode([kind(each) for each in views])
        for result, expected in zip(results[:5], decoder.decode(files)):
            assert result.route == expected.route
            assert torch.equal(result.pixels, expected.pixels)
        assert all(isinstance(each, Bad) for each in results[5:])


def test_pictures_are_decoded_without_all_of_torchvision():
    """Whose import takes seconds, of every process of `embed`."""
    script = ("import sys; from PIL import Image; from clip_ttrt import kernels\n"
              "from clip_ttrt.pipeline import decode, worker\n"
              "jpeg = (kernels.PACKAGE / 'pictures/coffee.jpg').read_bytes()\n"
              "pictures = decode.Decoder('exact', 224).decode([jpeg, Image.new('CMYK', (9, 5))])\n"
              "print(*(one.route for one in pictures), pictures[1].pixels.shape[0],\n"
              "      *{'torchvision', 'torch._dynamo'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True,
                          text=True)
    assert done.stdout == "cpu pillow 224\n" and not done.returncode, done.stdout + done.stderr


def test_user_errors():
    with pytest.raises(UserError, match="'fast'; choose one of auto, exact, gpu, cpu, pillow"):
        Decoder("fast", SIDE)
    with pytest.raises(UserError, match="the GPU cannot decode: the device is cpu; use cuda"):
        Decoder("gpu", SIDE, "cpu")
    assert "cannot decode" in Decoder("auto", SIDE, "cpu").report()["problem"]
    assert Decoder("cpu", SIDE).report()["problem"] is None


class Engines(Hardware):
    """Pillow's pixels, altered or not, in place of the engines'."""

    def __init__(self, fault=lambda number, view: True):
        super().__init__(torch.device("cpu"), 1)
        self.fault, self.decoded = fault, 0

    def create(self):
        return self.decode, None

    def decode(self, files, stream):
        for file in files:
            pixels = full(ctypes.string_at(int(file["data"]), int(file["size"])))
            place = ctypes.c_uint8 * pixels.size
            view = torch.frombuffer(place.from_address(int(file["pixels"])), dtype=torch.uint8)
            view = view.view(pixels.shape)
            before = view.clone()
            view.copy_(torch.from_numpy(pixels.copy()))
            answer = self.fault(self.decoded, view)
            if answer == "skip":
                view.copy_(before)
            file["written"] = bool(answer)
            self.decoded += 1


def with_engines(**options):
    decoder = Decoder("auto", SIDE, threads=2)
    decoder._hardware = Engines(**options)
    return decoder


EASY = [file(size=(40 + n, 60 - n), mode="L" if n % 3 == 0 else "RGB") for n in range(20)]


def equal(results, files):
    return all(np.array_equal(each.pixels, full(data)) for each, data in zip(results, files))


def test_engines_take_their_route_only():
    decoder = with_engines()
    results = decoder.decode([data for data, _ in FILES.values()] + list(REFUSED.values()))
    routes = [route for _, route in FILES.values()]
    assert [each.route for each in results[:len(routes)]] == routes
    assert all(isinstance(each, Bad) for each in results[len(routes):])
    report = decoder.report()
    assert report["gpu"] == routes.count("gpu") == decoder._hardware.decoded
    assert report["fallbacks"] == report["silent_skips"] == 0
    assert equal(results[:10], [data for data, _ in list(FILES.values())[:10]])


def test_silent_skips_are_found():
    """Every third picture is left as it was, also where memory holds an earlier batch's."""
    decoder = with_engines(fault=lambda number, view: "skip" if number % 3 == 1 else True)
    for _ in range(3):
        results = decoder.decode(EASY)
        assert equal(results, EASY)
        del results
    report = decoder.report()
    assert report["silent_skips"] == report["fallbacks"] == 20
    assert report["cpu"] == 20 and report["gpu"] == 40
    assert not any(decoder.report()[name] for name in decode.COUNTS)  # since the last call


def test_refused_by_the_engines():
    decoder = with_engines(fault=lambda number, view: number % 2)
    results = decoder.decode(EASY)
    assert equal(results, EASY)
    assert [each.route for each in results] == ["cpu", "gpu"] * 10
    report = decoder.report()
    assert report["fallbacks"] == 10 and report["silent_skips"] == 0


def test_engines_that_raise():
    def fault(number, view):
        raise RuntimeError("out of memory")

    decoder = with_engines(fault=fault)
    assert equal(decoder.decode(EASY), EASY)
    report = decoder.report()
    assert report["fallbacks"] == 20 and report["problem"] == "out of memory"


def test_sampled_pictures_are_compared(monkeypatch):
    monkeypatch.setattr(decode, "SAMPLED", 2)

    def fault(number, view):
        return view.add_(view < 255).sum() + 1  # one level off

    decoder = with_engines(fault=fault)
    results = decoder.decode(EASY)
    sampled = [each.exact is not None for each in results]
    assert 2 < sum(sampled) < 18
    for data, result in zip(EASY, results):
        assert result.route == "gpu"
        assert abs(result.pixels.numpy().astype(int) - full(data)).max() == 1
        assert result.exact is None or np.array_equal(result.exact, full(data))
    report = decoder.report()
    assert report["redecoded"] == sum(sampled) and report["largest_distance"] == 1
    again = with_engines(fault=fault).decode(EASY[::-1])[::-1]
    assert [each.exact is not None for each in again] == sampled  # by the bytes alone


def test_pixels_keep_their_memory():
    decoder = with_engines()
    view = decoder.decode(EASY)[4].pixels.permute(2, 0, 1)[:, 3:]
    kept = view.clone()
    for _ in range(5):
        decoder.decode(EASY[::-1])
    assert torch.equal(view, kept)


def test_threads_share_a_decoder():
    decoder = with_engines(fault=lambda number, view: number % 5 and (number % 7 or "skip"))
    barrier = threading.Barrier(4)

    def work(number):
        files = EASY[number:] + [b"no picture"] + EASY[:number]
        barrier.wait()
        for _ in range(10):
            results = decoder.decode(files)
            assert isinstance(results.pop(20 - number), Bad)
            assert equal(results, EASY[number:] + EASY[:number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    report = decoder.report()
    assert report["gpu"] + report["cpu"] == 800 and report["bad"] == 40
