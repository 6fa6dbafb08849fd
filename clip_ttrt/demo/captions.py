"""What the embedded model's world holds, which part of it training never sees, and its captions.

A combination is one value of each of six attributes.  Everything here is arithmetic on their
indices, so that it is the same on every machine and with every version of PyTorch.
"""
import hashlib
import re
from itertools import product

import torch

ATTRIBUTES = {
    "number": ("one", "two", "three", "four"),
    "size": ("small", "large"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "shape": ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart"),
    "position": ("left", "right", "top", "bottom", "centre"),
    "background": ("black", "white", "blue", "green", "striped", "checkered"),
}
NAMES = tuple(ATTRIBUTES)
SIZES = tuple(len(values) for values in ATTRIBUTES.values())

POSITION_PHRASES = ("on the left", "on the right", "at the top", "at the bottom", "in the centre")

# A caption may leave attributes out: the index one past an attribute's last value.  For the
# number English has no neutral form, so there are two: "a circle" (exactly one) and "circles".
SINGULAR, PLURAL = 4, 5
CAPTION_SIZES = (6, 3, 9, 8, 6, 7)  # number: singular and plural, too; the shape is always named

TEMPLATES = 5
CANONICAL = 0

CONTEXT = 77  # tokens of a full-length text
START_OF_TEXT, END_OF_TEXT = 49406, 49407
# What OpenAI's tokenizer makes of the captions' words.  It splits at spaces and commas, so that a
# caption's tokens are those of its words; the training needs no tokenizer for its 270,000 captions.
WORD_TOKENS = {
    ",": (267,), "a": (320,), "an": (550,), "are": (631,), "at": (536,), "background": (5994,),
    "black": (1449,), "blue": (1746,), "bottom": (5931,), "centre": (2916,),
    "checkered": (1113, 26690), "circle": (7117,), "circles": (19411,), "cross": (3417,),
    "crosses": (20473,), "diamond": (6235,), "diamonds": (12687,), "four": (2721,),
    "green": (1901,), "heart": (1936,), "hearts": (5516,), "image": (2867,), "in": (530,),
    "is": (533,), "large": (3638,), "left": (1823,), "of": (539,), "on": (525,), "one": (637,),
    "orange": (4287,), "photo": (1125,), "picture": (1674,), "pink": (3360,), "purple": (5496,),
    "red": (736,), "right": (1155,), "ring": (2540,), "rings": (5751,), "small": (2442,),
    "square": (3999,), "squares": (26972,), "star": (1565,), "stars": (2895,), "striped": (22192,),
    "the": (518,), "there": (997,), "three": (2097,), "top": (1253,), "triangle": (14615,),
    "triangles": (924, 18627), "two": (1237,), "white": (1579,), "with": (593,), "yellow": (4481,),
}
WORDS = re.compile(r"[a-z]+|,")


def code_of(attributes: torch.Tensor, sizes=SIZES) -> torch.Tensor:
    """Mixed-radix code of index rows: int64 [..., 6] -> int64 [...]."""
    code = torch.zeros_like(attributes[..., 0])
    for column, size in enumerate(sizes):
        code = code * size + attributes[..., column]
    return code


def is_possible(attributes: torch.Tensor) -> torch.Tensor:
    """Whether the object can be seen, int64 [..., 6] -> bool [...]: not white on white and such."""
    backgrounds = ATTRIBUTES["background"]
    colours = [backgrounds.index(colour) if colour in backgrounds else -1
               for colour in ATTRIBUTES["colour"]]
    colours = torch.tensor(colours, device=attributes.device)
    return colours[attributes[..., 2]] != attributes[..., 5]


def is_held_out(attributes: torch.Tensor) -> torch.Tensor:
    """Whether training never draws a combination: int64 [..., 6] -> bool [...].

    The rule is on (number, colour, shape): 3·number + colour + shape divisible by 8, where the
    three are indices.  That is one triple of eight, 32 of 256, in every size, position and
    background.  Every value, and every pair of values of two attributes, stays in training:
    for each number, a colour is held out with one shape only, another one for each number.
    """
    number, colour, shape = attributes[..., 0], attributes[..., 2], attributes[..., 3]
    return (3 * number + colour + shape) % 8 == 0


def all_combinations() -> torch.Tensor:
    """Every combination, in the order of `code_of`: int64 [15360, 6]; some are not possible."""
    return torch.cartesian_prod(*(torch.arange(size) for size in SIZES))


def training_combinations() -> torch.Tensor:
    """The combinations that training draws from: int64 [N, 6]."""
    combinations = all_combinations()
    return combinations[is_possible(combinations) & ~is_held_out(combinations)]


def held_out_combinations() -> torch.Tensor:
    """All combinations that training never draws: int64 [N, 6]."""
    combinations = all_combinations()
    return combinations[is_possible(combinations) & is_held_out(combinations)]


def held_out_sample() -> torch.Tensor:
    """128 held-out combinations, whose captions are the embedded test's classes: int64 [128, 6].

    Four of each of the 32 held-out triples, those whose canonical captions have the smallest
    SHA-256: a choice that depends on no random generator.
    """
    return _sample(held_out_combinations())


def training_sample() -> torch.Tensor:
    """128 combinations seen in training, chosen alike, for comparison: int64 [128, 6].

    Of the triples with remainder 4 where `is_held_out` has 0, so that values meet equally often.
    """
    rows = training_combinations()
    return _sample(rows[(3 * rows[:, 0] + rows[:, 2] + rows[:, 3]) % 8 == 4])


def _sample(combinations: torch.Tensor) -> torch.Tensor:
    by_triple = {}
    for row in combinations.tolist():
        by_triple.setdefault((row[0], row[2], row[3]), []).append(row)
    chosen = []
    for rows in by_triple.values():
        rows.sort(key=lambda row: hashlib.sha256(caption(row).encode()).hexdigest())
        chosen += rows[:4]
    return torch.tensor(sorted(chosen))


def plural(shape: str) -> str:
    """The plural of one of the shapes' names."""
    return shape + ("es" if shape.endswith("s") else "s")


def caption(codes, template: int = CANONICAL) -> str:
    """The caption of a row of six indices, each below `CAPTION_SIZES`; a combination is such a row.

    `template` is one of 0 .. TEMPLATES - 1; 0 is the canonical one, "a photo of two small red
    circles on the left on a blue background".  Raises IndexError for an index out of range.
    """
    number, size, colour, shape, position, background = codes
    one = number in (0, SINGULAR)
    noun = ATTRIBUTES["shape"][shape]
    things = [noun if one else plural(noun)]
    for index, values in ((colour, ATTRIBUTES["colour"]), (size, ATTRIBUTES["size"])):
        if index != len(values):
            things.insert(0, values[index])
    if number == SINGULAR:
        things.insert(0, "an" if things[0][0] in "aeiou" else "a")
    elif number != PLURAL:
        things.insert(0, ATTRIBUTES["number"][number])
    where = [POSITION_PHRASES[position]] if position != len(POSITION_PHRASES) else []
    things = " ".join(things + where)
    backdrop = None
    if background != len(ATTRIBUTES["background"]):
        backdrop = f"a {ATTRIBUTES['background'][background]} background"

    if template == 0:
        return f"a photo of {things}" + (f" on {backdrop}" if backdrop else "")
    if template == 1:
        return things + (f" on {backdrop}" if backdrop else "")
    if template == 2:
        return f"a picture of {things}" + (f", with {backdrop}" if backdrop else "")
    if template == 3:
        return f"there {'is' if one else 'are'} {things}" + (f" on {backdrop}" if backdrop else "")
    if template == 4:
        return f"{backdrop} with {things}" if backdrop else f"an image of {things}"
    raise IndexError(f"template {template} is not one of 0 .. {TEMPLATES - 1}")


def all_captions():
    """An iterator over every caption of training, by code of `CAPTION_SIZES`, then template."""
    for codes in product(*(range(size) for size in CAPTION_SIZES)):
        for template in range(TEMPLATES):
            yield caption(codes, template)


def unknown_words(lines: list[str]) -> list[str]:
    """Words and marks of texts that are in no caption, each once, in lower case."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(lines).lower())
    return [word for word in dict.fromkeys(words) if word not in WORD_TOKENS]


def word_tokens(line: str) -> list[int]:
    """Token ids of one caption, start and end of text included, without padding.

    Raises KeyError for a word that is in no caption.
    """
    tokens = (token for word in WORDS.findall(line) for token in WORD_TOKENS[word])
    return [START_OF_TEXT, *tokens, END_OF_TEXT]


def tokenize(lines: list[str]) -> torch.Tensor:
    """Tokens of captions as `clip.tokenize` gives them: int64 [N, 77], padded with 0."""
    rows = [word_tokens(line) for line in lines]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])
