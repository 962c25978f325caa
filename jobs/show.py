"""Print an item's lists side by side, each neighbor with its reason: `python -m jobs.show ITEM --config demo`."""

import argparse
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from conf.errors import SourceError
from jobs.arguments import add_config, report_errors, settings_of
from jobs.reader import lake_root, neighbors_of, titles_of


def side_by_side(root: str, item_id: str, *, heads: Sequence[str], k: int) -> RichTable:
    """The first k neighbors of each head, a column a head.

    Raises:
        SourceError: the item has no lists.
    """
    lists = neighbors_of(root, [item_id])
    if not lists:
        raise SourceError(f"no lists for item {item_id!r} in the current night under {root}; ids are written as in the catalog")
    shown = {head: lists.get((item_id, head), [])[:k] for head in heads}
    titles = titles_of(root, [item_id, *{neighbor["neighbor_id"] for found in shown.values() for neighbor in found}])
    table = RichTable(title=f"{escape(titles[item_id])} [dim]({escape(item_id)})[/dim]", title_justify="left", show_lines=False)
    table.add_column("", justify="right")
    for head in heads:
        table.add_column(head, ratio=1)
    for rank in range(max((len(found) for found in shown.values()), default=0)):
        table.add_row(str(rank + 1), *(_cell(shown[head], rank, titles) for head in heads))
    return table


def _cell(neighbors: Sequence[dict[str, str]], rank: int, titles: Mapping[str, str]) -> str:
    if rank >= len(neighbors):
        return ""
    neighbor = neighbors[rank]
    return f"{escape(titles[neighbor['neighbor_id']])}\n[dim]{escape(neighbor['reason'])}[/dim]"


def main(argv: Sequence[str] | None = None) -> None:
    """Print one or several items."""
    parser = argparse.ArgumentParser(description="an item's lists side by side")
    parser.add_argument("items", nargs="+", metavar="ITEM", help="item id, as in the catalog")
    parser.add_argument("--k", type=int, default=10, help="neighbors per list")
    add_config(parser, default="demo")

    def run() -> None:
        values = parser.parse_args(argv)
        settings = settings_of(values)
        for item in values.items:
            Console().print(side_by_side(lake_root(settings.lake), item, heads=settings.list_names, k=values.k))

    report_errors(run)


if __name__ == "__main__":
    main()
