"""One PIL image to a model's input, by Pillow: `==` to the transforms of clip and open_clip,
without the seconds that importing torchvision takes in every process."""
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor

# CLIP's normalisation: https://github.com/openai/CLIP, `clip/clip.py`, `_transform`.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def geometry(height: int, width: int, resolution: int, fit: str) -> tuple[list[int], list[int]]:
    """Height and width to resize to, and of it the row and column at which R x R begins.

    fit: "crop" to the centre as torchvision has it; "squash" to a square, or "pad" with a border,
    whose row and column are negative, as open_clip has them.
    """
    if fit == "crop":
        full = [int(resolution * side / min(height, width)) for side in (height, width)]
    else:
        ratio = max(height, width) / resolution
        full = [resolution if fit == "squash" else max(1, round(side / ratio))
                for side in (height, width)]
    return full, [(round if fit == "crop" else int)((side - resolution) / 2) for side in full]


def fitted(picture: Any, resolution: int, filter: str = "bicubic", fit: str = "crop", **_: Any):
    """A PIL image of any mode resized and cropped by Pillow: another, RGB, R x R."""
    from PIL import Image

    (height, width), (top, left) = geometry(picture.height, picture.width, resolution, fit)
    resized = picture.resize((width, height), Image.Resampling[filter.upper()])
    return resized.crop((left, top, left + resolution, top + resolution)).convert("RGB")


def transform(picture: Any, resolution: int, mean: Sequence[float] = MEAN,
              std: Sequence[float] = STD, **how: Any) -> Tensor:
    """A PIL image of any mode -> float32 [3, R, R].  how: as `fitted`."""
    pixels = torch.from_numpy(np.array(fitted(picture, resolution, **how))).permute(2, 0, 1)
    mean, std = (torch.tensor(each)[:, None, None] for each in (mean, std))
    return pixels.contiguous().float().div_(255).sub_(mean).div_(std)
