"""The sample of an evaluation: its own plain pictures walk on until they have spent the budget.

Which cycles are in it, and how far each walks, depends neither on how many processes there are nor
on what was interrupted: what one of them has seen of a picture is on disk for all. None waits for
another: each begins with its own cycles, then takes up what nobody has seen by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

from tqdm import tqdm

import calibration
import outputs
from budget import Sample, Sampled, cut
from calibration import Calibration
from cycles import Key, Records
from errors import InputError
from painting import Batch, OnTheWay, groups, painter_of
from session import Session
from tempering import Painter, Watched


def take_sample(
    session: Session, records: Records, rank: int, mine: Sequence[Key], batch: Batch
) -> tuple[Sample, dict[Key, OnTheWay]]:
    """The sample, which is on disk then, and those of this process's cycles that it has begun.

    They have gone exactly as far as the thresholds of the sample take them.
    """
    file = records.folder / calibration.FILE
    with suppress(InputError):  # none yet, or damaged
        return calibration.load(file).sample, {}
    taking = Taking(session, records, rank, batch)
    taking.watch_all(mine)
    sample = taking.walk_all(mine)
    calibration.save(file, Calibration(session.origin, sample))
    return sample, taking.settled(sample, mine)


class Taking:
    """How one process takes the sample."""

    def __init__(self, session: Session, records: Records, rank: int, batch: Batch) -> None:
        self.session = session
        self.records = records
        self.file = records.energies_file(rank)
        self.batch = batch
        self.watched: dict[Key, tuple[Painter, Watched]] = {}
        self.begun: dict[Key, OnTheWay] = {}

    # --- Plain pictures.

    def watch_all(self, mine: Sequence[Key]) -> None:
        """See that the energies of all plain pictures are on disk."""
        own, known = set(mine), self.records.energies()
        missing = [key for key in self.records.sample if key not in known]
        self.watch([key for key in missing if key in own])
        for key in missing:
            if key not in self.records.energies():
                self.watch([key])

    def watch(self, keys: Sequence[Key]) -> None:
        """Paint plain pictures up to their last look."""
        with tqdm(desc="energies", total=len(keys), unit="picture", disable=None) as bar:
            for group in groups(self.records, keys):
                painter, waiting = painter_of(self.session, self.records, group)
                while waiting:
                    made = self.batch.watch(painter, waiting)
                    waiting = waiting[len(made) :]
                    for watched in made:
                        key = group.pop(0)
                        self.note(key, looks=painter.looks(watched))
                        self.watched[key] = painter, watched
                        bar.update()

    def note(self, key: Key, **what: object) -> None:
        row = {"prompt": key[0], "seed": key[1], **what}
        outputs.append_json_line(self.file, row)

    # --- Their way on. All energies are known by then.

    @cached_property
    def painter(self) -> Painter:
        """One that walks the sample, of the run's own prompts."""
        known = self.records.energies()
        return self.session.painter.sampling([known[key] for key in self.records.sample])

    def walk_all(self, mine: Sequence[Key]) -> Sample:
        """Walk this process's pictures by themselves, then all of them together."""
        everything, own = self.records.sample, set(mine)
        with tqdm(desc="budget", unit="round", disable=None) as bar:
            for keys in ([key for key in everything if key in own], everything):
                while keys and (number := self.painter.missing(self.known(keys))) is not None:
                    self.walk_on(keys[number])
                    bar.update()
        sample = self.known(everything)
        limits = self.painter.by_hand(self.painter.sought(sample))
        return cut(sample, limits, self.painter.most)

    def known(self, keys: Sequence[Key]) -> Sample:
        """The sample of these, as far as anyone has walked them."""
        looks, rounds = self.records.energies(), self.records.stops()
        return self.painter.sample(Sampled(looks[key], rounds.get(key, ())) for key in keys)

    def walk_on(self, key: Key) -> None:
        """Take a picture one round further than anyone has."""
        if key not in self.begun:
            self.begin(key)
        walk = self.begun[key].walk
        painter = self.begun[key].painter.accepting(self.painter.limits)
        known = len(self.records.stops().get(key, ()))
        while len(walk.rounds) <= known:
            painter.round([walk])
        self.note(key, round=len(walk.rounds), stop=painter.stop(walk))

    def begin(self, key: Key) -> None:
        if key not in self.watched:
            self.watch([key])
        painter, watched = self.watched.pop(key)
        walk = painter.accepting(self.painter.limits).where_left(watched)
        self.begun[key] = OnTheWay(painter, walk)

    def settled(self, sample: Sample, mine: Sequence[Key]) -> dict[Key, OnTheWay]:
        """What has gone no further than it has to."""
        for key in list(self.watched):
            self.begin(key)
        own = set(mine)
        return {
            key: self.begun[key]
            for key, picture in zip(self.records.sample, sample.pictures, strict=True)
            if key in own
            and key in self.begun
            and len(self.begun[key].walk.rounds) <= len(picture.rounds)
        }
