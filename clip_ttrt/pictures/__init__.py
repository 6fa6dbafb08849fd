"""Eight photographs with captions, a second, meaningful input for the big models.

Pictures from scikit-image (see README.md in this folder), captions from OpenAI's notebook
"Interacting with CLIP" (https://github.com/openai/CLIP, `notebooks/`).
"""
from functools import partial
from pathlib import Path
from typing import Callable, Optional

import torch

from clip_ttrt.transform import transform

FOLDER = Path(__file__).parent

CAPTIONS = {
    "page": "a page of text about segmentation",
    "chelsea": "a facial photo of a tabby cat",
    "astronaut": "a portrait of an astronaut with the American flag",
    "rocket": "a rocket standing on a launchpad",
    "motorcycle_right": "a red motorcycle standing in a garage",
    "camera": "a person looking at a camera on a tripod",
    "horse": "a black-and-white silhouette of a horse",
    "coffee": "a cup of coffee on a saucer",
}


def load(resolution: int, preprocess: Optional[Callable] = None
         ) -> tuple[torch.Tensor, list[str]]:
    """The pictures through preprocessing, by default OpenAI's, float32 [8, 3, R, R], and their
    captions."""
    from PIL import Image

    preprocess = preprocess or partial(transform, resolution=resolution)
    images = [preprocess(Image.open(FOLDER / f"{name}.jpg")) for name in CAPTIONS]
    return torch.stack(images), [f"This is {caption}" for caption in CAPTIONS.values()]
