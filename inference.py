"""The flow of `--tempered_inference`: one tempered picture, and everything about it on disk."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F
from tqdm import tqdm

import outputs
from metrics import picture_metrics
from session import Session, in_whole_calls, open_session
from settings import Request
from sheets import Panel, class_colours, class_overlay, sheet
from tempering import Result, View

if TYPE_CHECKING:
    from PIL.Image import Image

ORDER = ("plain", "interrupted", "classes", "kept", "tempered")  # on the sheet


def run(request: Request) -> None:
    """Make the picture that `request` asks for; the folder and the figures go to stdout."""
    begun = time.perf_counter()
    session = open_session(request)
    loaded = time.perf_counter()
    result = paint(session)
    seconds = {"load": loaded - begun, "paint": time.perf_counter() - loaded}

    # The pictures first, so that they are there whatever befalls the rest.
    folder = outputs.new_run_folder(request.output, request.prompt, request.begun)
    pictures = {"plain": result.plain, "tempered": result.image}
    finished = {name: picture for name, picture in pictures.items() if picture}
    save_pictures(folder, session, result, finished)
    views = {name: session.painter.look([picture])[0] for name, picture in finished.items()}
    seen = {
        "interrupted": result.interrupted.image,
        **({"kept": result.kept.image} if result.kept else {}),
        "classes": class_map(result.interrupted),
        "sheet": draw_sheet(session, result, views),
    }
    save_pictures(folder, session, result, seen)
    outputs.save_json(folder / "run.json", describe(session, result, views, seconds))
    for name, view in views.items():
        print(f"{name:9}{figures(view)}")
    print(folder)


def paint(session: Session) -> Result:
    """The tempered picture, with a bar over all U-Net calls."""
    request = session.request
    calls = session.painter.unet_calls(compare=request.compare)
    with tqdm(total=calls, desc="U-Net", unit="call", disable=None) as bar:
        (result,) = session.painter.temper(
            [request.seed], compare=request.compare, progress=in_whole_calls(bar.update)
        )
        bar.total = bar.n  # rounds that were not needed are done, too
        bar.refresh()
        return result


def save_pictures(
    folder: Path, session: Session, result: Result, pictures: dict[str, Image]
) -> None:
    """Write each picture under its name, with the parameters that made it."""
    for name, picture in pictures.items():
        text = session.parameters(result.image, result.seed, name)
        outputs.save_image(folder / f"{name}.png", picture, text)


def class_map(view: View) -> Image:
    """The classes over the picture that they were seen in."""
    size = (view.image.height, view.image.width)
    labels = F.interpolate(view.labels[None, None].double(), size=size, mode="nearest-exact")
    return class_overlay(view.image, labels[0, 0].long().numpy())


def draw_sheet(session: Session, result: Result, views: dict[str, View]) -> Image:
    """All pictures of the run side by side with their figures."""
    request = session.request
    steps = request.settings.steps
    stop = f"after step {result.interrupted_at} of {steps}"
    uncertain = ", ".join(f"{value:.2f}" for value in result.interrupted.uncertainty.tolist())
    panels = {
        "interrupted": Panel(
            "interrupted", result.interrupted.image, (figures(result.interrupted), stop)
        ),
        "classes": Panel(
            "classes seen", class_map(result.interrupted), (f"uncertainty {uncertain}",)
        ),
        **{name: Panel(name, view.image, (figures(view),)) for name, view in views.items()},
    }
    if result.kept:
        kept = sum(each.kept for each in result.rounds)
        done = (
            f"energy {result.interrupted.energy:.2f}, then {result.kept.energy:.2f} "
            f"after step {result.kept_at}"
        )
        lines = figures(result.kept), done
        title = f"kept: {kept} of {len(result.rounds)} rounds"
        panels["kept"] = Panel(title, result.kept.image, lines)
    order = [name for name in ORDER if name in panels]
    colours = class_colours(len(request.prompts))
    return sheet(
        [panels[name] for name in order],
        f"{request.prompt} · seed {result.seed} · {session.model}",
        list(zip(request.prompts, colours, strict=True)),
    )


def describe(
    session: Session, result: Result, views: dict[str, View], seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of run.json."""
    return {
        **session.facts(),
        "seed": result.seed,
        "unet_calls": result.unet_calls,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "interrupted": {"step": result.interrupted_at, **seen_in(result.interrupted)},
        **({"kept": {"step": result.kept_at, **seen_in(result.kept)}} if result.kept else {}),
        "rounds": [asdict(each) for each in result.rounds],
        "regions": [box and list(box) for box in result.regions],
        **{
            name: {
                "metrics": picture_metrics(view.matrix.numpy()),
                "class_matrix": view.matrix.tolist(),
            }
            for name, view in views.items()
        },
    }


def seen_in(view: View) -> dict[str, Any]:
    """What CLIPSeg saw, for run.json."""
    return {
        "class_matrix": view.matrix.tolist(),
        "uncertainty": view.uncertainty.tolist(),
        "energy": view.energy,
    }


def figures(view: View) -> str:
    """The metrics of a picture in one line."""
    return str(picture_metrics(view.matrix.numpy()))
