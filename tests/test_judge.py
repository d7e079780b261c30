"""The judge's rules on label maps made by hand, and the pictures that it learns from.

The pictures are drawn from made-up sprites, so that no emoji package is needed.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from pocket.images import Pixels
from pocket.judge import (
    BACKGROUND,
    COLOUR_SHARE,
    FUSED_CELLS,
    HYBRID,
    NATURAL,
    NO_COLOUR,
    PRESENT_CELLS,
    Judge,
    Verdict,
    label_of,
    load_judge,
    verdict,
)
from pocket.judgenet import COLOUR_LABELS, SUBJECT_LABELS, JudgeNet
from pocket.world import COLOUR_NAMES, COLOURS, SUBJECTS, Noun, parse
from recipe import judge as recipe
from recipe.data import Studio
from recipe.packages import STYLES

Where = tuple[slice | int, slice]

RED, BLUE = COLOUR_NAMES.index("red"), COLOUR_NAMES.index("blue")
ASKED = [parse("a red dog"), parse("a blue cat")]
LEFT, RIGHT = np.s_[4:12, 2:10], np.s_[4:12, 20:28]  # 64 cells each
FINE = Verdict(missing=False, wrong_colour=False, fused=False)


def maps(*patches: tuple[Where, int, int]) -> tuple[Pixels, Pixels]:
    """Label maps of background with patches of (where, subject label, colour label)."""
    subject = np.full((32, 32), BACKGROUND, np.uint8)
    colour = np.full((32, 32), NO_COLOUR, np.uint8)
    for where, subject_label, colour_label in patches:
        subject[where], colour[where] = subject_label, colour_label
    return subject, colour


RED_DOG = (LEFT, label_of("dog"), RED)
BLUE_CAT = (RIGHT, label_of("cat"), BLUE)


# --- The verdict.


def test_both_subjects_in_their_colours_are_all_ok() -> None:
    said = verdict(*maps(RED_DOG, BLUE_CAT), ASKED)
    assert said == FINE
    assert said.all_ok


@pytest.mark.parametrize("flag", ["missing", "wrong_colour", "fused"])
def test_any_one_fault_spoils_the_picture_and_an_extra_subject_does_not(flag: str) -> None:
    faults = dict.fromkeys(("missing", "wrong_colour", "fused"), False)
    assert not Verdict(**{**faults, flag: True}).all_ok
    assert Verdict(**faults, extra=True).all_ok


def test_a_subject_without_cells_is_missing_and_its_colour_is_not_judged() -> None:
    said = verdict(*maps(RED_DOG), ASKED)
    assert said == Verdict(missing=True, wrong_colour=False, fused=False)


def test_a_subject_is_present_from_present_cells_in_one_patch() -> None:
    enough = (np.s_[20, 0:PRESENT_CELLS], label_of("cat"), BLUE)
    too_few = (np.s_[20, 0 : PRESENT_CELLS - 1], label_of("cat"), BLUE)
    scattered = (np.s_[16:32:2, ::2], label_of("cat"), BLUE)
    assert not verdict(*maps(RED_DOG, enough), ASKED).missing
    assert verdict(*maps(RED_DOG, too_few), ASKED).missing
    assert verdict(*maps(RED_DOG, scattered), ASKED).missing


def test_exchanged_colours_are_wrong() -> None:
    said = verdict(*maps((LEFT, label_of("dog"), BLUE), (RIGHT, label_of("cat"), RED)), ASKED)
    assert said == Verdict(missing=False, wrong_colour=True, fused=False)


def test_a_prompt_without_colour_takes_any() -> None:
    asked = [parse("a dog"), parse("a blue cat")]
    assert verdict(*maps((LEFT, label_of("dog"), NATURAL), BLUE_CAT), asked) == FINE
    assert verdict(*maps(RED_DOG, BLUE_CAT), asked) == FINE


def test_a_drawing_in_its_own_colours_has_not_the_colour_that_was_asked() -> None:
    assert verdict(*maps((LEFT, label_of("dog"), NATURAL), BLUE_CAT), ASKED).wrong_colour


def test_markings_are_forgiven_up_to_the_colour_share_and_a_second_colour_is_not() -> None:
    dog = label_of("dog")
    columns = 8 - round(8 * COLOUR_SHARE)  # of the patch's eight, what may have another colour
    marked = maps(RED_DOG, BLUE_CAT, (np.s_[4:12, 2 : 2 + columns], dog, BLUE))
    halved = maps(RED_DOG, BLUE_CAT, (np.s_[4:12, 2 : 3 + columns], dog, BLUE))
    assert verdict(*marked, ASKED) == FINE
    assert verdict(*halved, ASKED).wrong_colour


def test_a_hybrid_is_fused_and_its_subjects_are_missing() -> None:
    said = verdict(*maps((LEFT, HYBRID, NO_COLOUR)), ASKED)
    assert said == Verdict(missing=True, wrong_colour=False, fused=True)


def test_a_thin_seam_between_two_subjects_is_not_fused() -> None:
    seam = (np.s_[0, 0 : FUSED_CELLS - 1], HYBRID, NO_COLOUR)
    assert verdict(*maps(RED_DOG, BLUE_CAT, seam), ASKED) == FINE


def test_an_unasked_subject_is_told() -> None:
    said = verdict(*maps(RED_DOG, BLUE_CAT), ASKED[:1])
    assert said.extra
    assert said.all_ok


def test_two_nouns_of_one_subject_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different subjects.*a red dog.*a blue dog"):
        verdict(*maps(RED_DOG), [parse("a red dog"), parse("a blue dog")])


# --- The judge around a network.


class Brightness(JudgeNet):
    """Sees a red dog wherever a picture is bright, and blue everywhere else."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        bright = F.avg_pool2d(images.mean(1), 2) > 0  # (B, 32, 32)
        subject = torch.where(bright, label_of("dog"), BACKGROUND)
        colour = torch.where(bright, RED, BLUE)
        return tuple(  # type: ignore[return-value]
            10 * F.one_hot(labels, count).permute(0, 3, 1, 2).float()
            for labels, count in ((subject, SUBJECT_LABELS), (colour, COLOUR_LABELS))
        )


def test_labels_stand_where_the_pixels_stand_and_background_has_no_colour() -> None:
    images = np.zeros((3, 64, 64, 3), np.uint8)
    images[1, 10:30, 4:24] = 255
    labels = Judge(Brightness()).label(images, batch=2)
    expected = maps((np.s_[5:15, 2:12], label_of("dog"), RED))
    assert not labels.subject[[0, 2]].any()
    np.testing.assert_array_equal(labels.subject[1], expected[0])
    np.testing.assert_array_equal(labels.colour[1], expected[1])


def test_each_picture_is_judged_by_its_own_prompts() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[:, 10:30, 4:24] = 255
    said = Judge(Brightness()).judge(images, [[parse("a red dog")], [parse("a blue dog")]])
    assert [one.wrong_colour for one in said] == [False, True]


@pytest.mark.parametrize(
    "images", [np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)]
)
def test_other_images_are_refused(images: Pixels) -> None:
    with pytest.raises(ValueError, match=r"needs uint8 images \(N, 64, 64, 3\), got"):
        Judge(JudgeNet()).judge(images, [ASKED])


def test_the_network_has_a_million_parameters_and_survives_its_file(tmp_path: Path) -> None:
    net = JudgeNet().half().float()
    assert 0.8e6 < sum(weight.numel() for weight in net.parameters()) < 1.3e6
    recipe.export_judge(net, tmp_path / "judge.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    before, after = (
        Judge(net).label(images),
        load_judge(tmp_path / "judge.safetensors").label(images),
    )
    np.testing.assert_array_equal(before.subject, after.subject)
    np.testing.assert_array_equal(before.colour, after.colour)


# --- The pictures with faults.


def sprite(subject: str, style: str) -> Image.Image:
    """A drawing of its own for each subject and style: a dark ellipse with a light core."""
    draw = random.Random(f"{subject}/{style}")
    width, height = draw.randint(40, 64), draw.randint(40, 64)
    image = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(image)
    pen.ellipse((0, 0, width - 1, height - 1), (60, 20, 130, 255))
    pen.ellipse((width // 3, height // 3, width // 2, height // 2), (250, 250, 90, 255))
    return image


@pytest.fixture(scope="module")
def studio() -> Studio:
    with pytest.MonkeyPatch.context() as patch:
        drawings = {
            (subject, style): sprite(subject, style) for subject in SUBJECTS for style in STYLES
        }
        patch.setattr("recipe.data.drawings", lambda folder: drawings)
        return Studio(Path())


def drawn(studio: Studio, kind: str, count: int = 25) -> list[recipe.Render]:
    return [recipe.KINDS[kind][1](studio, random.Random(f"{kind}/{i}")) for i in range(count)]


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_the_rules_read_the_truth_off_exact_labels(studio: Studio, kind: str) -> None:
    for render in drawn(studio, kind):
        said = verdict(render.subject[1::2, 1::2], render.colour[1::2, 1::2], render.nouns)
        assert render.truth.agrees(said), (render.nouns, said)


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_a_picture_depends_on_its_generator_alone(studio: Studio, kind: str) -> None:
    for once, again in zip(drawn(studio, kind, 3), drawn(studio, kind, 3), strict=True):
        np.testing.assert_array_equal(once.image, again.image)
        np.testing.assert_array_equal(once.subject, again.subject)
        np.testing.assert_array_equal(once.colour, again.colour)


def test_the_shares_of_the_kinds_add_up() -> None:
    assert sum(share for share, _ in recipe.KINDS.values()) == pytest.approx(1)


def test_colour_labels_say_what_is_painted(studio: Studio) -> None:
    for render in drawn(studio, "two colours"):
        for label in np.unique(render.colour[render.colour < NATURAL]):
            pixels = render.image[render.colour == label].astype(float)
            off = {
                name: np.abs(np.median(pixels, axis=0) - rgb).sum() for name, rgb in COLOURS.items()
            }
            assert min(off, key=off.__getitem__) == COLOUR_NAMES[label]


def test_colours_stand_on_subjects_alone(studio: Studio) -> None:
    for kind in recipe.KINDS:
        for render in drawn(studio, kind, 5):
            nowhere = (render.subject == BACKGROUND) | (render.subject == HYBRID)
            assert (render.colour[nowhere] == NO_COLOUR).all()


def test_pieces_label_their_solid_pixels_and_hide_earlier_ones() -> None:
    cut = Image.new("RGBA", (10, 6), (200, 0, 0, 255))
    cut.paste((200, 0, 0, 100), (0, 0, 10, 1))  # the top row is translucent
    pieces = [(recipe.uniform(cut, 3, RED), 20, 30), (recipe.uniform(cut, 7, BLUE), 25, 32)]
    render = recipe.compose(pieces, [Noun("dog")], recipe.OK, random.Random(0))
    expected = np.zeros((64, 64), np.uint8)
    expected[31:36, 20:30] = 3
    expected[33:38, 25:35] = 7
    np.testing.assert_array_equal(render.subject, expected)
    np.testing.assert_array_equal(render.colour == RED, expected == 3)
    assert (render.image[expected > 0] == (200, 0, 0)).all()


@pytest.mark.parametrize("share", [recipe.TOUCHING, recipe.OVERLAPPED])
def test_overlapping_covers_the_asked_share(share: tuple[float, float]) -> None:
    masks = [np.ones((20, 20), bool), np.ones((10, 30), bool)]
    for seed in range(20):
        places = recipe.overlapping(masks, 40, share, random.Random(seed))
        assert places is not None
        (a, b), (c, d) = places
        wide = min(a + 20, c + 30) - max(a, c)
        high = min(b + 20, d + 10) - max(b, d)
        assert share[0] <= wide * high / 300 <= share[1]


def test_what_a_fault_makes_undecidable_is_not_counted() -> None:
    for flag in (True, False):
        assert recipe.FUSED.agrees(Verdict(missing=flag, wrong_colour=flag, fused=True))
    assert not recipe.FUSED.agrees(FINE)
    assert not recipe.OK.agrees(Verdict(missing=False, wrong_colour=True, fused=False))


def test_labels_follow_the_pixels_through_the_augmentation() -> None:
    images = torch.full((32, 3, 64, 64), -0.8)
    labels = torch.zeros(32, 64, 64, dtype=torch.uint8)
    images[:, :, 16:40, 10:50] = 0.8
    labels[:, 16:40, 10:50] = 5
    x, subject, _ = recipe.augmented(images, labels, labels, torch.Generator().manual_seed(0))
    bright = F.avg_pool2d(x.mean(1), 2) > 0
    assert x.shape == images.shape
    assert (bright == (subject == 5)).float().mean() > 0.97
    assert (subject[0] != subject[1]).any()


def test_a_round_trip_that_changes_nothing_changes_no_pixel() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(recipe.round_trip(images, lambda x: x, batch=3), images)


def test_the_measurement_counts_every_picture(studio: Studio) -> None:
    measured = recipe.measure_judge(Judge(JudgeNet()), studio, 2 * len(recipe.KINDS), seed=1)
    confusion = measured["confusion"]
    assert isinstance(confusion, dict)
    assert measured["pictures"] == 2 * len(recipe.KINDS)
    assert sum(sum(row.values()) for row in confusion.values()) == measured["pictures"]
