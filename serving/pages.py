"""Two pages: a chat at `/`, the reference at `/docs`. Neither needs another site."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse

FOLDER = Path(__file__).parent
INLINE = re.compile(r"<(script|style)[^>]*>(.*?)</\1>", re.DOTALL)


async def chat() -> HTMLResponse:
    """A chat with the model."""
    return page("page.html")


async def docs() -> HTMLResponse:
    """The reference, made in the browser from /openapi.json."""
    return page("docs.html")


def page(name: str) -> HTMLResponse:
    """An HTML file whose own scripts and styles run, and nobody else's."""
    html = (FOLDER / name).read_text(encoding="utf-8")
    allowed = {"script": "", "style": ""}
    for kind, text in INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind] += f" 'sha256-{digest}'"
    none = " 'none'"
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src{allowed['script'] or none}; style-src{allowed['style'] or none}"
    )
    return HTMLResponse(
        html,
        headers={
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )
