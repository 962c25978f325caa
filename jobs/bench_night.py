"""An incremental night against a rebuild: 90 days of the click log, the last of them added by a night that builds on the one before.

The whole stage is timed, with popularity, scores, gate and Delta commits. Then some events of the last week come late, and that night is
timed, too. At the end the totals of the nights must equal the rebuilt ones.
"""

import shutil
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.errors import MachineError
from conf.settings import Settings, load_settings
from conf.tables import CO_ENGAGEMENT_TOTALS, ENGAGEMENTS
from jobs.bench_worlds import NUM_DAYS, START, Work
from jobs.build_pairs import build_pairs
from jobs.ledger import StageRecord
from jobs.progress import Display
from jobs.session import start_session
from jobs.stage import StageRun, make_night, run_stage

Json = dict[str, Any]
_LATE_OF = 500  # one session in so many of the last week comes a night late


def bench_night(work: Work, folder: Path) -> Iterator[Json]:
    """Rows of the benchmark: `mtmh` adds a day, `mtmh_late` late events too, `rebuild` starts from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    assignments = [f"lake.root={folder}", "pairs.half_life_days=30", "pairs.holdout_share=0.1", "pairs.rebuild_below=0"]
    settings = load_settings("demo", assignments)
    last = START.date() + timedelta(days=NUM_DAYS - 1)
    spark = start_session(settings.spark, app_name="bench night")
    events = spark.read.parquet(str(work.folder))
    week = F.col("event_date").between(F.lit(last - timedelta(days=7)), F.lit(last - timedelta(days=1)))
    on_time = events.where(~(week & (F.pmod(F.xxhash64("session_id"), F.lit(_LATE_OF)) == 0)))
    _night(settings, last - timedelta(days=1), on_time)
    records = {
        "mtmh": _night(settings, last, on_time),
        "mtmh_late": _night(settings, last, events),
    }
    totals = spark.read.format("delta").load(f"{settings.lake.root}/{CO_ENGAGEMENT_TOTALS.name}")
    mine = _content(totals)
    records["rebuild"] = _night(settings, last, events, force=True)
    rebuilt = _content(totals)
    if mine != rebuilt:
        raise MachineError(f"the nights add up to {mine}, a rebuild to {rebuilt}: a defect of build_pairs, report it")
    spark.stop()
    for method, record in records.items():
        yield _row(work, method, record, records["rebuild"])


def _night(settings: Settings, run_date: date, events: DataFrame, *, force: bool = False) -> StageRecord:
    night = make_night(settings, run_date, spark=events.sparkSession, display=Display(seconds_per_line=60))

    def ingest(run: StageRun) -> None:
        taken = events.where(F.col("event_date") <= F.lit(run_date))
        run.replace(ENGAGEMENTS, taken, where=f"event_date <= '{run_date}'")

    run_stage(night, "ingest", ingest, force=True)
    return run_stage(night, "build_pairs", build_pairs, force=force)


def _content(totals: DataFrame) -> tuple[int, int, int, float, float]:
    """Pairs, a hash of the counts, user-days, and weights to 8 digits."""
    row = totals.agg(
        F.count(F.lit(1)),
        F.bit_xor(F.xxhash64("trigger_item_id", "target_item_id", "num_user_days")),
        F.sum("num_user_days"),
        F.sum("weight"),
        F.sum("fit_weight"),
    ).first()
    assert row is not None  # an aggregate without groups has one row
    return (row[0], row[1], row[2], float(f"{row[3]:.8g}"), float(f"{row[4]:.8g}"))


def _row(work: Work, method: str, record: StageRecord, rebuild: StageRecord) -> Json:
    shares = {name: record.metrics[name] for name in ("recounted_days_share", "touched_pairs_share")}
    said = ", ".join(f"{value:.1%} of {name.split('_')[1]} {name.split('_')[0]}" for name, value in shares.items())
    times = {"median_s": record.seconds, "min_s": record.seconds, "max_s": record.seconds, "runs": 1}
    note = f"{record.seconds / rebuild.seconds:.0%} of a rebuild; {said}"
    return {"work": f"night of {work.name}", "size": work.size, "method": method} | times | shares | {"note": note}
