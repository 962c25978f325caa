"""A night that adds to counted pairs against one that counts everything: 90 days of the click log, the last of them new; then late events.

What is timed is what a night does beyond what any night does (it compares days and makes popularity and scores anew either way): from
files of engagements to committed-ready files of days and totals. At the end the totals must equal those of a rebuild.
"""

import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyspark.sql import Row, SparkSession

from conf.errors import MachineError
from conf.settings import SparkSettings
from features.event_files import EventFiles
from features.increments import moved_days, stale_days, window_reach
from features.pair_files import KnownFile
from features.pair_kernels import text_hashes
from features.pairs import Counting, holdout_start, update_pairs, write_pairs
from jobs.bench_worlds import NUM_DAYS, START, Work
from jobs.session import start_session

Json = dict[str, Any]
_LAST = START.date() + timedelta(days=NUM_DAYS - 1)
_LATE_OF = 500  # one user in so many has events of the last week that come a night late
_KINDS = ("daily", "totals")


@dataclass(frozen=True, kw_only=True)
class _Events:
    """Engagements of a night: their files, items and number per day."""

    files: EventFiles
    items: pa.Array
    days: Mapping[date, int]

    @classmethod
    def write(cls, rows: ds.Dataset, wanted: ds.Expression, folder: Path) -> "_Events":
        """Those of a data set that are wanted, as ingest would lay them: by day."""
        table = rows.to_table(filter=wanted).sort_by("event_date")
        ds.write_dataset(
            table, folder, format="parquet", max_rows_per_file=4_000_000, max_rows_per_group=500_000, min_rows_per_group=500_000
        )
        counts = table["event_date"].value_counts().to_pylist()
        sizes = {str(path.absolute()): path.stat().st_size for path in folder.glob("*.parquet")}
        days = {day["values"]: day["counts"] for day in counts}
        return cls(files=EventFiles(sizes=sizes), items=table["item_id"].unique().sort(), days=days)


@dataclass(kw_only=True)
class _Lake:
    """Files of days and totals, and which are current."""

    folder: Path
    files: dict[str, dict[str, KnownFile]] = field(default_factory=lambda: {kind: {} for kind in _KINDS})

    @property
    def folders(self) -> dict[str, str]:
        for kind in _KINDS:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        return {kind: str((self.folder / kind).absolute()) for kind in _KINDS}

    def change(self, files: Sequence[Row], removed: Mapping[str, Collection[str]]) -> None:
        """Take written files in, and replaced ones out."""
        for kind, folder in self.folders.items():
            gone = {f"{folder}/{name}" for name in removed.get(kind, ())}
            known = (KnownFile.of(file) for file in files if file["kind"] == kind)
            new = dict(zip((f"{folder}/{file['name']}" for file in files if file["kind"] == kind), known, strict=True))
            self.files[kind] = {uri: file for uri, file in self.files[kind].items() if uri not in gone} | new

    def content(self) -> tuple[Any, ...]:
        """Pairs, a hash of the counts, user-days, and weights to 8 digits; number of totals last."""
        query = """select count(*), bit_xor(hash(trigger_item_id, target_item_id, num_user_days)), sum(num_user_days),
                   round(log(sum(weight)), 8), round(log(sum(fit_weight) + 1), 8) from read_parquet($1)"""
        found = duckdb.execute(query, [list(self.files["totals"])]).fetchone()
        assert found is not None  # an aggregate without groups has one row
        return found


def bench_night(work: Work, folder: Path) -> Iterator[Json]:
    """Rows of the benchmark: `mtmh` adds a day, `mtmh_late` late events too, `rebuild` starts from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    log, day = ds.dataset(work.folder), ds.field("event_date")
    week = (day >= _LAST - timedelta(days=7)) & (day < _LAST)
    users = pc.unique(log.to_table(columns=["user_id"])["user_id"].cast(pa.string()))
    late = week & ds.field("user_id").isin(users.filter(pa.array(text_hashes(users) % _LATE_OF == 0)))
    before, on_time, all_ = (
        _Events.write(log, wanted, folder / name)
        for name, wanted in (("before", (day < _LAST) & ~late), ("on_time", ~late), ("all", pc.scalar(True)))
    )
    changed = {now for now in all_.days if all_.days[now] != on_time.days.get(now)}
    spark, mine, rebuilt = (
        start_session(SparkSettings(), app_name="bench night"),
        _Lake(folder=folder / "mine"),
        _Lake(folder=folder / "anew"),
    )
    _rebuild(spark, before, work, mine)  # warms up, too
    seconds, touched = {}, {}
    seconds["mtmh"], touched["mtmh"] = _add(spark, on_time, {_LAST}, _holdout(before), work, mine)
    seconds["mtmh_late"], touched["mtmh_late"] = _add(spark, all_, changed, _holdout(on_time), work, mine)
    seconds["rebuild"] = _rebuild(spark, all_, work, rebuilt)
    if mine.content() != rebuilt.content():
        raise MachineError(f"the nights add up to {mine.content()}, a rebuild to {rebuilt.content()}: a defect of update_pairs, report it")
    spark.stop()
    all_pairs = rebuilt.content()[0]
    for method, value in seconds.items():
        share = touched.get(method, all_pairs) / all_pairs
        note = f"{value / seconds['rebuild']:.0%} of a rebuild; {share:.1%} of pairs touched"
        times = {"median_s": value, "min_s": value, "max_s": value, "runs": 1}
        yield {"work": f"night of {work.name}", "size": work.size, "method": method, "note": note} | times


def _holdout(events: _Events) -> date:
    """First day of the calibration slice of a night."""
    return holdout_start(events.days, holdout_share=0.1, run_date=max(events.days))


def _counting(work: Work) -> Counting:
    return Counting(window=work.window, max_items_per_user_day=200, max_triggers_per_target=500, min_users=2, hash_key=b"bench")


def _decay(events: _Events) -> Json:
    return {"landmark": START.date(), "half_life_days": 30.0, "holdout_from": _holdout(events), "items": events.items}


def _rebuild(spark: SparkSession, events: _Events, work: Work, lake: _Lake) -> float:
    begin = time.monotonic()
    files = write_pairs(spark, events.files, _counting(work), days=events.days, folders=lake.folders, **_decay(events)).collect()
    seconds = time.monotonic() - begin
    lake.change(files, {})
    return seconds


def _add(spark: SparkSession, events: _Events, changed: Collection[date], holdout: date, work: Work, lake: _Lake) -> tuple[float, int]:
    """Seconds of a second run, as the rebuild's are, and the totals that are others than before."""
    reach = window_reach(work.window, longest_session_days=1)
    stale = stale_days(changed, events.days.keys(), reach_days=reach)
    rule: Json = {
        "days": {day: num for day, num in events.days.items() if day in stale},
        "stale": stale,
        "moved": moved_days(holdout, _holdout(events)),
        "reach_days": reach,
        "known": events.days,
        "before": lake.files,
        "folders": lake.folders,
        **_decay(events),
    }
    update_pairs(spark, events.files, _counting(work), **rule)
    begin = time.monotonic()
    changes = update_pairs(spark, events.files, _counting(work), **rule)
    seconds = time.monotonic() - begin
    lake.change(changes.files, changes.removed)
    return seconds, changes.num_touched
