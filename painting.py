"""The pictures of an evaluation: how cycles share batches, and what happens where memory runs out.

A batch is as many pictures as share every call of the denoiser. Seeds of one prompt stand together,
so its text is encoded once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

import outputs
from cycles import Key, Records, Row
from errors import ResourceError, memory_errors
from memory import free_memory
from metrics import picture_metrics
from session import Session, in_whole_calls
from tempering import Painter, Result, View, Walk, Watched

Made = TypeVar("Made")
Cycles = Sequence[tuple[int, int]]  # of each the row of its text in a painter, and its seed
Making = Callable[[Sequence[int], Sequence[int]], list[Made]]  # of rows and seeds, of each a thing
PROMPTS = 16  # whose text is in memory at once
MOST = 32  # pictures of a batch that is chosen by free memory: a GPU is busy with far fewer
SHARE = 0.8  # of the free memory that they may take


class OnTheWay(NamedTuple):
    """A picture on its way."""

    painter: Painter  # the one that has begun it
    walk: Walk


class Work(NamedTuple):
    """Cycles that can share batches."""

    painter: Painter
    keys: list[Key]
    cycles: list[tuple[int, int]]  # the same as `Cycles`
    walks: list[Walk] | None  # where they have begun


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

    def paint(
        self, painter: Painter, cycles: Cycles, bar: tqdm, walks: Sequence[Walk] | None = None
    ) -> list[Result]:
        """The first of `cycles`: as many as fit. `walks` holds those that have begun, or is None.

        Raises ResourceError where there is not the memory for one.
        """

        heard = in_whole_calls(bar.update)

        def work(rows: Sequence[int], seeds: Sequence[int]) -> list[Result]:
            begun = walks and walks[: len(seeds)]
            return painter.temper(seeds, rows=rows, compare=True, walks=begun, progress=heard)

        return self._first(cycles, work)

    def watch(self, painter: Painter, cycles: Cycles) -> list[Watched]:
        """The plain pictures of the first of `cycles` up to their last look, likewise."""
        return self._first(cycles, lambda rows, seeds: painter.watch(seeds, rows=rows))

    def _first(self, cycles: Cycles, work: Making[Made]) -> list[Made]:
        while True:
            part = cycles[: self.size]
            try:
                with memory_errors():
                    return self._measured(part, work)
            except ResourceError:
                if len(part) == 1:
                    raise
                self.size = len(part) // 2
                self._memory = None
            free_memory(self.device)

    def _measured(self, part: Cycles, work: Making[Made]) -> list[Made]:
        memory = self._memory
        before = 0
        if memory:
            memory.reset_peak_memory_stats(self.device)
            before = memory.memory_allocated(self.device)
        rows, seeds = zip(*part, strict=True)
        made = work(rows, seeds)
        if memory:
            taken = memory.max_memory_allocated(self.device) - before
            free_memory(self.device)
            self.size = fitting(memory.mem_get_info(self.device)[0], taken)
            self._memory = None
        return made


def fitting(free: int, taken: int) -> int:
    """How many pictures fit into `free` bytes, where one has `taken` so many."""
    return max(1, min(MOST, int(SHARE * free / max(1, taken))))


def paint(
    session: Session,
    records: Records,
    mine: Sequence[Key],
    batch: Batch,
    begun: dict[Key, OnTheWay],
) -> Iterator[Row]:
    """Paint cycles plain and tempered from one shared prefix; yields a row a cycle.

    Its pictures are on disk by then. Those in `begun` come first, and leave it. The bar is over
    U-Net calls; how many there will be is known from the cycles that are finished.
    """
    finished = 0
    fresh = [key for key in mine if key not in begun]
    with tqdm(desc="U-Net", unit="call", disable=None) as bar:
        for painter, group, waiting, walks in chain(
            taken_up(session, begun), fresh_work(session, records, fresh)
        ):
            while waiting:
                started = time.perf_counter()
                results = batch.paint(painter, waiting, bar, walks)
                size = len(results)
                done, waiting = waiting[:size], waiting[size:]
                keys, group = group[:size], group[size:]
                walks = walks and walks[size:]
                views = [
                    looks(painter, row, each) for (row, _), each in zip(done, results, strict=True)
                ]
                for key, seen in zip(keys, views, strict=True):
                    save(session, records, key, seen)
                finished += size
                bar.total = round(bar.n / finished * len(mine))
                seconds = (time.perf_counter() - started) / size
                for key, result, seen in zip(keys, results, views, strict=True):
                    yield row_of(records, key, result, seen, seconds)


def fresh_work(session: Session, records: Records, keys: Sequence[Key]) -> Iterator[Work]:
    """Cycles of which nothing is there, with a painter for each part."""
    for group in groups(records, keys):
        painter, waiting = painter_of(session, records, group)
        yield Work(painter, group, waiting, None)


def taken_up(session: Session, begun: dict[Key, OnTheWay]) -> Iterator[Work]:
    """Cycles that have begun, with the painters that have begun them; they leave `begun`."""
    for painter, of_painter in groupby(list(begun), lambda key: begun[key].painter):
        group = list(of_painter)
        walks = [begun.pop(key).walk for key in group]
        waiting = [(walk.trunk.row, seed) for walk, (_, seed) in zip(walks, group, strict=True)]
        yield Work(painter.accepting(session.painter.limits), group, waiting, walks)


def painter_of(
    session: Session, records: Records, group: Sequence[Key]
) -> tuple[Painter, list[tuple[int, int]]]:
    """A painter of a group's prompts, and its cycles: of each the row of its text, and its seed."""
    numbers = list(dict.fromkeys(number for number, _ in group))
    prompts = [records.prompts[number - 1] for number in numbers]
    painter = session.painter_of([each.subjects for each in prompts], prompts[0].joiner)
    return painter, [(numbers.index(number), seed) for number, seed in group]


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
