"""A self-contained HTML page of figures: no other file, no network."""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastphi.support import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { max-width: 100% } figure { margin: 0 } p { max-width: 46rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: right }
th:first-child, td:first-child, .words td, .words th { text-align: left; vertical-align: top }
.words td:last-child { white-space: nowrap }
footer { margin: 3rem 0 1rem; color: #777; font-size: .85rem }
"""


class Report:
    """Sections in order, written whole by `write`.

    report = Report("Title", "what this is")
    with report.figure("Heading", "what it shows", columns=2) as axes: ...
    report.write(path)

    figures: a folder that every figure is also written to, as PNG and PDF.
    """

    def __init__(
        self, title: str, introduction: str, figures: str | os.PathLike[str] | None = None
    ) -> None:
        self.title = title
        self._folder = None if figures is None else Path(figures)
        self._parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(introduction)}</p>"]

    @contextmanager
    def figure(
        self, heading: str, text: str, columns: int = 1, size: tuple[float, float] = (9.0, 3.6)
    ) -> Iterator[list[Axes]]:
        """One figure of `columns` axes side by side, drawn in the block. size: inches."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        yield list(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        if self._folder is not None:
            name = "-".join(re.findall(r"\w+", heading.lower()))
            with files.atomic_write(self._folder / f"{name}.png") as temporary:
                temporary.write_bytes(buffer.getvalue())
            with files.atomic_write(self._folder / f"{name}.pdf") as temporary:
                figure.savefig(temporary, format="pdf")
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = html.escape(heading, quote=True)
        self._section(heading, text)
        self._parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')

    def table(
        self, heading: str, text: str, header: list[str], rows: list[list[Any]], words: bool = False
    ) -> None:
        """words: of text, set to the left, not of numbers."""
        self._section(heading, text)
        lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"]
        for row in rows:
            lines.append("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>")
        kind = ' class="words"' if words else ""
        self._parts.append(f"<table{kind}>" + "".join(lines) + "</table>")

    def write(self, path: str | os.PathLike[str], footer: str = "") -> None:
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            + "\n".join(self._parts)
            + f"<footer>{html.escape(footer)}</footer></body></html>\n"
        )
        with files.atomic_write(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def _section(self, heading: str, text: str) -> None:
        if heading:
            self._parts.append(f"<h2>{html.escape(heading)}</h2>")
        if text:
            self._parts.append(f"<p>{html.escape(text)}</p>")
