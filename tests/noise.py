"""Pictures of noise, and sizes of pictures that take every way through the resize."""
import numpy as np

SIZES = [  # height, width
    (1, 1), (1, 300), (300, 1), (3, 2), (223, 224), (224, 224), (225, 500), (500, 375), (375, 500),
    (500, 240), (1000, 200), (480, 640), (10, 1000), (113, 400), (450, 225), (451, 225),
]  # fmt: skip


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng((seed, height, width)).integers(
        0, 256, (height, width, channels), np.uint8)
