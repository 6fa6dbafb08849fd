"""Options: what is asked for, and what cannot be."""
from pathlib import Path

import pytest

from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS, RESNETS
from clip_ttrt.options import BatchRange, Options


@pytest.mark.parametrize("text, expected", [("8", (8, 8, 8)), (3, (3, 3, 3)), ("1:32:256", (1, 32, 256)), ("4:4:4", (4, 4, 4))])
def test_batch_ranges(text, expected):
    batch = BatchRange.parse(text)
    assert (batch.minimum, batch.optimal, batch.maximum) == expected
    assert BatchRange.parse(str(batch)) == batch


@pytest.mark.parametrize("text", ["0", "-1", "8:4:2", "1:2", "1:2:3:4", "a", "", "1:300:256", "1:1:100000", "1.5", "²", "0:1:2"])
def test_bad_batch_ranges_name_what_was_given(text):
    with pytest.raises(UserError, match="bad batch range"):
        BatchRange.parse(text)


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        Options(model="ViT-H/14")
    assert "ViT-H/14" in str(caught.value) and all(name in str(caught.value) for name in [*MODELS, *RESNETS])


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_are_known_and_not_supported_yet(name):
    with pytest.raises(UserError, match="not supported yet"):
        Options(model=name)


@pytest.mark.parametrize("field", ["precision", "encoder", "backend", "kernels"])
def test_a_value_outside_its_choices(field):
    with pytest.raises(UserError, match=f"unknown {field} 'other'; choices"):
        Options(**{field: "other"})


def test_default_folder_names_model_and_precision():
    assert Options(model="ViT-L/14@336px", precision="fp32").folder == Path("artifacts/ViT-L-14@336px-fp32")
