"""HTML from plain text: whatever a name or a figure contains, it is shown and never obeyed."""

import json
from collections.abc import Iterable
from html import escape
from typing import Any


class Markup(str):
    """HTML that is meant as HTML."""

    __slots__ = ()


VOID = {"meta", "br", "col"}


def tag(name: str, /, *content: str | None, **attributes: str | bool | int | None) -> Markup:
    """An element.

    Args:
        name: Of the element.
        content: Text, which is escaped, or markup.
        attributes: `class_` stands for `class`, `aria_label` for `aria-label`; False and None are
            left out.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = joined(content)
    return Markup(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{inner}</{name}>")


def joined(content: Iterable[str | None]) -> Markup:
    """Pieces one after another; text among them is escaped."""
    return Markup(
        "".join(
            piece if isinstance(piece, Markup) else escape(piece)
            for piece in content
            if piece is not None
        )
    )


def json_script(identifier: str, value: Any) -> Markup:
    """Data in a page; no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(f'<script type="application/json" id="{identifier}">{safe}</script>')
