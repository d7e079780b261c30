"""What CLIPSeg sees, against transformers' own forward pass and matrices worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation import (
    EMPTY,
    NONE,
    OWN,
    PUREST,
    ClipSeg,
    class_matrix,
    classify,
    embed_prompts,
    energy,
    segment,
    uncertainty,
    view_of,
)

PROMPTS = ["a black dog", "a toy robot", "an apple"]


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def test_segment_equals_clipsegs_own_forward_pass(clipseg: ClipSeg) -> None:
    images = [picture(1), picture(2, width=96, height=64)]
    embeddings = embed_prompts(clipseg, PROMPTS).expand(2, -1, -1)
    found = segment(clipseg, images, embeddings)
    assert found.shape == (2, 3, 64, 64)
    for image, probabilities in zip(images, found, strict=True):
        inputs = clipseg.processor(
            text=PROMPTS, images=[image] * 3, padding=True, return_tensors="pt"
        )
        expected = clipseg.model(**inputs).logits.sigmoid()
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)


def test_the_vision_tower_runs_once_an_image(clipseg: ClipSeg) -> None:
    seen: list[int] = []
    tower = clipseg.model.clip.vision_model
    hook = tower.register_forward_hook(lambda *_, **__: seen.append(1))
    try:
        segment(clipseg, [picture(1)], embed_prompts(clipseg, PROMPTS)[None])
    finally:
        hook.remove()
    assert sum(seen) == 1


def test_one_prompt_and_long_prompts_are_embedded(clipseg: ClipSeg) -> None:
    width = clipseg.model.config.projection_dim
    assert embed_prompts(clipseg, ["a dog"]).shape == (1, width)
    assert embed_prompts(clipseg, ["zebra " * 100, "a dog"]).shape == (2, width)


def test_a_pixel_belongs_to_its_most_probable_class_above_the_threshold() -> None:
    probabilities = torch.tensor([[[0.9, 0.1, 0.05]], [[0.2, 0.3, 0.1]]])  # (2, 1, 3)
    assert classify(probabilities, 0.1).tolist() == [[0, 1, NONE]]
    assert classify(probabilities, 0.3).tolist() == [[0, NONE, NONE]]  # 0.3 does not exceed 0.3


def test_class_matrix_by_hand() -> None:
    probabilities = torch.tensor([[[0.8, 0.6, 0.1, 0.0]], [[0.1, 0.3, 0.5, 0.0]]])  # (2, 1, 4)
    labels = torch.tensor([[0, 0, 1, NONE]])
    # class 0 holds pixels 0 and 1: means 0.7 and 0.2; class 1 holds pixel 2: 0.1 and 0.5
    expected = torch.tensor([[0.7, 0.2], [0.1, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(class_matrix(probabilities, labels), expected, atol=1e-7, rtol=0)


def test_a_class_without_pixels_has_a_row_of_zeros_and_the_largest_uncertainty() -> None:
    probabilities = torch.tensor([[[0.8, 0.6]], [[0.1, 0.3]]])
    matrix = class_matrix(probabilities, torch.tensor([[0, 0]]))
    assert matrix[1].tolist() == [0, 0]
    assert uncertainty(matrix)[1] == pytest.approx(-math.log(1e-6))


def test_uncertainty_by_hand() -> None:
    matrix = torch.tensor([[0.5, 0.2, 0.4], [0.0, 1.0, 0.0], [0.9, 0.9, 0.1]], dtype=torch.float64)
    # q = (0.3, 0, 0.9): u = -log(0.5 * 0.7), -log(1), -log(0.1 * 0.1)
    expected = [-math.log(0.35), 0.0, -math.log(0.01)]
    assert uncertainty(matrix).tolist() == pytest.approx(expected)
    single = torch.tensor([[0.25]], dtype=torch.float64)
    assert uncertainty(single).tolist() == pytest.approx([math.log(4)])


def logits_of_two_subjects(second: float) -> torch.Tensor:
    """Two subjects on five pixels each of a hundred; the second one rises by `second`."""
    assert (round(PUREST * 100), round(EMPTY * 100)) == (3, 20)
    logits = torch.full((2, 10, 10), -4.0)
    logits[0, 0, :5] = 4  # rises by 8
    logits[1, 1, :5] = -4 + second
    return logits


def test_the_energy_is_what_the_worst_class_lacks_to_stand_out() -> None:
    assert energy(logits_of_two_subjects(8).sigmoid()) == pytest.approx(0, abs=1e-6)
    # Half as high: 4 in units of 4^OWN 8^(1 - OWN).
    weak = energy(logits_of_two_subjects(4).sigmoid())
    assert weak == pytest.approx(1 - 0.5 ** (1 - OWN), rel=1e-4)
    missing = energy(logits_of_two_subjects(0).sigmoid())
    assert missing == pytest.approx(1, abs=0.01)
    # Both on the same pixels: neither stands out.
    fused = logits_of_two_subjects(8)
    fused[1] = fused[0]
    assert energy(fused.sigmoid()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.3, -0.5), (0.5, -1.0), (2.0, 2.0), (1.0, -3.0)])
def test_the_energy_has_no_scale(a: float, b: float) -> None:
    """Another slope and bias of CLIPSeg's logits, and a bias of one class, change nothing."""
    logits = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(1)).double()
    logits[0, :5] += 3
    logits[1, 8:12] += 2
    bias = torch.tensor([0.0, 1.5, -1.0])[:, None, None]
    expected = energy(logits.sigmoid())
    assert 0.1 < expected < 1
    assert energy((a * logits + b + bias).sigmoid()) == pytest.approx(expected, abs=1e-4)


def test_a_single_class_has_nothing_to_compete_with_and_no_map_is_no_number() -> None:
    assert energy(logits_of_two_subjects(8)[:1].sigmoid()) == 0
    assert energy(torch.zeros(2, 10, 10)) == pytest.approx(1)
    assert energy(torch.ones(2, 10, 10)) == pytest.approx(1)


def test_of_a_picture_and_its_mirror_image_the_worse_counts() -> None:
    good, bad = (logits_of_two_subjects(rise).sigmoid() for rise in (8.0, 4.0))
    picture = Image.new("RGB", (10, 10))
    alone = view_of(picture, good, 0.1)
    assert alone.energy == energy(good)
    for one, other in ((good, bad), (bad, good)):
        assert replace(view_of(picture, one, 0.1), mirrored=other).energy == energy(bad)
