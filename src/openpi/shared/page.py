"""Parts of reports: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.shared.charts import Rate
from openpi.shared.strict_json import Json

if TYPE_CHECKING:
    from PIL import Image


def style() -> str:
    """CSS of all pages."""
    return importlib.resources.files("openpi.shared").joinpath("report.css").read_text(encoding="utf-8")


def template(package: str, name: str) -> str:
    """A page that asks for its data, from the files of a package."""
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8").replace("/*STYLE*/", style())


def document(title: str, sections: Iterable[str], own_style: str = "") -> str:
    """The page; sections are HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style()}{own_style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def tile(look: str, name: str, value: str, small: str) -> str:
    """A large value under a name, and a small text: none of them HTML. `look`: a class of the style."""
    name, value, small = map(escape, (name, value, small))
    return f'<div class="tile {look}"><span>{name}</span><b>{value}</b><small>{small}</small></div>'


def rate_words(tally: Json) -> tuple[str, str]:
    """A tally (`Tally.to_dict`) as a large and a small text."""
    low, high = tally["wilson_95"]
    return f"{tally['rate']:.0%}", f"{tally['successes']} of {tally['trials']}; 95 % interval {low:.0%} to {high:.0%}"


def rate(tally: Json, label: str, style: str) -> Rate:
    low, high = tally["wilson_95"]
    return Rate(label, tally["rate"], low, high, style)


def tally_cell(tally: Json | None) -> str:
    if tally is None:
        return "not played"
    low, high = tally["wilson_95"]
    return f"{tally['successes']}/{tally['trials']} = {tally['rate']:.0%} [{low:.0%}, {high:.0%}]"


def jpeg_url(image: Image.Image, *, quality: int) -> str:
    """A picture as a URL that holds it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def films(videos: Iterable[Json], folder: Path) -> str:
    """A row of videos: `path` relative to `folder`, `prompt`, `success`, `num_steps`; maybe `told_prompt`, `note`."""
    figures = "".join(_film(video, folder) for video in videos)
    return f'<div class="films">{figures}</div>' if figures else '<p class="note">No films were kept.</p>'


def _film(video: Json, folder: Path) -> str:
    data = base64.b64encode((folder / video["path"]).read_bytes()).decode()
    outcome = '<span class="yes">done</span>' if video["success"] else '<span class="no">not done</span>'
    words = escape(video["prompt"])
    if video.get("told_prompt", video["prompt"]) != video["prompt"]:
        words = f"{words}<br>told: {escape(video['told_prompt'])}"
    note = f"<br>{escape(video['note'])}" if video.get("note") else ""
    return (
        f'<figure><video controls autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption><b>{words}</b><br>{outcome}, {video['num_steps']} steps{note}</figcaption></figure>"
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None, last_is_sum: bool = False
) -> str:
    """Cells are HTML already."""

    def cells(tag: str, row: Sequence[str]) -> str:
        is_number = [numbers_from is not None and i >= numbers_from for i in range(len(row))]
        return "".join(
            f'<{tag} class="number">{cell}</{tag}>' if number else f"<{tag}>{cell}</{tag}>"
            for cell, number in zip(row, is_number, strict=True)
        )

    header = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    opening = ["<tr>"] * len(rows)
    if last_is_sum:
        opening[-1] = '<tr class="sum">'
    body = "".join(f"{start}{cells('td', row)}</tr>" for start, row in zip(opening, rows, strict=True))
    opening_tag = '<table class="headed">' if header else "<table>"
    return f"{opening_tag}{header}<tbody>{body}</tbody></table>"


def command(text: str) -> str:
    """Lines may break between words only; browsers would break at the dashes of flags."""
    return f"<div>{' '.join(f'<span>{escape(word)}</span>' for word in text.split(' '))}</div>"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"
