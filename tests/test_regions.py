"""Where subjects go: the mathematics of regions."""

from __future__ import annotations

from random import Random

import pytest
import torch

from layouts import Box, Labels
from regions import Region, Window, compose, masks_of, seats, tiles, window_of


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (64, 96), (97, 31)])
def test_tiles_cover_the_picture_once(count: int, size: tuple[int, int]) -> None:
    for seed in range(4):
        masks = masks_of(tiles(count, size, Random(seed)), count, size)
        assert masks.shape == (count, 1, *size)
        assert torch.equal(masks.sum(dim=0), torch.ones(1, *size))
        assert masks.sum(dim=(1, 2, 3)).min() > 0.5 * size[0] * size[1] / count


def test_tiles_are_as_square_as_they_can_be_and_differ_between_pictures() -> None:
    assert {box.right - box.left for box in tiles(4, (16, 16), Random(0))} == {0.5}
    wide = tiles(3, (16, 48), Random(0))
    assert {round(3 * (box.right - box.left), 9) for box in wide} == {1}
    several = {tuple(tiles(2, (16, 16), Random(seed))) for seed in range(20)}
    assert len(several) == 4  # beside or above each other, either first
    assert tiles(5, (16, 16), Random(3)) == tiles(5, (16, 16), Random(3))


def test_the_later_box_is_in_front_and_gaps_are_nobodys() -> None:
    masks = masks_of((Box(0, 0, 0.75, 0.5), Box(0.5, 0, 1, 0.5)), 2, (8, 8))
    assert masks[0, 0, :4, :4].all() and not masks[0, 0, :, 4:].any()
    assert masks[1, 0, :4, 4:].all() and not masks[1, 0, :, :4].any()
    assert not masks[:, :, 4:].any()


def test_the_smallest_box_is_a_place_of_the_grid() -> None:
    assert masks_of((Box(0.999, 0.999, 1, 1),), 1, (8, 8)).sum() == 1


def test_a_map_of_labels_becomes_parts_of_the_grid() -> None:
    labels = Labels(((1, 1, 0, 0), (1, 1, 0, 0), (2, 2, 2, 2), (2, 2, 2, 2)))
    masks = masks_of(labels, 2, (2, 2))
    assert masks[:, 0].tolist() == [[[1, 0], [0, 0]], [[0, 0], [1, 1]]]


@pytest.mark.parametrize("least", [0.0, 0.25, 0.75, 1.0])
def test_a_window_holds_its_region_and_is_what_the_denoiser_can_take(least: float) -> None:
    size = (16, 24)
    draw = Random(1)
    for _ in range(50):
        top, left = draw.randrange(15), draw.randrange(23)
        bottom, right = draw.randrange(top + 1, 16), draw.randrange(left + 1, 24)
        mask = torch.zeros(1, 1, *size)
        mask[..., top : bottom + 1, left : right + 1] = 1
        window = window_of(mask, least, 4)
        assert window.of(mask).sum() == mask.sum()
        assert window.of(torch.zeros(size)).shape == (window.height, window.width)  # on the grid
        for side, whole in ((window.height, 16), (window.width, 24)):
            assert side % 4 == 0
            assert side >= least * whole
    assert Window(0, 0, 8, 12).share(size) == 0.25


def test_a_window_is_around_the_middle_of_its_region() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 6:10, 0:4] = 1
    assert window_of(mask, 0.75, 4) == Window(2, 0, 12, 12)


def test_subjects_that_are_seen_keep_their_places_and_the_others_get_what_is_free() -> None:
    masks = masks_of(tiles(4, (8, 8), Random(0)), 4, (8, 8))
    for first, second in ((0, 1), (3, 0), (2, 1)):
        seen = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1
        seen[1] += masks[first, 0]
        seen[2] += masks[second, 0]
        found = seats(seen, masks, [False, True, True, False])
        assert sorted(found) == [0, 1, 2, 3]
        assert found[1:3] == [first, second]


def test_two_subjects_in_one_place_do_not_share_it() -> None:
    masks = masks_of(tiles(2, (8, 8), Random(0)), 2, (8, 8))
    seen = torch.stack([masks[0, 0], 0.4 * masks[0, 0] + 0.1 * masks[1, 0]])
    assert seats(seen, masks, [True, True]) == [0, 1]


def test_what_is_composed_lies_in_its_regions_only() -> None:
    base = torch.arange(64.0).view(1, 1, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, 2:6] = 1
    region = Region(mask, window_of(mask, 0.5, 4))
    part = torch.full((1, 1, region.window.height, region.window.width), -1.0)
    whole = compose(base, [region], [part])
    assert torch.equal(whole == -1, mask > 0)
    assert torch.equal(whole[mask == 0], base[mask == 0])
    assert base.min() == 0  # it is as it was


def test_a_region_leaves_what_is_taken_unless_all_of_it_is() -> None:
    mask = torch.ones(1, 1, 4, 4)
    region = Region(mask, Window(0, 0, 4, 4))
    taken = torch.zeros(1, 1, 4, 4)
    taken[..., :2, :] = 1
    assert region.without(taken).box == Box(0, 0.5, 1, 1)
    assert region.without(mask).box == Box(0, 0, 1, 1)
