"""JPEG headers in C++ against the same rule in Python; the calls of nvImageCodec with its decoder
for the CPU in place of the engines, and what is declared of it against its header."""
import ctypes
import random
import re
import resource
import struct
import subprocess
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import needs
import numpy as np
import pytest
import torch
from test_decode import CUDA, EASY, FILES, JPEG, REFUSED, built, full, library  # noqa: F401

from clip_ttrt import kernels
from clip_ttrt.pipeline import decode
from clip_ttrt.pipeline.decode import FILE, Hardware

HEADER = (kernels.sources() / "jpeg" / "jpeg.h").read_text()
DECLARED = (kernels.sources() / "jpeg" / "nvimagecodec.h").read_text()

# Headers

SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
SAMPLINGS = frozenset(((0x11,), (0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x22, 0x11, 0x11)))
SIDES = range(16, 16385)
GPU, CPU, OTHER = range(3)


def scan(data, large=decode.LARGE):
    """Route, height, width, channels."""
    other, at, kind, rgb = (OTHER, 0, 0, 0), 2, 0, False
    if data[:3] != b"\xff\xd8\xff":
        return other
    try:
        while True:
            start, marker, length = struct.unpack_from(">BBH", data, at)
            if start != 0xFF:
                return other
            if marker in SEGMENTS:
                if marker == 0xEE and data[at + 4:at + 9] == b"Adobe":
                    rgb = data[at + 15] != 1
            elif marker in (0xC0, 0xC1, 0xC2) and not kind:
                kind = marker
                bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
                components = data[at + 10:at + 10 + 3 * channels]
            elif marker == 0xDA and kind:
                break
            else:
                return other
            at += 2 + length
        ids, samplings, scanned = components[::3], tuple(components[1::3]), data[at + 4]
    except (struct.error, IndexError):
        return other
    tall = samplings[0] >> 4 < samplings[0] & 15 if samplings else False
    colour = channels == 3 and ids != b"RGB" and not rgb and not tall
    if bits != 8 or not (colour or channels == 1) or not 0 < width * height <= large:
        return other
    easy = (kind == 0xC0 and scanned == channels and samplings in SAMPLINGS
            and (channels == 1 or ids == b"\1\2\3") and width in SIDES and height in SIDES
            and data.rfind(b"\xff\xd9", -1024) > 0)
    return GPU if easy else CPU, height, width, channels


def changed(data, chance):
    """A file with a byte, some bytes or its end changed, mostly in its header."""
    data, kind = bytearray(data), chance.randrange(6)
    at = chance.randrange(min(len(data), chance.choice((30, 700, 10 ** 9))))
    if kind == 0:
        data[at] = chance.randrange(256)
    elif kind == 1:
        del data[at:at + chance.randrange(1, 40)]
    elif kind == 2:
        data[at:at] = chance.randbytes(chance.randrange(1, 20))
    elif kind == 3:
        for _ in range(3):
            data[chance.randrange(min(len(data), 700))] = chance.choice(
                (0xFF, 0xD9, 0xD8, 0, 0xDA, 0xC0, 0xC1, 0xC2, 0xEE, 0x11, 0x21, 3, 1))
    elif kind == 4:
        frame = max(data.find(b"\xff\xc0"), 0)
        data[min(frame + chance.randrange(20), len(data) - 1)] = chance.choice(
            (0, 1, 2, 3, 4, 8, 16, 0x11, 82, 255))
    else:
        del data[at:]
        data += chance.choice((b"", b"\xff\xd9", b"\xff\xd9" + bytes(1022), b"\xff\xd9" * 2))
    return bytes(data)


def test_headers_equal_the_rule(library):  # noqa: F811
    chance = random.Random(11)
    jpegs = [data for data, _ in FILES.values() if data[:2] == b"\xff\xd8"]
    files = [*REFUSED.values(), *(data for data, _ in FILES.values())]
    files += [JPEG[:length] for length in range(700)]
    for _ in range(20_000):
        again = chance.random() < 0.3 and files[-1]  # what is changed already
        files.append(changed(again or chance.choice(jpegs), chance))
    found = decode.scan(files)
    expected = list(map(scan, files))
    fields = ("route", "height", "width", "channels")
    assert list(zip(*(found[name].tolist() for name in fields))) == expected
    assert found["hash"].tolist() == [zlib.adler32(each[-256:]) for each in files]
    routes = np.bincount(found["route"], minlength=3)
    assert routes.min() > 1000, routes


def test_a_file_is_as_the_header_has_it(library):  # noqa: F811
    body = re.search(r"typedef struct ClipJpegFile \{(.*?)\}", HEADER, re.S)[1]
    declared = re.findall(r"^\s*(const void\*|void\*|int64_t) (\w+);", body, re.M)
    assert [(name, ctypes.c_int64 if kind == "int64_t" else ctypes.c_void_p)
            for kind, name in declared] == kernels.JPEG_FILE._fields_
    assert library.clip_jpeg_file_size() == ctypes.sizeof(kernels.JPEG_FILE) == FILE.itemsize
    routes = map(int, re.findall(r"kClipJpeg(?:Engines|Library|Other) = (\d)", HEADER))
    assert [*routes] == [decode.GPU, decode.CPU, decode.PILLOW]


# nvImageCodec

THEIRS = {  # our name -> theirs, and the names of members in their order
    "Properties": ("Properties", "version cudart_version"),
    "InstanceInfo": ("InstanceCreateInfo", "load_builtin_modules load_extension_modules "
                     "extension_modules_path create_debug_messenger debug_messenger_desc "
                     "message_severity message_category"),
    "DecodeParams": ("DecodeParams", "apply_exif_orientation"),
    "Orientation": ("Orientation", "rotated flip_x flip_y"),
    "Plane": ("ImagePlaneInfo", "width height row_stride num_channels sample_type precision"),
    "ImageInfo": ("ImageInfo", "codec_name color_spec chroma_subsampling sample_format orientation "
                  "num_planes plane_info buffer buffer_kind cuda_stream"),
    "BackendParams": ("BackendParams", "load_hint load_hint_policy"),
    "Backend": ("Backend", "kind params"),
    "ExtensionDescription": ("ExtensionDesc", "instance id version ext_api_version create destroy"),
    "ExecutionParams": ("ExecutionParams", "device_allocator pinned_allocator max_num_cpu_threads "
                        "executor device_id pre_init skip_pre_sync num_backends backends"),
}
VALUES = {
    "kVersion": "VER", "kCpuOnlyDevice": "DEVICE_CPU_ONLY",
    "kCpuOnlyBackend": "BACKEND_KIND_CPU_ONLY", "kEnginesBackend": "BACKEND_KIND_HW_GPU_ONLY",
    "kFixedLoadHint": "LOAD_HINT_POLICY_FIXED", "kSrgb": "COLORSPEC_SRGB",
    "kGrey": "COLORSPEC_GRAY", "kNoSubsampling": "SAMPLING_NONE",
    "kGreySubsampling": "SAMPLING_GRAY", "kInterleavedY": "SAMPLEFORMAT_I_Y",
    "kInterleavedRgb": "SAMPLEFORMAT_I_RGB", "kUint8": "SAMPLE_DATA_TYPE_UINT8",
    "kDeviceMemory": "IMAGE_BUFFER_KIND_STRIDED_DEVICE",
    "kHostMemory": "IMAGE_BUFFER_KIND_STRIDED_HOST", "kProcessed": "PROCESSING_STATUS_SUCCESS",
}


@needs.nvimagecodec
def test_what_is_declared_of_nvimagecodec_is_what_its_header_says(tmp_path):
    theirs = kernels.nvimagecodec().parent / "include"
    lines = ["#include <cstddef>", "using std::ptrdiff_t;", "#include <nvimgcodec.h>",
             '#include "nvimagecodec.h"', "namespace n = nvimagecodec;"]
    for ours, (name, members) in THEIRS.items():
        kind = f"nvimgcodec{name}_t"
        body = re.search(rf"struct {ours} {{\n  Head head{{(\d+).*?\n(.*?)}};", DECLARED, re.S)
        number = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        lines.append(f"static_assert({body[1]} == NVIMGCODEC_STRUCTURE_TYPE_{number});")
        lines.append(f"static_assert(sizeof(n::{ours}) == sizeof({kind}));")
        own = re.findall(r"^\s*[\w:* ]+?[ *](\w+)(?:\[\d+\])?;", body[2], re.M)
        for one, other in zip(own, members.split(), strict=True):
            lines.append(f"static_assert(offsetof(n::{ours}, {one}) == offsetof({kind}, {other}) "
                         f"&& sizeof(n::{ours}::{one}) == sizeof({kind}::{other}));")
    names = re.findall(r"\b(k[A-Z]\w+) =", DECLARED)
    assert sorted(names) == sorted([*VALUES, "kNextVersion"])
    lines += [f"static_assert(int(n::{ours}) == int(NVIMGCODEC_{name}));"
              for ours, name in VALUES.items()]
    functions = re.findall(r"\(\*(\w+)\)\((.*?)\);", DECLARED, re.S)
    assert len(functions) == 16
    for name, arguments in functions:
        lines.append(f"template <class... A> constexpr int count_{name}(nvimgcodecStatus_t (*)(A..."
                     f")) {{ return sizeof...(A); }}\nstatic_assert(count_{name}({name}) == "
                     f"{arguments.count(',') + 1});")
    (tmp_path / "cuda_runtime_api.h").write_text(CUDA)
    (tmp_path / "check.cpp").write_text("\n".join(lines))
    subprocess.run(["g++", "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", "-I", tmp_path,
                    "-I", theirs, "-I", kernels.sources() / "jpeg", tmp_path / "check.cpp"],
                   check=True)


@pytest.fixture
def cpu(library):  # noqa: F811
    if kernels.nvimagecodec() is None:
        pytest.skip("needs nvImageCodec")
    return Hardware(torch.device("cpu"), 1)


def test_a_batch(cpu, capfd):
    """Sizes, grey and colours together; junk, half a file, and another size than the file's."""
    files = decode.scan(EASY[:5] + [b"junk" * 99, EASY[3][:-300], EASY[6], EASY[9]] + EASY[5:])
    files["height"][5:7], files["width"][5:7], files["channels"][5:7] = 40, 50, (3, 1)
    files["height"][7], files["channels"][8] = files["height"][7] - 1, 3
    for _ in range(2):
        pixels, skipped = cpu(files)
        assert skipped == 0 and pixels[5:9] == [None] * 4
        for data, each in zip(EASY, pixels[:5] + pixels[9:]):
            assert np.array_equal(each, full(data))
    assert capfd.readouterr() == ("", "")


def test_exif_turns_nothing(cpu):
    (pixels,), _ = cpu(decode.scan([FILES["exif"][0]]))
    assert np.array_equal(pixels, full(FILES["exif"][0]))


def test_threads_have_a_decoder_each(cpu):
    barrier = threading.Barrier(3)

    def work(number):
        files = EASY[number:] + EASY[:number]
        barrier.wait()
        for _ in range(20):
            pixels, _ = cpu(decode.scan(files))
            assert all(np.array_equal(each, full(data)) for each, data in zip(pixels, files))
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert 1 <= len(cpu.idle) <= 3


def test_nothing_is_lost(cpu):
    """Memory and threads stay as they were over batches and over decoders."""
    def batches(hardware, count):
        for _ in range(count):
            hardware(decode.scan(EASY + [b"junk", JPEG[:-300]]))

    batches(cpu, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches(cpu, 300)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4000  # KB
    threads = len([*Path("/proc/self/task").iterdir()])
    for _ in range(5):
        batches(Hardware(torch.device("cpu"), 3), 1)
    assert len([*Path("/proc/self/task").iterdir()]) <= threads


def test_errors(cpu, library, tmp_path, monkeypatch):  # noqa: F811
    for path, text in ((tmp_path / "missing.so", "missing.so: cannot open shared object file"),
                       (Path(library._name), "undefined symbol: nvimgcodecGetProperties")):
        monkeypatch.setattr(kernels, "nvimagecodec", lambda: path)
        with pytest.raises(RuntimeError, match=re.escape(text)):
            cpu.create()
