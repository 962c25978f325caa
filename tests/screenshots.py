"""Pictures of the explorer for the docs: `python -m tests.screenshots --config demo` writes docs/pictures/ from the lake of `make demo`."""

import argparse
from collections.abc import Sequence

from playwright.sync_api import Page

from conf.settings import load_settings
from jobs.explorer.app import Explorer
from tests.browser import open_browser, served
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "pictures"


def main(argv: Sequence[str] | None = None) -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description="pictures for the docs")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--set", action="append", default=[])
    values = parser.parse_args(argv)
    settings = load_settings(values.config, values.set)
    item = Explorer(settings=settings).night().catalog.search("condensed soup", k=1)[0].item_id
    FOLDER.mkdir(parents=True, exist_ok=True)
    with served(settings) as address:
        with open_browser(width=1280, height=800) as context:
            page = mixed(context.new_page(), f"{address}/?item={item}")
            page.screenshot(path=FOLDER / "explorer.png")
        with open_browser(width=390, height=780, dark=True) as context:
            page = mixed(context.new_page(), f"{address}/?item={item}")
            page.locator("#find").fill("bananna")
            page.locator("#found li").first.wait_for()
            page.screenshot(path=FOLDER / "explorer-phone.png")


def mixed(page: Page, address: str) -> Page:
    """The page of an item with its mix moved towards relevance."""
    page.goto(address)
    slider = page.get_by_role("slider", name="Mix")
    slider.wait_for()
    slider.press("ArrowRight")
    return page


if __name__ == "__main__":
    main()
