"""Make the pictures in `clip_ttrt/pictures/` from those that scikit-image ships.

    python -m experiments.make_pictures FOLDER_OF_SKIMAGE_DATA

Eight photographs that OpenAI's notebook "Interacting with CLIP" uses, scaled so that the shorter
side is 336 pixels (the largest CLIP input) and kept as JPEG, so that verification needs no network
and no further package.
"""
import argparse
from pathlib import Path

from PIL import Image

from clip_ttrt import pictures

SHORTER_SIDE = 336


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="skimage/data of an unpacked scikit-image wheel")
    source = parser.parse_args().folder
    for name in pictures.CAPTIONS:
        [path] = [path for path in source.glob(f"{name}.*") if path.suffix in (".png", ".jpg")]
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            scale = SHORTER_SIDE / min(picture.size)
            size = [round(side * scale) for side in picture.size]
            picture = picture.resize(size, Image.Resampling.BICUBIC)
            picture.save(pictures.FOLDER / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
