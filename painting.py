"""The pictures of an evaluation: how cycles share batches, and what happens where memory runs out.

A batch is as many pictures as share every call of the denoiser. Seeds of one prompt stand together,
so its text is encoded once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import outputs
from cycles import Key, Records, Row
from errors import ResourceError, memory_errors
from memory import free_memory
from metrics import picture_metrics
from session import Session
from tempering import Painter, Result, View

PROMPTS = 16  # whose text is in memory at once
MOST = 32  # pictures of a batch that is chosen by free memory: a GPU is busy with far fewer
SHARE = 0.8  # of the free memory that they may take


class Batch:
    """How many pictures share a batch: as asked for, or what fits; halved where memory runs out.

    By itself it is 1 on CPUs, where sharing gains little. On a GPU the first picture is painted
    alone, and what it took says how many fit into the free memory.
    """

    def __init__(self, asked: int | None, device: torch.device) -> None:
        self.size = asked or 1
        self.device = device
        # CUDA and XPU tell of their memory; the others' modules do not have it.
        memory = getattr(torch, device.type, None)
        self._memory = memory if asked is None and hasattr(memory, "mem_get_info") else None

    def paint(self, painter: Painter, cycles: Sequence[tuple[int, int]], bar: tqdm) -> list[Result]:
        """The first of `cycles`, each a row of the painter and a seed: as many as fit.

        Raises ResourceError where there is not the memory for one.
        """
        while True:
            part = cycles[: self.size]
            try:
                with memory_errors():
                    return self._measured(painter, part, bar)
            except ResourceError:
                if len(part) == 1:
                    raise
                self.size = len(part) // 2
                self._memory = None
            free_memory(self.device)

    def _measured(
        self, painter: Painter, part: Sequence[tuple[int, int]], bar: tqdm
    ) -> list[Result]:
        memory = self._memory
        before = 0
        if memory:
            memory.reset_peak_memory_stats(self.device)
            before = memory.memory_allocated(self.device)
        rows, seeds = zip(*part, strict=True)
        results = painter.temper(seeds, rows=rows, compare=True, progress=bar.update)
        if memory:
            taken = memory.max_memory_allocated(self.device) - before
            free_memory(self.device)
            self.size = fitting(memory.mem_get_info(self.device)[0], taken)
            self._memory = None
        return results


def fitting(free: int, taken: int) -> int:
    """How many pictures fit into `free` bytes, where one has `taken` so many."""
    return max(1, min(MOST, int(SHARE * free / max(1, taken))))


def paint(session: Session, records: Records, mine: Sequence[Key], batch: Batch) -> Iterator[Row]:
    """Paint cycles plain and tempered from one shared prefix; yields a row a cycle.

    Its pictures are on disk by then. The bar is over U-Net calls; how many there will be is known
    from the cycles that are finished.
    """
    finished = 0
    with tqdm(desc="U-Net", unit="call", disable=None) as bar:
        for group in groups(records, mine):
            numbers = list(dict.fromkeys(number for number, _ in group))
            prompts = [records.prompts[number - 1] for number in numbers]
            painter = session.painter_of([each.subjects for each in prompts], prompts[0].joiner)
            waiting = [(numbers.index(number), seed) for number, seed in group]
            while waiting:
                begun = time.perf_counter()
                results = batch.paint(painter, waiting, bar)
                done, waiting = waiting[: len(results)], waiting[len(results) :]
                keys = [(numbers[row], seed) for row, seed in done]
                views = [
                    looks(painter, row, each) for (row, _), each in zip(done, results, strict=True)
                ]
                for key, seen in zip(keys, views, strict=True):
                    save(session, records, key, seen)
                finished += len(done)
                bar.total = round(bar.n / finished * len(mine))
                seconds = (time.perf_counter() - begun) / len(done)
                for key, result, seen in zip(keys, results, views, strict=True):
                    yield row_of(records, key, result, seen, seconds)


def groups(records: Records, keys: Sequence[Key]) -> Iterator[list[Key]]:
    """The cycles in parts that can share batches: a joiner, a number of subjects, some prompts."""

    def alike(key: Key) -> tuple[Any, ...]:
        prompt = records.prompt(key)
        return prompt.joiner, len(prompt.subjects)

    for _, row in groupby(keys, alike):
        of_prompts = [list(cycles) for _, cycles in groupby(row, key=lambda key: key[0])]
        for start in range(0, len(of_prompts), PROMPTS):
            yield [key for cycles in of_prompts[start : start + PROMPTS] for key in cycles]


def looks(painter: Painter, row: int, result: Result) -> dict[str, View]:
    """What CLIPSeg sees in both finished pictures."""
    assert result.plain is not None
    plain = painter.look([result.plain], [row])[0]
    same = result.image is result.plain  # it was good enough at once
    return {"plain": plain, "tempered": plain if same else painter.look([result.image], [row])[0]}


def save(session: Session, records: Records, key: Key, seen: dict[str, View]) -> None:
    """Write both pictures of a cycle."""
    for name, view in seen.items():
        file = records.picture_file(key, name)
        if file.parent != records.folder:
            outputs.make_folder(file.parent)
        text = session.parameters(view.image, key[1], name, records.prompt(key).text)
        outputs.save_image(file, view.image, text)


def row_of(
    records: Records, key: Key, result: Result, seen: dict[str, View], seconds: float
) -> Row:
    """A cycle's row."""
    number, seed = key
    return {
        "cycle": seed - records.seeds[0] + 1,
        **(
            {"prompt": number, "text": records.prompt(key).text} if len(records.prompts) > 1 else {}
        ),
        "seed": seed,
        "unet_calls": result.unet_calls,
        "plain_calls": result.plain_calls,
        "tempered_calls": result.tempered_calls,
        "rounds": len(result.rounds),
        "seconds": round(seconds, 3),
        **{name: figures(view) for name, view in seen.items()},
    }


def figures(view: View) -> Row:
    matrix = view.matrix.numpy()
    return {**asdict(picture_metrics(matrix)), "class_matrix": matrix.tolist()}


@torch.no_grad()
def plain(session: Session, prompt: str, seed: int) -> Image.Image:
    """A picture of a prompt by plain sampling."""
    sampler = session.painter_of([[prompt]], "").sampler
    branches = sampler.start([seed])
    sampler.denoise(branches, sampler.settings.steps)
    return sampler.decode(branches)[0]
