"""HTML by the templates in ``templates/``: pages that need nothing from elsewhere, and fragments of them."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A template's text; values are escaped."""
    return _environment().get_template(template).render(**values)


def data_uri(content: bytes, kind: str) -> str:
    """A file as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@cache
def _environment() -> Environment:
    made = Environment(loader=PackageLoader("llava.eval"), autoescape=True, undefined=StrictUndefined)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made
