"""Prompt sets: what an evaluation paints. Light to import, so that a bad line fails at once.

    # a comment
    [animals]
    a cat | a dog
    [worn] " with "
    a bear | a crown

A line is a prompt, its subjects separated by `|`. A head names the subset of the lines under it,
and may say in quotes what joins their subjects; elsewhere that is the joiner of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from errors import InputError, one_line

BUNDLED = Path(__file__).with_name("prompt_sets")
KEPT = "prompts.txt"  # an evaluation's own copy
LARGEST = 10_000_000  # bytes of a file; the papers' sets have some ten thousand
UNNAMED = "others"  # the subset of lines that stand under no head
_HEAD = re.compile(r'\[([^][]*[^][\s][^][]*)\]\s*(?:"([^"]*)")?')


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set: its subjects, what joins them, and the subset that it belongs to."""

    subjects: tuple[str, ...]
    joiner: str
    subset: str = UNNAMED

    @property
    def text(self) -> str:
        return self.joiner.join(self.subjects)


def names() -> list[str]:
    """The bundled sets. The pocket knows every word in them, so each is the pocket's, too."""
    found = sorted(path.stem for path in BUNDLED.glob("*.txt"))
    return [*found, *(f"pocket-{name}" for name in found)]


def lasting(text: str) -> str:
    """The name of a set as it means the same from another working directory."""
    with suppress(OSError, RuntimeError):  # what can not be found is refused when it is read
        return text if text in names() else str(Path(text).expanduser().absolute())
    return text


def load(text: str, joiner: str) -> list[Prompt]:
    """The prompts of a bundled set or of a file, in order; `joiner` is for heads that name none.

    Raises InputError, with the number of the line where it is one line's fault.
    """
    bundled = BUNDLED / f"{text.removeprefix('pocket-')}.txt"
    path = bundled if text in names() else Path(text)
    return parse(_read(path, text).splitlines(), joiner, text)


def parse(lines: Sequence[str], joiner: str, name: str) -> list[Prompt]:
    """The prompts of the lines of a set that is called `name`. Raises InputError."""
    found = list(_prompts(lines, joiner, name))
    if not found:
        raise InputError(f"--prompts_file must hold a prompt, got none in {name}")
    return found


def _prompts(lines: Sequence[str], joiner: str, name: str) -> Iterator[Prompt]:
    subset, joined = UNNAMED, joiner
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            head = _HEAD.fullmatch(line)
            if not head:
                raise InputError(
                    f'{name}, line {number}: a head must be [name] or [name] "joiner", got {line!r}'
                )
            subset, joined = head[1].strip(), joiner if head[2] is None else head[2]
            continue
        subjects = tuple(part.strip() for part in line.split("|"))
        if not all(subjects):
            raise InputError(f"{name}, line {number}: no subject may be empty, got {line!r}")
        yield Prompt(subjects, joined, subset)


def write(prompts: Sequence[Prompt], joiner: str) -> str:
    """A file's text from which `parse` with this joiner reads the same prompts again."""
    lines, last = [], None
    for prompt in prompts:
        own = "" if prompt.joiner == joiner else f' "{prompt.joiner}"'
        head = f"[{prompt.subset}]{own}"
        lines += [head] if head != last else []
        lines.append(" | ".join(prompt.subjects))
        last = head
    return "\n".join(lines) + "\n"


def _read(path: Path, text: str) -> str:
    wanted = f"--prompts_file must be a text file or one of {', '.join(names())}"
    try:
        path = path.expanduser()
        if not path.is_file():
            raise InputError(f"{wanted}, got {text!r}")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{wanted} of at most {LARGEST // 10**6} MB, got {text!r}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise InputError(f"{wanted}, but {text!r} can not be read ({one_line(error)})") from error
