"""The library's reader of files: its struct, what it refuses, and whose memory its bytes are.
tests/test_sources.py compares what it reads with what Python does."""
import ctypes
import errno
import os
import re
import threading

import needs
import numpy as np
import pytest

from clip_ttrt import kernels

HEADER = (kernels.sources() / "files" / "files.h").read_text()


def read(paths, offsets=None, sizes=None, most=1 << 20):
    """Bytes and the error of each."""
    names = b"".join(os.fsencode(path) + b"\0" for path in paths)
    offsets = np.array(offsets or [0] * len(paths), np.int64)
    sizes = np.array(sizes or [-1] * len(paths), np.int64)
    data, errors = kernels.read_files(names, offsets, sizes, most)
    assert len(data) == sizes.sum()
    return [bytes(each) for each in np.split(data, sizes.cumsum()[:-1])], errors.tolist()


def test_the_struct_and_the_errors_are_the_headers():
    body = re.search(r"typedef struct ClipFilesParams \{(.*?)\}", HEADER, re.S)[1]
    types = {"*": ctypes.c_void_p, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
    declared = re.findall(r"^\s*(?:const )?(\w+)(\*?) (\w+);", body, re.M)
    assert len(declared) == 9 and kernels.FILES._fields_ == [
        (name, types[star or kind]) for kind, star, name in declared]
    codes = re.findall(r"kClipFiles(\w+) = (-\d+)", HEADER)
    assert codes == [("NotRegular", str(kernels.NOT_REGULAR)),
                     ("BeyondEnd", str(kernels.BEYOND_END))]


@needs.built
def test_parts_of_files_and_their_errors(tmp_path):
    assert kernels.library().clip_files_params_size() == ctypes.sizeof(kernels.FILES)
    file = tmp_path / "a"
    file.write_bytes(bytes(range(256)) * 9)
    missing = tmp_path / "b"
    paths = [file, file, missing, file, tmp_path, file, file, file]
    found, errors = read(paths, [0, 7, 0, 2300, 0, 2304, 2305, 4], [-1, 5, -1, 4, -1, -1, -1, 2303],
                         most=2304)
    assert errors == [0, 0, errno.ENOENT, 0, kernels.NOT_REGULAR, 0, kernels.BEYOND_END,
                      kernels.BEYOND_END]
    assert found == [file.read_bytes(), bytes([7, 8, 9, 10, 11]), b"", bytes([252, 253, 254, 255]),
                     b"", b"", b"", b""]
    assert read([file], most=2303)[1] == [kernels.BEYOND_END]


@needs.built
def test_memory_is_used_again_only_when_nothing_refers_to_it(tmp_path):
    """Threads that keep what they read, a while, find it as it was."""
    paths = [tmp_path / f"{number}" for number in range(64)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 3000)
    names, wrong = b"".join(bytes(path) + b"\0" for path in paths), []

    def work(turn):
        kept = []
        for start in range(40):
            some = names if (start + turn) % 2 else b"".join(
                bytes(path) + b"\0" for path in reversed(paths))
            sizes = np.full(64, -1, np.int64)
            data, _ = kernels.read_files(some, np.zeros(64, np.int64), sizes, 1 << 20)
            kept.append((memoryview(data)[3000:6000], 1 if some is names else 62))
            del data
            wrong.extend(byte for view, byte in kept if bytes(view) != bytes([byte]) * 3000)
            kept = kept[-3:]

    threads = [threading.Thread(target=work, args=[turn]) for turn in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong and kernels._idle


@needs.built
@pytest.mark.parametrize("changed", [
    {"count": -1}, {"threads": 0}, {"most": -1}, {"paths": None}, {"sizes": None},
    {"errors": None}, {"offsets": None}, {"buffer": None}])
def test_what_is_outside_the_contract_is_refused(changed):
    arrays = [np.zeros(16, np.uint8) for _ in range(5)]
    names = ("paths", "offsets", "sizes", "errors", "buffer")
    fields = {name: each.ctypes.data for name, each in zip(names, arrays)}
    fields.update(count=1, most=1, capacity=1, threads=1)
    params = kernels.FILES(**{**fields, **changed})
    assert kernels.library().clip_files_read(ctypes.byref(params)) == errno.EINVAL
