"""Top-1 and recall@1 before and after compiling."""
from dataclasses import replace

import pytest
import torch

from clip_ttrt.errors import UserError
from experiments import retrieval


def test_figures_of_features_whose_neighbours_are_known():
    text = torch.eye(4)
    labels = torch.tensor([0, 0, 1, 2, 3, 3])
    image = torch.eye(4)[labels]
    assert retrieval.figures({"image": image, "text": text}, labels) == {"top1": 100, "recall_image_to_text": 100, "recall_text_to_image": 100}
    image[1] = text[3]  # the second picture of caption 0, which recall does not look at
    assert retrieval.figures({"image": image, "text": text}, labels) == {"top1": pytest.approx(500 / 6), "recall_image_to_text": 100, "recall_text_to_image": 100}
    image[2] = text[2] + 0.1 * text[1]  # the first picture of caption 1 lies nearer to caption 2, yet is the nearest to caption 1
    assert retrieval.figures({"image": image, "text": text}, labels) == {
        "top1": pytest.approx(400 / 6), "recall_image_to_text": 75, "recall_text_to_image": 100}


def test_the_compiled_embedded_model_finds_what_the_original_finds(demo_artifact):
    row = retrieval.row_of(demo_artifact, pictures=128)
    assert row["images"] == row["texts"] == "128" and row["precision"] == "fp16" and row["computes_in"] == "fp32"
    for name in ("top1", "recall_image_to_text", "recall_text_to_image"):
        assert float(row[f"{name}_original"]) > 99 and row[f"{name}_compiled"] == row[f"{name}_original"]
    assert float(row["agreement"]) == 100


def test_models_without_held_out_pictures_are_refused(demo_artifact):
    other = replace(demo_artifact, manifest={**demo_artifact.manifest, "model": "ViT-B/32"})
    with pytest.raises(UserError, match="does not hold the embedded trained model"):
        retrieval.row_of(other)
