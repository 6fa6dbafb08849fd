"""The kernel of preprocess: `==` to Pillow and torchvision on a GPU, and to the reference on the
CPU, where its source runs as C++; its struct, and what its launcher refuses."""
import ctypes
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import clip.clip
import needs
import pytest
import torch
from noise import SIZES, noise
from PIL import Image

from clip_ttrt import kernels
from clip_ttrt.pipeline import resize
from clip_ttrt.pipeline.resize import Preprocess

HEADER = (kernels.sources() / "preprocess" / "preprocess.h").read_text()
def layouts(pixels, device="cpu"):
    """The same picture interleaved, planar, turned, and as a part of a larger one."""
    x = torch.from_numpy(pixels).to(device)
    large = torch.zeros(x.shape[0] + 5, 2 * x.shape[1] + 3, 4, dtype=torch.uint8, device=device)
    part = large[2:-3, 3::2, : x.shape[2]]
    part.copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x, x.permute(2, 0, 1).contiguous().permute(1, 2, 0), turned, part


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP's threads wait for each other at every small operation where other tests run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The struct and the limits


def test_a_descriptor_is_as_the_header_has_it():
    body = re.search(r"typedef struct ClipPreprocessPicture \{(.*?)\}", HEADER, re.S)[1]
    declared = re.findall(r"^\s*(const void\*|int64_t) (\w+);", body, re.M)
    types = {"const void*": ctypes.c_void_p, "int64_t": ctypes.c_int64}
    assert [(name, types[kind]) for kind, name in declared] == kernels.PICTURE._fields_
    assert ctypes.sizeof(kernels.PICTURE) == 8 * len(resize.NOTHING)


VALID = {"batch": 1, "most_lines": 1, "resolution": 224, "value_bytes": 2}
REFUSED = [
    {"batch": -1}, {"batch": 2**31}, {"most_lines": -1}, {"resolution": 0}, {"resolution": -224},
    {"resolution": 4097}, {"value_bytes": 1}, {"value_bytes": 8}, {"out": 4097}, {"tables": 4104},
    *({name: None} for name in ("pictures", "tables", "values", "workspace", "out")),
]  # fmt: skip


def statuses(library):
    """Of parameters that are refused, then of no pictures."""
    pointers = dict.fromkeys(("pictures", "tables", "values", "workspace", "out"), 4096)
    for changed in (*REFUSED, {"batch": 0}):
        params = kernels.PARAMS["preprocess"](**{**pointers, **VALID, **changed})
        yield library.clip_preprocess_launch(ctypes.byref(params), None)


@needs.built
def test_what_is_outside_the_contract_is_refused():
    assert [*statuses(kernels.library())] == [1] * len(REFUSED) + [0]
    assert kernels.library().clip_preprocess_picture_size() == ctypes.sizeof(kernels.PICTURE)


# The kernel's source as C++, with the launches of Preprocess


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder, own = tmp_path_factory.mktemp("on_cpu"), kernels.sources() / "preprocess"
    shutil.copy(own.parents[1] / "tests/kernels/cuda_on_cpu.h", folder / "cuda_runtime_api.h")
    source, count = re.subn(r"kernel<<<blocks, threads, 0, stream>>>\(", "run_on_cpu(kernel, "
                            "blocks, threads, ", (own / "preprocess.cu").read_text())
    assert count == 1
    (folder / "preprocess.cpp").write_text(source)
    subprocess.run(["g++", "-O2", "-w", "-std=c++17", "-shared", "-fPIC", "-I", str(folder), "-I",
                    str(own), "-o", str(folder / "on_cpu.so"), str(folder / "preprocess.cpp")],
                   check=True)
    return ctypes.CDLL(str(folder / "on_cpu.so"))


@pytest.fixture
def as_on_a_gpu(on_cpu, monkeypatch):
    """Preprocess launches that library, with memory of the CPU for that of a GPU."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(
        *sizes, **options))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    monkeypatch.setattr(kernels, "library", lambda: on_cpu)

    def make(*arguments, **options):
        call = Preprocess(*arguments, device="cpu", **options)
        call.fused = True
        return call

    return make


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def test_the_source_refuses_what_the_library_does(on_cpu):
    assert [*statuses(on_cpu)] == [1] * len(REFUSED) + [0]


@pytest.mark.parametrize("order", ["horizontal", "vertical"])
@pytest.mark.parametrize("resolution, dtype, options", [
    (224, torch.float32, {}), (224, torch.float16, {"fit": "squash"}), (30, torch.bfloat16, {}),
    (49, torch.float32, {"fit": "pad"}), (300, torch.float16, {"filter": "bilinear"}),
])  # fmt: skip
def test_the_source_computes_what_the_reference_does(
    as_on_a_gpu, monkeypatch, order, resolution, dtype, options
):
    monkeypatch.setattr(resize, "pillow_order", lambda: order)
    fused = as_on_a_gpu(resolution, dtype=dtype, **options)
    reference = Preprocess(resolution, "cpu", dtype=dtype, **options)
    pictures = [None]
    for i, size in enumerate(SIZES):
        for x in layouts(noise(*size, channels=1 if i % 3 == 0 else 3)):
            pictures += [x, x.as_subclass(OnGPU)] if i % 2 else [x.numpy(), x.as_subclass(OnGPU)]
    out = torch.full((len(pictures), 3, resolution, resolution), float("nan"), dtype=dtype)
    assert fused(pictures, out) is out
    assert torch.equal(out, reference(pictures)) and out[0].eq(0).all()


def test_large_batches_take_several_launches(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(resize, "MOST_BYTES", 300_000)
    launched, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *name, **fields: (
        launched.append(fields["batch"]), launch(*name, **fields)))
    pictures = [noise(80 + i, 100) for i in range(9)] + [noise(500, 700), None]
    out = as_on_a_gpu(33, dtype=torch.float16)(pictures)
    assert torch.equal(out, Preprocess(33, "cpu", dtype=torch.float16)(pictures))
    assert sum(launched) == 11 and 1 in launched and len(launched) > 2
    assert as_on_a_gpu(33)([]).shape == (0, 3, 33, 33)
    assert as_on_a_gpu(33)([None, None]).eq(0).all()


# On a GPU


@pytest.mark.gpu
@needs.built
@pytest.mark.parametrize("resolution", [112, 224, 336])
def test_pictures_on_a_gpu_equal_clips_own(resolution):
    own, pictures = clip.clip._transform(resolution), [None]
    expected = [torch.zeros(3, resolution, resolution)]
    for i, size in enumerate((*SIZES, (3000, 1), (2000, 3000), (4000, 6000))):
        pixels = noise(*size, channels=1 if i % 3 == 0 else 3)
        some = [pixels, *layouts(pixels, "cuda"), *layouts(pixels)[:4 if size[0] < 2000 else 1]]
        pictures += some
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        expected += [own(image)] * len(some)
    for dtype in (torch.float32, torch.float16):
        call = Preprocess(resolution, "cuda", dtype=dtype)
        assert call.fused and torch.equal(call(pictures).cpu(), torch.stack(expected).to(dtype))


@pytest.mark.gpu
@needs.built
@pytest.mark.parametrize("options", [{"fit": "squash"}, {"fit": "pad"}, {"filter": "bilinear"}])
def test_other_fits_and_filters_equal_the_reference(options):
    pictures = [noise(*size) for size in SIZES]
    for dtype in (torch.float32, torch.bfloat16):
        actual = Preprocess(225, "cuda", dtype=dtype, **options)(pictures)
        assert torch.equal(actual.cpu(), Preprocess(225, "cpu", dtype=dtype, **options)(pictures))


@pytest.mark.gpu
@needs.built
def test_threads_and_streams_get_their_own_answers():
    """While their pictures are overwritten as soon as a call returns."""
    call, barrier = Preprocess(224, "cuda", dtype=torch.float16), threading.Barrier(4)
    batches = [[noise(*size, seed=seed) for size in SIZES[3:] * 3] for seed in range(4)]
    expected = [Preprocess(224, "cpu", dtype=torch.float16)(batch) for batch in batches]

    def work(seed):
        stream = torch.cuda.Stream()
        barrier.wait()
        with torch.cuda.stream(stream):
            for _ in range(10):
                batch = [picture.copy() for picture in batches[seed]]
                actual = call(batch)
                for picture in batch:
                    picture[:] = 0
                assert torch.equal(actual.cpu(), expected[seed])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread has raised


@pytest.mark.gpu
@needs.built
def test_the_op_runs_where_its_pictures_are():
    pictures = [torch.from_numpy(noise(*size)).cuda() for size in SIZES]
    actual = torch.ops.clip_ttrt.preprocess(pictures, 224, dtype=torch.float16)
    assert actual.is_cuda
    assert torch.equal(actual, Preprocess(224, "cuda", dtype=torch.float16)(pictures))
