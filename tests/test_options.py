"""Options: what is asked for, and what cannot be."""
from pathlib import Path

import pytest

from clip_ttrt import attention_choice, kernels
from clip_ttrt.backends import choose
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


@pytest.mark.parametrize("field", ["precision", "encoder", "backend", "attention"])
def test_a_value_outside_its_choices(field):
    with pytest.raises(UserError, match=f"unknown {field} 'other'; choices"):
        Options(**{field: "other"})


def test_default_folder_names_model_and_precision():
    assert Options(model="ViT-L/14@336px", precision="fp32").folder == Path("artifacts/ViT-L-14@336px-fp32")


def test_the_cpu_backend_says_what_it_computes_in(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    backend = choose("auto", "fp16")
    assert (backend.name, backend.device, backend.computes_in) == ("torchscript", "cpu", "fp32")
    assert "no CUDA GPU" in backend.reason


def test_torchscript_serves_a_gpu_without_the_tensorrt_packages(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("clip_ttrt.backends.missing_packages", lambda: ["tensorrt"])
    assert choose("auto", "fp16").computes_in == "fp16"
    assert choose("auto", "tf32").computes_in == "fp32"
    assert choose("auto", "fp16").device == "cuda" and "not installed: tensorrt" in choose("auto", "fp16").reason


def test_tensorrt_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--backend tensorrt cannot be used here: no CUDA GPU"):
        choose("tensorrt", "fp16")


def test_the_plugin_asked_for_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "LIBRARY", tmp_path / "absent.so")
    kernels.library.cache_clear()
    with pytest.raises(UserError, match="--attention plugin"):
        attention_choice.choose("plugin", "tensorrt", "fp16", MODELS["ViT-B/32"], "image", BatchRange(1, 32, 256))
    choice = attention_choice.choose("auto", "tensorrt", "fp16", MODELS["ViT-B/32"], "image", BatchRange(1, 32, 256))
    assert choice.attention == "native" and "absent.so is not built" in choice.reason
    with pytest.raises(UserError, match="version 1"):
        kernels.load("1")
