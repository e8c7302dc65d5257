"""The page of job=play, put together from its files: nothing of it is loaded from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from lab.report_style import CSS

FOLDER = Path(__file__).parent


def page(title: str) -> tuple[str, str]:
    """(HTML, its content security policy without what it may connect to), style and script inline and allowed by their checksums alone."""
    style, script = CSS + (FOLDER / "play.css").read_text(encoding="utf-8"), (FOLDER / "play.js").read_text(encoding="utf-8")
    html = (FOLDER / "play.html").read_text(encoding="utf-8")
    for mark, text in (("TITLE", escape(title)), ("STYLE", style), ("SCRIPT", script)):
        html = html.replace(f"<!--{mark}-->", text)
    sources = f"style-src '{_checksum(style)}'; script-src '{_checksum(script)}'; img-src data:"
    return html, f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _checksum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
