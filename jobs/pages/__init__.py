"""Pages as files: templates, styles and the script of the explorer; they may lie in a zip."""

from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined


def text(name: str) -> str:
    """Content of a file of this folder."""
    return resources.files("jobs.pages").joinpath(name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Templates of this folder; everything that is put into them is escaped."""
    return Environment(
        loader=PackageLoader("jobs.pages", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
