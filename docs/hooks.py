"""Let pages link to files of the repository: the site shows what lies outside ``docs/`` by its path."""

import re

OUTSIDE = re.compile(r"(!?)\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace links that leave the site by the path to open in the repository, and images by nothing."""
    return OUTSIDE.sub(_path, markdown)


def _path(link: re.Match[str]) -> str:
    image, text, target = link.groups()
    path = target.partition("#")[0]
    return "" if image else f"`{path}`" if text == path else f"{text} (`{path}`)"
