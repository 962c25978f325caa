"""Stage 2: `engagements` become `co_engagement_daily`, `co_engagement_pairs` and `item_popularity`.

A pair belongs to the day of its later engagement. Days up to the run date are counted; weights decay from a landmark day, so that the
weight at the run date is one factor at read time.
"""

from collections.abc import Sequence
from datetime import date
from typing import Any

from pyspark.sql import functions as F

from conf.errors import SourceError
from conf.tables import CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_PAIRS, ENGAGEMENTS, ITEM_POPULARITY
from features import pairs
from jobs.lake import only_row
from jobs.sources import user_hash_key
from jobs.stage import StageRun, stage_main

STAGE = "build_pairs"


def build_pairs(run: StageRun) -> None:
    """Count each day, sum up the days with decay, gate."""
    settings, until = run.settings.pairs, f"event_date <= '{run.run_date}'"
    engagements = run.read(ENGAGEMENTS).where(until)
    days: dict[str, Any] = {"first_day": _first_day(run), "last_day": run.run_date}
    cap: dict[str, Any] = {"window": settings.window, "max_items_per_user_day": settings.max_items_per_user_day}
    landmark = _landmark(run.run_date, settings.half_life_days)
    holdout_from = pairs.holdout_start(engagements, holdout_share=settings.holdout_share, run_date=run.run_date)
    decay: dict[str, Any] = {
        "landmark": landmark,
        "half_life_days": settings.half_life_days,
        "holdout_from": holdout_from,
        "run_date": run.run_date,
    }
    run.replace(ITEM_POPULARITY, engagements.transform(pairs.count_popularity(**decay)))
    hash_key = user_hash_key(settings)[0]
    daily = pairs.count_daily_pairs(min_users=settings.min_users_per_pair, hash_key=hash_key, **cap, **days)
    run.replace(CO_ENGAGEMENT_DAILY, engagements.transform(daily), where=until, presorted=True)
    summed = pairs.aggregate_pairs(
        run.read_output(ITEM_POPULARITY),
        pairs.collect_user_items(engagements, run_date=run.run_date, hash_key=hash_key, max_users=settings.swing_max_users),
        min_users=settings.min_users_per_pair,
        max_pairs_per_trigger=settings.max_pairs_per_trigger,
        **decay,
    )
    run.replace(CO_ENGAGEMENT_PAIRS, run.read_output(CO_ENGAGEMENT_DAILY).where(until).transform(summed))
    cut = only_row(engagements.transform(pairs.cap_metrics(**cap, **days)))
    run.gate(_metrics(run, until) | cut)


def _landmark(run_date: date, half_life_days: float) -> date:
    """The day weights decay from: fixed for spans of 100 half-lives, so it seldom moves and no exponent nears a double's limits."""
    span = max(1, round(100 * half_life_days))
    return date.fromordinal(max(1, run_date.toordinal() // span * span))


def _first_day(run: StageRun) -> date:
    until = run.read(ENGAGEMENTS).where(F.col("event_date") <= F.lit(run.run_date))
    first: date | None = only_row(until.agg(F.min("event_date").alias("day")))["day"]
    if first is None:
        raise SourceError(f"no engagements up to {run.run_date}; wanted at least one, in the table engagements: run ingest for this date")
    return first


def _metrics(run: StageRun, until: str) -> dict[str, float]:
    written = run.read_output(CO_ENGAGEMENT_PAIRS)
    weight = F.col("weight")
    row = only_row(
        written.agg(
            F.count("*").alias("num_pairs"),
            F.count_distinct("trigger_item_id").alias("num_items_with_pairs"),
            F.count_if(F.col("trigger_item_id").isNull() | F.col("target_item_id").isNull()).alias("num_null_keys"),
            F.count_if(F.col("trigger_item_id") == F.col("target_item_id")).alias("num_self_pairs"),
            F.coalesce(F.min("weight"), F.lit(0.0)).alias("min_weight"),
            F.count_if(F.isnan(weight) | weight.isin(float("inf"), float("-inf"))).alias("num_nonfinite"),
        )
    )
    duplicates = row["num_pairs"] - written.select(*CO_ENGAGEMENT_PAIRS.key).distinct().count()
    num_daily = run.read_output(CO_ENGAGEMENT_DAILY).where(until).count()
    return row | {"num_daily_rows": num_daily, "num_duplicate_keys": duplicates}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, build_pairs, description="engagements to co-engagement pairs", argv=argv)


if __name__ == "__main__":
    main()
