"""Stage 1: the user's events and items become `engagements`, `item_annotations`, `pair_relevance`, `impressions` and
`rejected_rows`.

A night of run date D takes every event with `engaged_at < D+1 00:00 UTC`. Days up to D are replaced, so that a second run changes
nothing; later days, which a later night may have written, stay.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.tables import ENGAGEMENTS, IMPRESSIONS, ITEM_ANNOTATIONS, PAIR_RELEVANCE, REJECTED_ROWS, RELEVANCE_FEEDBACK, Table
from features import annotations, engagements, exposures
from features.sources import rejected_rows
from jobs.lake import in_memory, only_row
from jobs.sources import read_source, reading_sources, take_users, user_hash_key
from jobs.stage import StageRun, stage_main

STAGE = "ingest"


def ingest(run: StageRun) -> None:
    """Read and check all sources, write what is good and what is refused, gate."""
    with ExitStack() as stack:
        stack.enter_context(reading_sources(run.settings.source))
        given = checked_sources(run)
        given["items"] = stack.enter_context(in_memory(given["items"]))
        events, items = given["events"], given["items"]
        labels, impressions = given.get("pair_relevance"), given.get("impressions")
        run.replace(ENGAGEMENTS, _accepted_events(run, events), where=f"event_date <= '{run.run_date}'")
        run.replace(ITEM_ANNOTATIONS, _merged_annotations(run, items))
        run.replace(PAIR_RELEVANCE, _accepted(run, labels, PAIR_RELEVANCE).unionByName(_votes(run)))
        run.replace(IMPRESSIONS, _accepted(run, impressions, IMPRESSIONS).distinct())
        refused = [rejected_rows(frame, run_id=run.night.run_id, source=name) for name, frame in given.items()]
        run.replace(REJECTED_ROWS, _union(refused), where=f"run_id = '{run.night.run_id}'")
        metrics = _event_metrics(run, events) | _item_metrics(run, items)
        if impressions is not None:
            metrics |= _rejected(impressions, "impressions")
    run.gate(metrics | {"num_duplicate_keys": _num_duplicate_keys(run)})


def checked_sources(run: StageRun) -> dict[str, DataFrame]:
    """By name, every row of the sources that there are, with what is wrong with it. Columns are looked at now, rows later.

    Raises:
        SourceError: a source or a mapped column is missing, or of an unusable type.
    """
    checked = {
        "items": _checked_items(run),
        "events": checked_events(run),
        "pair_relevance": _checked_labels(run),
        "impressions": _checked_impressions(run),
    }
    return {name: frame for name, frame in checked.items() if frame is not None}


def _checked_items(run: StageRun) -> DataFrame:
    source = run.settings.source.items
    return annotations.check_items(read_source(run.night.spark, source, name="items"), source=source)


def _accepted_events(run: StageRun, checked: DataFrame) -> DataFrame:
    return engagements.accepted_events(checked, source=run.settings.source.events)


def checked_events(run: StageRun) -> DataFrame:
    """Every row of the events source, read and judged for this night: see `features.engagements.check_events`."""
    key, note = user_hash_key(run.settings.pairs)
    if note:
        run.note(note)
    source = run.settings.source.events
    frame = read_source(run.night.spark, source, name="events")
    frame = take_users(frame, source.columns.user_id, share=run.settings.source.user_share)
    return engagements.check_events(frame, source=source, run_date=run.run_date, now=run.night.now, hash_key=key)


def _merged_annotations(run: StageRun, items: DataFrame) -> DataFrame:
    source, lake = run.settings.source.items, run.night.lake
    point_in_time = source.columns.event_timestamp is not None
    if not point_in_time:
        run.note("catalog not point-in-time: it has no time column, so every night sees today's catalog")
    good = run.night.last_good_version(ITEM_ANNOTATIONS)  # not the latest one: a night that failed its gate may have written that
    existing = None if good is None else lake.read(ITEM_ANNOTATIONS, good)
    incoming = annotations.accepted_items(items)
    return annotations.merge_annotations(existing, incoming, mode=source.mode, run_date=run.run_date, point_in_time=point_in_time)


def _checked_labels(run: StageRun) -> DataFrame | None:
    source = run.settings.source.pair_relevance
    if source is None:
        return None
    frame = read_source(run.night.spark, source, name="pair_relevance")
    return annotations.check_pair_relevance(frame, source=source, now=run.night.now)


def _accepted(run: StageRun, checked: DataFrame | None, table: Table) -> DataFrame:
    """The rows of an optional source that nothing is wrong with."""
    if checked is None:
        return run.night.spark.createDataFrame([], table.ddl)
    return checked.where(F.col("reason").isNull()).select(*table.column_names)


def _checked_impressions(run: StageRun) -> DataFrame | None:
    source = run.settings.source.impressions
    if source is None:
        return None
    frame = read_source(run.night.spark, source, name="impressions")
    frame = take_users(frame, source.columns.user_id, share=run.settings.source.user_share)
    return exposures.check_impressions(frame, source=source, run_date=run.run_date, now=run.night.now)


def _votes(run: StageRun) -> DataFrame:
    """What people have said in the explorer by the end of the run date.

    The inbox is no pinned input: a vote that comes later waits for the next night, and does not make this one run again.
    """
    lake = run.night.lake
    lake.create(RELEVANCE_FEEDBACK)
    return annotations.votes_as_labels(lake.read(RELEVANCE_FEEDBACK), run_date=run.run_date)


def _union(frames: Sequence[DataFrame]) -> DataFrame:
    first, *rest = frames
    for frame in rest:
        first = first.unionByName(frame)
    return first


def _event_metrics(run: StageRun, checked: DataFrame) -> dict[str, float]:
    counted = engagements.event_metrics(checked, source=run.settings.source.events)
    until = run.read_output(ENGAGEMENTS).where(F.col("event_date") <= F.lit(run.run_date))
    row = only_row(until.agg(F.count(F.lit(1)).alias("kept"), F.max("event_date").alias("newest")))
    kept, age = row["kept"], {} if row["newest"] is None else {"days_since_newest_event": (run.run_date - row["newest"]).days}
    share = counted["num_rejected_events"] / max(1.0, counted["num_source_events"])
    return (
        counted | age | {"rejected_events_share": share, "num_merged_events": counted["num_taken_events"] - kept, "num_engagements": kept}
    )


def _item_metrics(run: StageRun, checked: DataFrame) -> dict[str, float]:
    as_of = annotations.annotations_as_of(run.read_output(ITEM_ANNOTATIONS), run_date=run.run_date)
    return _rejected(checked, "items") | {"num_items": as_of.where(~F.col("deleted")).count()}


def _rejected(checked: DataFrame, what: str) -> dict[str, float]:
    row = only_row(checked.agg(F.count("*").alias("rows"), F.count("reason").alias("rejected")))
    return {
        f"num_source_{what}": row["rows"],
        f"num_rejected_{what}": row["rejected"],
        f"rejected_{what}_share": row["rejected"] / max(1, row["rows"]),
    }


def _num_duplicate_keys(run: StageRun) -> float:
    keys = [(ENGAGEMENTS, ENGAGEMENTS.key), (ITEM_ANNOTATIONS, ITEM_ANNOTATIONS.key)]
    return sum(run.read_output(table).groupBy(*key).count().where("count > 1").count() for table, key in keys)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, ingest, description="events and items to clean tables", argv=argv)


if __name__ == "__main__":
    main()
