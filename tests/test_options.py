"""Options: what is asked for, and what cannot be."""
from pathlib import Path

import pytest

from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange, Options


@pytest.mark.parametrize("value, expected", [
    ("8", (8, 8, 8)), (3, (3, 3, 3)), ("1:32:256", (1, 32, 256)), (BatchRange(1, 2, 3), (1, 2, 3))])
def test_batch_ranges(value, expected):
    assert Options(batch=value).batch == BatchRange(*expected) == BatchRange.parse(str(value))


@pytest.mark.parametrize("wrong, sentence", [
    *(({"batch": text}, "bad batch range") for text in (
        "0", "-1", "8:4:2", "1:2", "1:2:3:4", "a", "", "1:300:256", "1:1:100000", "1.5", "²")),
    *(({name: "other"}, f"unknown {name} 'other'; choices: ")
      for name in ("precision", "encoder", "backend", "kernels")),
    ({"model": "ViT-H/14"}, f"unknown model 'ViT-H/14'; known: {', '.join(MODELS)}"),
    ({"model": "RN50", "precision": "fp8"}, "RN50's image encoder is a ResNet; use --precision"),
    ({"optimization_level": 6}, "bad optimization level 6"),
])
def test_a_value_outside_its_choices(wrong, sentence):
    with pytest.raises(UserError) as caught:
        Options(**wrong)
    assert sentence in str(caught.value)


def test_default_folder_names_model_and_precision():
    folder = Path("artifacts/ViT-L-14@336px-fp32")
    assert Options(model="ViT-L/14@336px", precision="fp32").folder == folder
