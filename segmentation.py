"""What CLIPSeg sees in a picture: class probabilities, masks, the class matrix, uncertainty.

| symbol | meaning                                                                     |
|--------|-----------------------------------------------------------------------------|
| C      | number of classes, one a prompt                                             |
| P      | probabilities (C, H, W): sigmoid of CLIPSeg's logits, one map a prompt      |
| M      | class matrix (C, C): M[i, j] = mean probability of class j over class i     |
| p_i    | M[i, i], how confident class i is on its own pixels                         |
| q_i    | mean of M[i, j] over j != i, how much the others shine through class i      |
| u_i    | uncertainty of class i, -log(p_i (1 - q_i))                                 |
| E      | energy of the picture: what its worst class lacks to stand out (`energy`)   |

CLIPSeg: Lueddecke & Ecker 2022, arXiv:2112.10003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from errors import raise_not_finite

if TYPE_CHECKING:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

NONE = -1  # the label of a pixel that belongs to no class
# Keeps the logarithm finite: a class that is not there at all has uncertainty -log(1e-6) = 13.8.
SMALLEST = 1e-6
# The share of a picture's pixels that must show a class for it to be there: the smallest subjects.
PUREST = 0.03
# The share of them that shows no subject at all: what a class has there is its floor.
EMPTY = 0.2
# How much a class is measured by its own height, and not by the strongest's: by its own alone it is
# found in every picture, by the strongest's alone a class that CLIPSeg sees weakly in none.
OWN = 0.75


@dataclass(frozen=True)
class ClipSeg:
    """A CLIPSeg model with the processor of its own checkpoint."""

    model: CLIPSegForImageSegmentation
    processor: CLIPSegProcessor


@dataclass(frozen=True)
class View:
    """What CLIPSeg saw in one picture."""

    image: Image.Image
    probabilities: Tensor  # (C, H, W) float32 in 0..1, at CLIPSeg's own resolution
    labels: Tensor  # (H, W) int64, the class of each pixel, -1 for none
    matrix: Tensor  # (C, C) float64, the class matrix
    uncertainty: Tensor  # (C,) float64
    mirrored: Tensor | None = None  # probabilities in the mirror image, where that was looked at
    parts: Tensor | None = None  # (C, H, W) bool: where each class is to be, where that is settled

    @cached_property
    def energies(self) -> list[float]:
        """How far each class is from standing out by itself (where it is to be), 0..2.

        The worse of picture and mirror image: what only one of them shows, is hardly there.
        """
        found = energies(self.probabilities, self.parts)
        if self.mirrored is None:
            return found
        turned = None if self.parts is None else self.parts.flip(-1)
        return list(map(max, found, energies(self.mirrored, turned)))

    @property
    def energy(self) -> float:
        """How far the picture is from showing every class by itself, 0..2: its worst class."""
        return max(self.energies)


@torch.no_grad()
def embed_prompts(clipseg: ClipSeg, prompts: Sequence[str]) -> Tensor:
    """CLIPSeg's conditional embeddings (C, D) of `prompts`; one call serves a whole run.

    A prompt over the text encoder's length is cut.
    """
    tokens = clipseg.processor.tokenizer(
        list(prompts),
        padding=True,
        truncation=True,
        max_length=clipseg.model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(clipseg.model.device)
    return clipseg.model.get_conditional_embeddings(
        batch_size=len(prompts),
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
    )


@torch.no_grad()
def segment(clipseg: ClipSeg, images: Sequence[Image.Image], embeddings: Tensor) -> Tensor:
    """Probabilities (B, C, H, W), float32 in 0..1, on the CPU, at CLIPSeg's own resolution.

    `embeddings` is (B, C, D): the classes of each of the B images. The vision tower, whose output
    does not depend on the prompts, runs once an image; only the small decoder runs once a class.
    Raises ModelError for probabilities that are not finite.
    """
    model = clipseg.model
    pixels = clipseg.processor.image_processor(list(images), return_tensors="pt").pixel_values
    vision = model.clip.get_image_features(
        pixel_values=pixels.to(model.device, model.dtype), output_hidden_states=True
    )
    classes = embeddings.shape[1]
    layers = [
        vision.hidden_states[i + 1].repeat_interleave(classes, dim=0)  # (B * C, tokens, D)
        for i in model.extract_layers
    ]
    logits = model.decoder(layers, embeddings.flatten(0, 1)).logits  # (B * C, H, W)
    if not logits.isfinite().all():
        wider = "another --clipseg" if model.dtype == torch.float32 else "--dtype fp32"
        advice = f"in {str(model.dtype).removeprefix('torch.')}; {wider} may help"
        raise_not_finite("what CLIPSeg sees", {"CLIPSeg": model}, advice)
    return logits.float().sigmoid().unflatten(0, embeddings.shape[:2]).cpu()


def view_of(image: Image.Image, probabilities: Tensor, threshold: float) -> View:
    """The view of `image` in which CLIPSeg gave `probabilities` (C, H, W)."""
    labels = classify(probabilities, threshold)
    matrix = class_matrix(probabilities, labels)
    return View(image, probabilities, labels, matrix, uncertainty(matrix))


def classify(probabilities: Tensor, threshold: float) -> Tensor:
    """Labels (H, W), int64: the class of highest probability where it exceeds `threshold`.

    `probabilities` is (C, H, W) in 0..1; a pixel of no class gets `NONE`.
    """
    highest, labels = probabilities.max(dim=0)
    return labels.masked_fill(highest <= threshold, NONE)


def class_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """M (C, C), float64: row i is the mean of `probabilities` (C, H, W) over the pixels of class i.

    The row of a class without pixels is 0.
    """
    classes = probabilities.shape[0]
    # (C, H * W): which pixels belong to which class
    members = (labels.flatten() == torch.arange(classes)[:, None]).double()
    sums = members @ probabilities.double().flatten(1).T  # (C, C)
    return sums / members.sum(dim=1, keepdim=True).clamp(min=1)


def uncertainty(matrix: Tensor) -> Tensor:
    """u (C,), float64, in 0..13.8: large where a class is faint or others shine through it.

    u_i = -log(p_i (1 - q_i)); a single class has q = 0.
    """
    classes = matrix.shape[0]
    p = matrix.diagonal()
    q = (matrix.sum(dim=1) - p) / max(1, classes - 1)
    return -(p * (1 - q)).clamp(min=SMALLEST).log()


def energy(probabilities: Tensor) -> float:
    """Energy of a picture, 0..2: of its worst class, the largest of `energies`."""
    return max(energies(probabilities))


def energies(probabilities: Tensor, parts: Tensor | None = None) -> list[float]:
    """Energy of each class, 0..2, from `probabilities` (C, H, W) in 0..1.

    E_i = 1 - the mean of s_i - max(0, s_j) over the purest pixels, j the strongest of the others
    there: 0 where class i stands out by itself, 1 where it does not at all. s_i is the logit of p_i
    above its floor, what class i has on the emptiest pixels, in units of how high it rises and (a
    little, see `OWN`) of how high the strongest class does. The purest are the `PUREST` share of
    all pixels: what a small subject covers. Of a class that has a part of the picture, `parts`
    (C, H, W) bool, only the pixels of that part count.

    So classes compete with each other, not with a number: E is the same for every a * logit + b and
    for every bias of a class. A single class has nothing to compete with: its energy is 0.
    """
    if len(probabilities) == 1:
        return [0.0]
    logits = probabilities.double().logit(eps=SMALLEST).flatten(1)  # (C, H * W)
    count, empty = (max(1, round(share * logits.shape[1])) for share in (PUREST, EMPTY))
    rises = logits - logits.kthvalue(empty, dim=1, keepdim=True).values
    heights = purest(rises, count).clamp(min=SMALLEST)  # (C,)
    scores = rises / (heights**OWN * heights.max() ** (1 - OWN))[:, None]
    found = []
    for i, score in enumerate(scores):
        others = torch.cat([scores[:i], scores[i + 1 :]]).amax(dim=0).clamp(min=0)
        alone = score - others if parts is None else (score - others)[parts[i].flatten()]
        found.append(max(0.0, 1 - float(purest(alone[None], min(count, len(alone))))))
    return found


def purest(values: Tensor, count: int) -> Tensor:
    """The mean (C,) of the `count` highest of each row of `values` (C, H * W)."""
    return values.topk(count, dim=1).values.mean(dim=1)
