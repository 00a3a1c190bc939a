"""Formats reports and inspections as self-contained HTML files."""

import base64
import html
import importlib.resources
import string
from collections.abc import Mapping, Sequence

Rows = Sequence[tuple[str, str]]
"""Names and values."""


def format_report(
    texts: Mapping[str, str],
    *,
    results: Rows,
    classes: Sequence[Mapping[str, str]],
    settings: Rows,
    figures: Mapping[str, bytes],
) -> str:
    """Returns the page of a report; escapes all values.

    The keys of `texts` are "title", "accuracy", "summary", "classes" (the caption of their table), "command" and
    "config"; `classes` maps column titles to cells, in each row; `figures` maps captions, "Title. Explanation.", to PNG
    files, in the order of the page.
    """
    escaped = {name: html.escape(text) for name, text in texts.items()}
    sections = [
        f'<h2>Results</h2>\n<table class="numbers">{_format_rows(results)}</table>',
        f'<h2>Classes</h2>\n<p>{escaped["classes"]}</p>\n<table class="classes">{_format_table(classes)}</table>',
        f"<h2>Settings</h2>\n<table>{_format_rows(settings)}</table>",
        f"<h2>Command</h2>\n<pre>{escaped['command']}</pre>",
        *(_format_figure(caption, png) for caption, png in figures.items()),
        f"<h2>Config</h2>\n<pre>{escaped['config']}</pre>",
    ]
    return _format_page(texts["title"], texts["accuracy"], texts["summary"], sections)


def format_inspection(title: str, headline: str, summary: str, sections: Mapping[str, str | bytes]) -> str:
    """Returns the page of an inspection; escapes all values.

    `sections` maps captions, "Title. Explanation.", to preformatted text or PNG files, in the order of the page.
    """
    return _format_page(title, headline, summary, [_format_section(*section) for section in sections.items()])


def _format_page(title: str, headline: str, summary: str, sections: Sequence[str]) -> str:
    """Fills the template `assets/page.html`; escapes all but the sections."""
    texts = {"title": title, "headline": headline, "summary": summary}
    return string.Template(_read_asset("page.html")).substitute(
        {name: html.escape(text) for name, text in texts.items()},
        style=_read_asset("style.css"),
        sections="\n".join(sections),
    )


def _format_section(caption: str, content: str | bytes) -> str:
    if isinstance(content, bytes):
        return _format_figure(caption, content)
    title, _, text = map(html.escape, caption.partition(". "))
    return f"<h2>{title}</h2>\n<p>{text}</p>\n<pre>{html.escape(content)}</pre>"


def _read_asset(name: str) -> str:
    return importlib.resources.files("vit_jax").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def _format_rows(rows: Rows) -> str:
    return "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)


def _format_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [_format_cells("th", list(rows[0]))] if rows else []
    return "\n".join([*lines, *(_format_cells("td", list(row.values())) for row in rows)])


def _format_cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _format_figure(caption: str, png: bytes) -> str:
    title, _, text = map(html.escape, caption.partition(". "))
    data = base64.b64encode(png).decode()
    return f'<h2>{title}</h2>\n<p>{text}</p>\n<img alt="{title}" src="data:image/png;base64,{data}">'
