"""Formats the report as one self-contained HTML file."""

import base64
import html
import importlib.resources
import string
from collections.abc import Mapping, Sequence

Rows = Sequence[tuple[str, str]]
"""Names and values."""


def format_report(texts: Mapping[str, str], *, results: Rows, settings: Rows, figures: Mapping[str, bytes]) -> str:
    """Fills the template `assets/report.html`; escapes all values.

    The keys of `texts` are "title", "accuracy", "summary", "command" and "config"; `figures` maps captions, "Title.
    Explanation.", to PNG files, in the order of the page.
    """
    template = importlib.resources.files("vit_jax").joinpath("assets/report.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        {name: html.escape(text) for name, text in texts.items()},
        results=_format_rows(results),
        settings=_format_rows(settings),
        figures="\n".join(_format_figure(title, png) for title, png in figures.items()),
    )


def _format_rows(rows: Rows) -> str:
    return "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)


def _format_figure(caption: str, png: bytes) -> str:
    title, _, text = map(html.escape, caption.partition(". "))
    data = base64.b64encode(png).decode()
    return f'<h2>{title}</h2>\n<p>{text}</p>\n<img alt="{title}" src="data:image/png;base64,{data}">'
