"""Let pages link to repository files outside ``docs/``: the site shows such links as plain paths."""

import re

OUTSIDE = re.compile(r"(!?)\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace links that leave the site with repository paths, and remove such images."""
    return OUTSIDE.sub(_path, markdown)


def _path(link: re.Match[str]) -> str:
    image, text, target = link.groups()
    path = target.partition("#")[0]
    return "" if image else f"`{path}`" if text == path else f"{text} (`{path}`)"
