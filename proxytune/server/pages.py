"""The page of docs: what can be asked. It loads nothing, from here or from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>proxytune: API</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
code {{ font: 0.9em ui-monospace, monospace }}
dt {{ margin-top: 1rem }}
dd {{ margin-left: 0 }}
</style>
<h1>proxytune {version}</h1>
<p>{about}</p>
<p>An API in OpenAI's style: <a href="/openapi.json">openapi.json</a> describes every field.</p>
<dl>{routes}</dl>
</html>
"""


def docs_page(schema: Mapping[str, Any]) -> str:
    """The page of an OpenAPI schema."""
    routes = [
        f"<dt><code>{escape(method.upper())} {escape(path)}</code></dt>"
        f"<dd>{escape(' '.join(str(operation.get('description', '')).split()))}</dd>"
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    info = schema["info"]
    about = escape(str(info.get("description", "")))
    return PAGE.format(version=escape(info["version"]), about=about, routes="".join(routes))
