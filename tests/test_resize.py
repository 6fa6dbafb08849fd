"""Preprocess on the CPU, `==` to clip's own transform and to Pillow, in both of Pillow's orders."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import clip.clip
import numpy as np
import pytest
import torch
from noise import SIZES, noise
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline import resize
from clip_ttrt.pipeline.resize import MEAN, STD, Preprocess


def image(pixels):
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def normalised(square):
    return functional.normalize(functional.to_tensor(square.convert("RGB")), MEAN, STD)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP's threads wait for each other at every small operation where other tests run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("resolution", [112, 224, 336])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_clips_own_transform(resolution, channels):
    pictures = [noise(*size, channels) for size in SIZES]
    own = clip.clip._transform(resolution)
    expected = torch.stack([own(image(pixels)) for pixels in pictures])
    for dtype in (torch.float32, torch.float16):
        actual = Preprocess(resolution, "cpu", dtype=dtype)(pictures)
        assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("height, width, channels", [
    (2000, 3000, 3), pytest.param(4000, 6000, 3, marks=pytest.mark.slow),
    pytest.param(6000, 4000, 1, marks=pytest.mark.slow),
    pytest.param(1, 6000, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_equals_it_for_large_pictures(height, width, channels):
    pixels = noise(height, width, channels)
    expected = clip.clip._transform(224)(image(pixels))
    assert torch.equal(Preprocess(224, "cpu")([pixels])[0], expected)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resolution", [33, 224])
def test_other_filters_and_fits_equal_pillows_resize(filter, resolution):
    pillows = Image.Resampling[filter.upper()]
    pictures = [noise(*size) for size in SIZES if 300 not in size]
    crop, squash, pad = (Preprocess(resolution, "cpu", filter, fit)(pictures)
                         for fit in ("crop", "squash", "pad"))
    for i, pixels in enumerate(pictures):
        full, (height, width) = image(pixels), pixels.shape[:2]
        resized = functional.resize(full, resolution, functional.InterpolationMode(filter))
        assert torch.equal(crop[i], normalised(functional.center_crop(resized, resolution)))
        assert torch.equal(squash[i], normalised(full.resize((resolution,) * 2, pillows)))
        scale = resolution / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        square = Image.new("RGB", (resolution, resolution))
        square.paste(full.resize(size, pillows), [(resolution - side) // 2 for side in size])
        assert torch.equal(pad[i], normalised(square)), (height, width)


def test_mean_and_std_are_torchvisions():
    mean, std, pixels = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), noise(40, 32)
    squared = image(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    expected = functional.normalize(functional.to_tensor(squared), mean, std)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        actual = Preprocess(32, "cpu", "bicubic", "squash", mean, std, dtype)([pixels])[0]
        assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))


def test_any_strides_and_memory():
    pixels = noise(90, 120)
    x, call = torch.from_numpy(pixels), Preprocess(56, "cpu")
    expected = call([pixels])[0]
    large = torch.zeros(100, 300, 4, dtype=torch.uint8)
    large[5:95, 1:241:2, :3] = x
    read_only = pixels.copy()
    read_only.flags.writeable = False
    for one in (x, x.permute(2, 0, 1).contiguous().permute(1, 2, 0), large[5:95, 1:241:2, :3],
                x.transpose(0, 1).contiguous().transpose(0, 1), read_only,
                pixels[::-1].copy()[::-1], pixels[:, :, ::-1].copy()[:, :, ::-1]):
        assert torch.equal(call([one])[0], expected)
    grey = x[:, :, :1].expand(-1, -1, 3)
    assert torch.equal(call([grey]), call([x[:, :, :1]]))


def test_none_leaves_zeros_and_out_is_filled():
    call, pixels = Preprocess(32, "cpu", dtype=torch.float16), noise(50, 40)
    out = torch.full((5, 3, 32, 32), torch.nan, dtype=torch.float16)
    assert call([None, pixels, None], out[1:4]).data_ptr() == out[1].data_ptr()
    assert out[[0, 4]].isnan().all() and out[[1, 3]].eq(0).all()
    assert torch.equal(out[2], call([pixels])[0]) and call([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("bad, sentence", [
    (torch.zeros(4, 4, 3), r"picture 1 must be uint8 .* not torch.float32 \[4, 4, 3\]"),
    (np.zeros((4, 4), np.uint8), r"picture 1 must be .* not uint8 \[4, 4\]"),
    (np.zeros((4, 4, 4), np.uint8), r"not uint8 \[4, 4, 4\]"),
    (np.zeros((0, 4, 3), np.uint8), "and not empty"),
    (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), "picture 1 is on meta, not cpu"),
])  # fmt: skip
def test_what_is_no_picture_is_told(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        Preprocess(8, "cpu")([noise(9, 9), bad])


def test_what_else_can_be_wrong_is_told():
    call, pixels = Preprocess(8, "cpu"), noise(9, 9)
    for out in (torch.empty(1, 3, 8, 8).half(), torch.empty(2, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"out must be torch.float32 \[1, 3, 8, 8\] on cpu"):
            call([pixels], out)
    with pytest.raises(ValueError, match="out must be contiguous"):
        call([pixels], torch.empty(1, 8, 8, 3).permute(0, 3, 1, 2))
    with pytest.raises(UserError, match="unknown filter 'cubic'; choose from bicubic, bilinear"):
        Preprocess(8, "cpu", "cubic")
    with pytest.raises(UserError, match="unknown fit 'stretch'; choose from crop, squash, pad"):
        Preprocess(8, "cpu", fit="stretch")


def test_threads_get_their_own_answers():
    call, batches = Preprocess(24, "cpu"), [[noise(40, 30 + i, seed=i)] for i in range(8)]
    expected = [call(batch) for batch in batches]
    resize.plan.cache_clear()
    resize.table.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        for actual, right in zip(pool.map(call, batches * 4), expected * 4):
            assert torch.equal(actual, right)


def test_the_op_and_its_shapes():
    pictures = [torch.from_numpy(noise(9 + i, 12)) for i in range(3)]
    actual = torch.ops.clip_ttrt.preprocess(pictures, 8, fit="pad", dtype=torch.float16)
    assert torch.equal(actual, Preprocess(8, "cpu", fit="pad", dtype=torch.float16)(pictures))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(one) for one in pictures]
        out = torch.ops.clip_ttrt.preprocess(fake, 8, dtype=torch.float16)
    assert (out.shape, out.dtype) == (actual.shape, actual.dtype)


# Pillow's order


def test_a_pillow_of_another_arithmetic_is_refused(monkeypatch):
    resized = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *filter: (
        resized(self, size, Image.Resampling.LANCZOS)))
    with pytest.raises(UserError, match="Pillow .* resizes in a way that is not known here"):
        resize.pillow_order.__wrapped__()


def test_the_orders_differ_only_where_much_more_of_the_height_goes():
    for height, width in SIZES:
        pixels = torch.from_numpy(noise(height, width))
        orders = [resize.plan(height, width, 224, "bicubic", "crop", order)
                  for order in ("horizontal", "vertical")]
        first, second = (resize.resize(pixels, one) for one in orders)
        tall = height > 2 * width and width > 224
        assert [vertical for _, _, vertical in orders] == [False, tall]
        assert torch.equal(first, second) is not tall


COMPARE = """
import sys
import numpy as np, PIL, torch
from PIL import Image
from clip_ttrt.pipeline import resize
assert PIL.__file__.startswith(sys.argv[1]), PIL.__file__
order = resize.pillow_order()
rng = np.random.default_rng(0)
for h, w in [(1000, 300), (500, 240), (451, 225), (450, 225), (375, 500), (900, 100), (333, 224)]:
    pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
    for fit in ("crop", "squash"):
        plan = resize.plan(h, w, 224, "bicubic", fit, order)
        height, width = [int(224 * side / min(h, w)) if fit == "crop" else 224 for side in (h, w)]
        full = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        top, left = round((height - 224) / 2), round((width - 224) / 2)
        theirs = np.asarray(full)[top : top + 224, left : left + 224]
        assert np.array_equal(resize.resize(torch.from_numpy(pixels), plan), theirs), (h, w, fit)
print(order)
"""


@pytest.mark.slow
def test_equals_the_pillow_of_the_other_order_too(tmp_path):
    """In a process of its own; all else here is of the installed one."""
    vertical = resize.pillow_order() == "horizontal"  # of the other
    pillow = "pillow==13.*" if vertical else "pillow==12.*"
    install = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install",
               "--no-deps", "--target", tmp_path, pillow]
    fetched = subprocess.run(install, capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"pip cannot fetch {pillow}: {fetched.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", COMPARE, tmp_path], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ("vertical" if vertical else "horizontal"), done.stderr
