"""The embedded model's pictures: scenes drawn on any device from a seed, in vectorised PyTorch.

A scene is a combination of attributes (`captions.py`) and a row of uniform random numbers for
everything that its caption does not say: exact place, size, rotation, shade, light and noise.
The numbers come from a CPU generator, so that a seed gives the same scenes on every device.
Coordinates run from -1 to 1, left to right and bottom to top; radii are in the same units.
"""
from dataclasses import dataclass
from functools import lru_cache

import torch

from clip_ttrt.demo import captions
from clip_ttrt.demo.captions import ATTRIBUTES
from clip_ttrt.transform import MEAN, STD

MOST = len(ATTRIBUTES["number"])  # objects in one scene
RADII = ((0.125, 0.155), (0.20, 0.24))  # small, large
CENTRES = ((-0.55, 0.0), (0.55, 0.0), (0.0, 0.55), (0.0, -0.55), (0.0, 0.0))
COLOURS = (  # red, orange, yellow, green, blue, purple, pink, white
    (0.85, 0.10, 0.10), (0.97, 0.53, 0.07), (0.95, 0.90, 0.15), (0.12, 0.62, 0.18),
    (0.13, 0.27, 0.88), (0.50, 0.13, 0.68), (0.97, 0.55, 0.76), (0.96, 0.96, 0.96))
BACKDROPS = (  # two tones each: equal where there is no texture
    ((0.05, 0.05, 0.05), (0.05, 0.05, 0.05)), ((0.95, 0.95, 0.95), (0.95, 0.95, 0.95)),
    ((0.15, 0.30, 0.85), (0.15, 0.30, 0.85)), ((0.15, 0.60, 0.22), (0.15, 0.60, 0.22)),
    ((0.28, 0.28, 0.28), (0.52, 0.52, 0.52)), ((0.28, 0.28, 0.28), (0.52, 0.52, 0.52)))
CHECKERED = ATTRIBUTES["background"].index("checkered")

VARIATIONS = 32  # uniform numbers of one scene; `_Draws` hands them out
NOISE_SIDE = 512  # pixels of the noise picture that every scene takes a window of


@dataclass(frozen=True)
class Scenes:
    """N scenes.

    attributes: int64 [N, 6], indices into ATTRIBUTES.  variation: float32 [N, 32] in [0, 1).
    """

    attributes: torch.Tensor
    variation: torch.Tensor

    def to(self, device) -> "Scenes":
        """The same scenes on another device."""
        return Scenes(self.attributes.to(device), self.variation.to(device))

    def __getitem__(self, rows) -> "Scenes":
        return Scenes(self.attributes[rows], self.variation[rows])

    def __len__(self) -> int:
        return len(self.attributes)


@lru_cache(maxsize=None)
def _constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A table on a device, copied there once: each copy would make the host wait for the GPU."""
    return torch.tensor(values, device=device)


class _Draws:
    """Hands out the columns of a variation table, each once."""

    def __init__(self, variation: torch.Tensor):
        self.variation, self.used = variation, 0

    def __call__(self, low: float, high: float, columns: int = 1) -> torch.Tensor:
        first, self.used = self.used, self.used + columns
        if self.used > self.variation.shape[1]:
            raise ValueError(f"a scene has {self.variation.shape[1]} random numbers, "
                             f"{self.used} are asked for")
        return low + (high - low) * self.variation[:, first:self.used]


def scenes_of(attributes: torch.Tensor, generator: torch.Generator) -> Scenes:
    """Scenes of given combinations, int64 [N, 6], with variation drawn from a CPU generator."""
    return Scenes(attributes, torch.rand(len(attributes), VARIATIONS, generator=generator))


def training_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Random scenes of training combinations, on the CPU; `count` must be even.

    Rows 2k and 2k + 1 differ in one attribute (where the changed combination is one of
    training's, else they are independent): each picture meets a caption in its batch that is
    almost right, which independent draws from thousands of combinations rarely give.
    Raises ValueError for an odd count.
    """
    if count % 2:
        raise ValueError(f"training scenes come in pairs; {count} is odd")
    allowed = captions.training_combinations()
    is_allowed = torch.zeros(len(captions.all_combinations()), dtype=torch.bool)
    is_allowed[captions.code_of(allowed)] = True

    pairs = allowed[torch.randint(len(allowed), (count,), generator=generator)].view(-1, 2, 6)
    rows = torch.arange(len(pairs))
    sizes = torch.tensor(captions.SIZES)
    column = torch.randint(6, (len(pairs),), generator=generator)
    step = 1 + (torch.rand(len(pairs), generator=generator) * (sizes[column] - 1)).long()
    changed = pairs[:, 0].clone()
    changed[rows, column] = (changed[rows, column] + step) % sizes[column]
    keep = is_allowed[captions.code_of(changed)]
    pairs[keep, 1] = changed[keep]
    return scenes_of(pairs.view(-1, 6), generator)


def _layout(scenes: Scenes, draw: _Draws):
    """Centres [N, 4, 2], radii [N, 4], rotations [N, 4] in radians, shown bool [N, 4]."""
    attributes = scenes.attributes
    device = attributes.device
    number = attributes[:, :1] + 1
    shown = torch.arange(MOST, device=device) < number
    low, high = _constant(RADII, device)[attributes[:, 1]].unsqueeze(-1).unbind(1)
    radius = low + (high - low) * draw(0, 1)

    # Objects sit on a circle, far enough apart to stay separate shapes at 112 pixels.
    spacing = radius * draw(2.3, 2.6)
    chord = 2 * torch.sin(torch.pi / number)
    ring = torch.where(number > 1, spacing / chord, torch.zeros_like(spacing))
    angle = draw(0, 2 * torch.pi) + 2 * torch.pi * torch.arange(MOST, device=device) / number
    offsets = ring.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)

    # The group is at its nominal place with some jitter, moved as far as it must to be whole.
    centre = _constant(CENTRES, device)[attributes[:, 4]] + draw(-0.1, 0.1, 2)
    visible = offsets.masked_fill(~shown.unsqueeze(-1), 0)
    room = 0.97 - radius
    centre = torch.minimum(centre, room - visible.amax(1))
    centre = torch.maximum(centre, -room - visible.amin(1))

    radii = radius * draw(0.93, 1.0, MOST)
    rotations = draw(-0.22, 0.22, MOST)  # +-12.6 degrees: a turned square is no diamond
    return centre.unsqueeze(1) + offsets, radii, rotations, shown


def _star(x: torch.Tensor, y: torch.Tensor, points: int, inner: float) -> torch.Tensor:
    """Signed distance to a star of `points` tips at radius 1, one up, and dents at radius `inner`.

    With inner = cos(pi/points) it is a regular polygon.  Exact near the edges, which is where
    anti-aliasing reads it; beyond the tips it is a lower bound.
    """
    half = torch.pi / points
    angle = torch.atan2(x, y).abs()
    angle = (torch.remainder(angle + half, 2 * half) - half).abs()
    length = torch.sqrt(x * x + y * y)
    # The edge runs from (1, 0) to inner·(cos, sin) of half a tip's angle; its normal points out.
    half = torch.tensor(half)
    edge_x, edge_y = inner * half.cos() - 1, inner * half.sin()
    norm = torch.sqrt(edge_x * edge_x + edge_y * edge_y)
    normal_x, normal_y = float(edge_y / norm), float(-edge_x / norm)
    return (length * angle.cos() - 1) * normal_x + length * angle.sin() * normal_y


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to a heart within radius 1 (Inigo Quilez, "2D distance functions", heart)."""
    scale = 0.66
    x, y = x.abs() * scale, y * scale + 0.55
    lobe = torch.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - 2 ** 0.5 / 4
    fold = 0.5 * (x + y).clamp_min(0)
    nearest = torch.minimum(x * x + (y - 1) ** 2, (x - fold) ** 2 + (y - fold) ** 2)
    point = torch.sqrt(nearest) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, point) / scale


def _distances(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Signed distances to all shapes of radius 1, as ATTRIBUTES["shape"]; negative inside."""
    length = torch.sqrt(x * x + y * y)
    across, along = x.abs(), y.abs()
    bar = torch.minimum(torch.maximum(across - 0.3, along - 0.95),
                        torch.maximum(along - 0.3, across - 0.95))
    quarter = 2 ** -0.5
    return [
        length - 0.92,
        torch.maximum(across, along) - 0.75,
        _star(x, y, 3, 0.5),
        _star(x, y, 5, 0.40),
        bar,
        (length - 0.73).abs() - 0.21,
        (across / 0.62 + along - 1) * 0.62 * quarter * 1.2,
        _heart(x, y),
    ]


def _coverage(scenes: Scenes, draw: _Draws, resolution: int) -> torch.Tensor:
    """How much of each pixel the objects cover: float32 [N, R, R] in [0, 1]."""
    centres, radii, rotations, shown = (field.flatten(0, 1) for field in _layout(scenes, draw))
    device = centres.device
    pixel = 2 / resolution
    # Each object is drawn in a window of its own: much less work than a whole picture for each.
    side = int(2 * RADII[-1][1] / pixel) + 4
    column = ((centres[:, 0] + 1) / pixel - side / 2).floor()
    row = ((1 - centres[:, 1]) / pixel - side / 2).floor()
    steps = torch.arange(side, device=device)
    columns = column.view(-1, 1, 1) + steps.view(1, 1, -1)
    rows = row.view(-1, 1, 1) + steps.view(1, -1, 1)
    x = (columns + 0.5) * pixel - 1 - centres[:, 0].view(-1, 1, 1)
    y = 1 - (rows + 0.5) * pixel - centres[:, 1].view(-1, 1, 1)
    cos, sin = rotations.cos().view(-1, 1, 1), rotations.sin().view(-1, 1, 1)
    radius = radii.view(-1, 1, 1)
    x, y = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius

    shape = scenes.attributes[:, 3].repeat_interleave(MOST).view(-1, 1, 1)
    distance = torch.zeros_like(x)
    for index, candidate in enumerate(_distances(x, y)):
        distance = torch.where(shape == index, candidate, distance)
    covered = (0.5 - distance * radius / pixel).clamp(0, 1)

    inside = (columns >= 0) & (columns < resolution) & (rows >= 0) & (rows < resolution)
    inside = inside & shown.view(-1, 1, 1)
    picture = torch.arange(len(scenes), device=device).repeat_interleave(MOST).view(-1, 1, 1)
    row, column = (at.clamp(0, resolution - 1).long() for at in (rows, columns))
    places = (picture * resolution + row) * resolution + column
    canvas = torch.zeros(len(scenes) * resolution * resolution, device=device)
    canvas.scatter_add_(0, places.flatten(), (covered * inside).flatten())
    return canvas.view(-1, resolution, resolution).clamp(0, 1)


@lru_cache(maxsize=None)
def _noise(device: torch.device) -> torch.Tensor:
    """The noise picture [3, 512, 512], standard normal, the same in every process and device."""
    generator = torch.Generator().manual_seed(20240229)
    return torch.randn(3, NOISE_SIDE, NOISE_SIDE, generator=generator).to(device)


def _texture(scenes: Scenes, draw: _Draws, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Share of the background's second tone [N, R, R]: stripes or squares, soft edges."""
    background = scenes.attributes[:, 5].view(-1, 1, 1)
    turn = draw(0, torch.pi).view(-1, 1, 1)
    frequency = draw(9, 14).view(-1, 1, 1)
    phase = draw(0, 2 * torch.pi, 2).view(-1, 2, 1, 1)
    # Stripes run in any direction; squares stand nearly upright.
    turn = torch.where(background == CHECKERED, 0.15 * turn - 0.075 * torch.pi, turn)
    across = torch.sin(frequency * (x * turn.cos() + y * turn.sin()) + phase[:, 0])
    along = torch.sin(frequency * (y * turn.cos() - x * turn.sin()) + phase[:, 1])
    wave = torch.where(background == CHECKERED, across * along, across)
    return (0.5 + 4 * wave).clamp(0, 1)


def render(scenes: Scenes, resolution: int = 112, device=None) -> torch.Tensor:
    """Draw scenes: uint8 [N, 3, R, R], RGB, on `device` (default: where the scenes are).

    The same scenes give the same picture on every device up to the rounding of elementary
    functions, that is, a level or so in few pixels.  Raises ValueError where the resolution
    exceeds the noise picture's 512 pixels.
    """
    if resolution > NOISE_SIDE:
        raise ValueError(f"resolution {resolution} is more than {NOISE_SIDE} pixels")
    if device is not None:
        scenes = scenes.to(device)
    device = scenes.attributes.device
    draw = _Draws(scenes.variation)
    covered = _coverage(scenes, draw, resolution).unsqueeze(1)

    ticks = (torch.arange(resolution, device=device) + 0.5) * 2 / resolution - 1
    x, y = ticks.view(1, 1, -1), -ticks.view(1, -1, 1)
    second = _texture(scenes, draw, x, y).unsqueeze(1)
    shade = draw(-0.04, 0.04) + draw(-0.02, 0.02, 3)
    tones = _constant(BACKDROPS, device)[scenes.attributes[:, 5]] + shade.unsqueeze(1)
    tones = tones.view(-1, 2, 3, 1, 1)
    colour = _constant(COLOURS, device)[scenes.attributes[:, 2]] + draw(-0.06, 0.06, 3)

    backdrop = torch.lerp(tones[:, 0], tones[:, 1], second)
    picture = torch.lerp(backdrop, colour.view(-1, 3, 1, 1).expand_as(backdrop), covered)
    slope = draw(-0.1, 0.1, 2).view(-1, 2, 1, 1, 1)
    picture = picture * (1 + slope[:, 0] * x + slope[:, 1] * y)

    noise = _noise(device)
    room = NOISE_SIDE - resolution
    corner = (draw(0, 1, 2) * (room + 1)).long().clamp_max(room)
    steps = torch.arange(resolution, device=device)
    rows = (corner[:, :1] + steps).view(-1, resolution, 1)
    columns = (corner[:, 1:] + steps).view(-1, 1, resolution)
    picture = picture + draw(0, 0.04).view(-1, 1, 1, 1) * noise[:, rows, columns].transpose(0, 1)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def to_image(picture: torch.Tensor):
    """One rendered picture, uint8 [3, R, R], as a PIL image of the same size."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def to_input(pictures: torch.Tensor) -> torch.Tensor:
    """What CLIP's `preprocess` makes of pictures of the right size: uint8 [N, 3, R, R] -> float32.

    The same operations in the same order (to [0, 1], minus the mean, over the deviation), so
    that the result is equal and not only close.
    """
    mean = _constant(MEAN, pictures.device).view(3, 1, 1)
    std = _constant(STD, pictures.device).view(3, 1, 1)
    return pictures.to(torch.float32).div(255).sub(mean).div(std)


def held_out_classes() -> list[str]:
    """Captions of 128 combinations that training never saw, distinct, in the canonical template."""
    return [captions.caption(row) for row in captions.held_out_sample().tolist()]


def held_out_set(per_class: int = 8, seed: int = 1,
                 resolution: int = 112) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the held-out classes uint8 [N, 3, R, R] and labels int64 [N], N = 128·per_class.

    A label is an index into `held_out_classes()`; the pictures of a class follow each other.
    """
    return picture_set(captions.held_out_sample(), per_class, seed, resolution)


def picture_set(combinations: torch.Tensor, per_class: int, seed: int,
                resolution: int = 112) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [C·per_class, 3, R, R] of combinations int64 [C, 6], and labels int64."""
    labels = torch.arange(len(combinations)).repeat_interleave(per_class)
    scenes = scenes_of(combinations[labels], torch.Generator().manual_seed(seed))
    pictures = [render(scenes[start:start + 128], resolution)
                for start in range(0, len(labels), 128)]
    return torch.cat(pictures), labels
