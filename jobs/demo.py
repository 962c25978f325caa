"""`make demo`: one real night on public grocery baskets, then what it made, judged by what happened in the two weeks after."""

import argparse
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

from deltalake import DeltaTable
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Table as RichTable

from conf.settings import load_settings
from conf.tables import EVALUATION, ITEM_FEATURES, ITEM_NEIGHBORS
from features import store
from jobs.arguments import report_errors
from jobs.demo_source import lay_source
from jobs.evaluate import evaluate
from jobs.ingest import ingest
from jobs.nightly import run_night, summary
from jobs.online import open_feature_store
from jobs.progress import Display
from jobs.publication import published
from jobs.query import register_views
from jobs.reader import neighbors_of, open_table
from jobs.session import start_session
from jobs.show import side_by_side
from jobs.stage import Night, make_night, run_stage

RUN_DATE = date(2017, 11, 30)
_POPULARITY_RANKS = (1, 200, 5_000)
"""The demo shows a hot item, a common one and a rarely bought one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Lay the source, run the night, judge it, show it."""
    parser = argparse.ArgumentParser(description="one whole night on public grocery baskets")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="e.g. source.user_share=0.1 for a slice")

    def run() -> None:
        settings = load_settings("demo", parser.parse_args(argv).set)
        console, display = Console(), Display()
        laid = lay_source(Path(settings.source.events.path).parent)
        display.say(f"source tables in {Path(settings.source.events.path).parent}: {'written' if laid else 'there already'}")
        spark = start_session(settings.spark, app_name="mtmh demo")
        night = make_night(settings, RUN_DATE, spark=spark, display=display)
        records = run_night(night)
        _judge(night)
        console.print(summary(records))
        _show_lists(console, night)
        _show_scores(console, night)
        _show_three_ways(console, night)
        _show_next(console, night)

    report_errors(run)


def _judge(night: Night) -> None:
    """Bring in the two weeks after the night, and score the night's lists on them."""
    horizon = timedelta(days=night.settings.evaluation.horizon_days)
    later = make_night(night.settings, night.run_date + horizon, spark=night.spark, display=night.display)
    night.display.say(f"[bold]what happened until {later.run_date}[/bold]")
    run_stage(later, "ingest", ingest)
    run_stage(later, "evaluate", evaluate)


def _triggers(night: Night) -> list[str]:
    """Items at fixed ranks of popularity."""
    ranked = night.lake.read(ITEM_FEATURES).where("in_catalog").orderBy(F.desc("num_user_days"), "item_id").select("item_id")
    rows = ranked.limit(max(_POPULARITY_RANKS)).collect()
    return [rows[min(rank, len(rows)) - 1]["item_id"] for rank in _POPULARITY_RANKS]


def _show_lists(console: Console, night: Night) -> None:
    for item_id in _triggers(night):
        console.print(side_by_side(night.lake.root, item_id, heads=night.settings.list_names, k=5))


def _show_scores(console: Console, night: Night) -> None:
    rows = night.lake.read(EVALUATION).where((F.col("run_id") == night.run_id) & (F.col("slice") == "all")).collect()
    days, triggers = rows[0]["horizon_days"], rows[0]["num_triggers"]
    names = ("recall@100", "recall@10", "debiased_recall@100", "debiased_recall@10")
    title = f"judged on the {days} days after {night.run_date}, {triggers:,} triggers (± half of a 95 % interval)"
    table = RichTable("method", "list", *(name.replace("_", "\n") for name in names), title=title, title_justify="left")
    lists = list(dict.fromkeys((row["method"], row["head"]) for row in rows))
    cells = {
        (row["method"], row["head"], row["metric"]): f"{row['value']:.3f} [dim]±{(row['high'] - row['low']) / 2:.3f}[/dim]" for row in rows
    }
    for method, head in lists:
        table.add_row(method, head, *(cells.get((method, head, name), "") for name in names))
    console.print(table)


def _show_three_ways(console: Console, night: Night) -> None:
    """The same merged list by Spark SQL, by Feast's online store, and by a Delta reader without Spark."""
    item_id = _triggers(night)[0]
    register_views(night.lake)
    ranked = night.spark.sql("SELECT item_id, rank, neighbor_id FROM item_neighbor_rows WHERE head = 'merged' AND rank <= 5")
    by_sql = [row["neighbor_id"] for row in ranked.where(F.col("item_id") == F.lit(item_id)).orderBy("rank").collect()]
    online = store.lookup_online(open_feature_store(night.settings), [item_id], heads=["merged"], k=5)
    by_feast = online[item_id]["merged"]["ids"]
    by_reader = [neighbor["neighbor_id"] for neighbor in neighbors_of(night.lake.root, [item_id])[(item_id, "merged")][:5]]
    table = RichTable("fetched by", "first 5 merged neighbors", title=f"one list, three ways: item {item_id}", title_justify="left")
    for name, found in (("Delta SQL (Spark)", by_sql), ("Feast online lookup", by_feast), ("delta-rs, no Spark", by_reader)):
        table.add_row(name, " ".join(found))
    console.print(table)


def _show_next(console: Console, night: Night) -> None:
    table: DeltaTable = open_table(night.lake.root, ITEM_NEIGHBORS)
    run_id = published(night.lake.root).run_id
    item_id = _triggers(night)[1]
    console.print(f"tables: {night.lake.root}  (item_neighbors version {table.version()}, published by run {run_id})")
    console.print("next:")
    for command in (
        f"python -m jobs.show {item_id} --config demo",
        "python -m jobs.explore --config demo",
        'python -m jobs.query "SELECT head, count(*) FROM item_neighbor_rows GROUP BY head" --config demo',
        f"python -m jobs.nightly --run-date {night.run_date + timedelta(days=1)} --config demo --plan",
    ):
        console.print(f"  .venv/bin/{command}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
