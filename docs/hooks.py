"""Let pages link to files of the repository: the site shows what lies outside ``docs/`` by its path."""

import re

OUTSIDE = re.compile(r"(!?)\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace links that leave the site by the path to open in the repository, and images by nothing."""
    return OUTSIDE.sub(lambda link: "" if link[1] else f"{link[2]} (`{link[3].partition('#')[0]}`)", markdown)
