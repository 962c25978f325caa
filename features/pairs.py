"""Co-engagement counted per day, added up with decay, and the popularity of items that both are compared with.

A pair (trigger i, target j) belongs to the UTC day of the target: a user who buys bread on Monday 23:59 and butter in the same session
on Tuesday 00:01 gives (bread, butter) on Tuesday. A user counts once per pair and day. Weights are in landmark form: a day d adds
users * 2^((d - landmark) / half_life_days), so that the weight as of any later day is one factor at read time.

Only engagements are shuffled, never pairs, as blocks of numbers: first by user (`features.windows`), then as windows by the items of a
pair, to tasks that expand and count them in numpy (`features.pair_counts`). A self-join in Spark would shuffle every single co-engagement.

Association scores of a pair are functions of the table's own rows and of item_popularity, but for swing, which looks at single users
(`features.swing`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from conf.errors import SettingsError, SourceError
from conf.settings import WindowSettings
from conf.tables import CO_ENGAGEMENT_DAILY, ITEM_POPULARITY
from features.changed_pairs import DROPPED_SCHEMA, Gains, Touched, drop_days, renew_totals, rows_of_touched, write_totals
from features.event_files import PART_SCHEMA, EventFiles, EventRule, deal, deal_files, read_events
from features.pair_counts import CountRule, count_cells, decoded_days
from features.pair_files import FILE_SCHEMA, KnownFile, day_spans, write_counted
from features.pair_kernels import EPOCH, LEAST_EXPONENT, PACKED_SCHEMA, day_number, encode
from features.pair_scores import ItemTotals, read_totals, write_scored
from features.pair_totals import (
    PARTNER_SCHEMA,
    TotalRule,
    count_partners,
    pack_by_pair,
    pack_by_trigger,
    strongest_pairs,
    total_pairs,
)
from features.swing import UserItems, index_user_items
from features.windows import CUT_SCHEMA, WindowRule, classes_for, make_windows, measure_cuts, pack_by_user

if TYPE_CHECKING:
    from pyspark import Broadcast

Transform = Callable[[DataFrame], DataFrame]
Batches = Iterable[pa.RecordBatch]
Shared: TypeAlias = "Broadcast[pa.Array]"
"""Ids of all items, broadcast."""

_ORDERS = (("trigger_item_id", "target_item_id"), ("target_item_id", "trigger_item_id"))
_SECONDS_PER_DAY = 86_400
_FIRST_DAY = -(2**31)
_ENGAGEMENTS_PER_TASK = 50_000  # a late day of a few hundred engagements is one file, not sixteen
_ENGAGEMENTS_PER_CELL = 2_000_000  # some 5 to 30 million pairs
_TASK_BYTES = 16 << 20  # of files of pairs that a task holds
_SCANNED_BYTES = 64 << 20  # of those that it looks through, row group by row group
_PAIRS_PER_TASK = 200_000  # touched pairs
_BUCKET_EVENTS = 2_000_000  # engagements of users that a task holds: some 0.5 GB with what is derived from them
_MAX_EXPONENT = 500  # 2^1023 is the largest double: sums need room above a single day's factor
_DAILY_SCHEMA = ", ".join(f"{column.name} {column.type}" for column in CO_ENGAGEMENT_DAILY.columns)


def sum_user_items(*, landmark: date, half_life_days: float, holdout_from: date, run_date: date) -> Transform:
    """Engagements to one row per user and item ever engaged up to the run date: what popularity and swing are made of.

    Columns item_id, user_id, weight (landmark form of days), num_user_days, fit_weight, first_engaged_date, last_engaged_date.

    Raises:
        SettingsError: the landmark lies so far back that weights would overflow.
    """
    check_landmark(landmark, half_life_days, run_date)

    def transform(engagements: DataFrame) -> DataFrame:
        events = engagements.where(F.col("event_date") <= F.lit(run_date)).select("item_id", "user_id", "event_date")
        user_days = events.repartition("item_id", "user_id").distinct()  # one exchange for both: distinct days, and their sums
        weight = decay(F.col("event_date"), landmark, half_life_days)
        return user_days.groupBy("item_id", "user_id").agg(
            F.sum(weight).alias("weight"),
            F.count(F.lit(1)).alias("num_user_days"),
            F.sum(F.when(F.col("event_date") < F.lit(holdout_from), weight).otherwise(0.0)).alias("fit_weight"),
            F.min("event_date").alias("first_engaged_date"),
            F.max("event_date").alias("last_engaged_date"),
        )

    return transform


def count_popularity(*, landmark: date, holdout_from: date, run_date: date) -> Transform:
    """Rows of `sum_user_items` to item_popularity: every item engaged with up to the run date."""

    def transform(engaged: DataFrame) -> DataFrame:
        totals = engaged.groupBy("item_id").agg(
            *(F.sum(name).alias(name) for name in ("weight", "num_user_days", "fit_weight")),
            F.count(F.lit(1)).alias("num_users"),
            F.min("first_engaged_date").alias("first_engaged_date"),
            F.max("last_engaged_date").alias("last_engaged_date"),
        )
        return _dated(totals, landmark, holdout_from, run_date).select(*ITEM_POPULARITY.column_names)

    return transform


@dataclass(frozen=True, kw_only=True)
class Counting:
    """How co-engagement is counted, whatever the days.

    Raises:
        SettingsError: the key is empty.
    """

    window: WindowSettings
    max_items_per_user_day: int
    """Distinct items of a user and day (or session) that take part; the smallest keyed hashes of (user, day or session, item) stay."""
    max_triggers_per_target: int
    """Engagements of a user right before a target, by time and item, that may be its triggers; session windows have no such cap."""
    min_users: int
    """User hashes kept per pair and day."""
    hash_key: bytes
    """Secret key of the user hashes; one key for the life of the table, as hashes of different days are compared."""

    def __post_init__(self) -> None:
        if not self.hash_key:
            raise SettingsError("the key of the user hashes is empty; set the environment variable that pairs.user_hash_key_env names")

    def rule(self, days: Collection[date], num_classes: int) -> WindowRule:
        """The same for the kernels."""
        window = self.window
        return WindowRule(
            kind=window.kind,
            window_micros=None if window.window_seconds is None else window.window_seconds * 1_000_000,
            max_distance=window.max_distance,
            symmetric=window.symmetric,
            max_items=self.max_items_per_user_day,
            max_triggers=self.max_triggers_per_target,
            hash_key=self.hash_key,
            days=np.array(sorted(map(day_number, days)), dtype=np.int64),
            num_classes=num_classes,
        )


def count_daily_pairs(
    counting: Counting, *, days: Mapping[date, int], items: pa.Array | None = None, num_tasks: int | None = None
) -> Transform:
    """Engagements to co_engagement_daily for some target days.

    Earlier engagements may be triggers and must be among the input as far back as the window reaches; it is pruned here. The result
    of a day does not depend on the other days it is counted with, on later days, on the order of rows or on the number of partitions.
    Rows come out sorted by day inside each pass of a partition. Of a symmetric window, a pair is there once, with the smaller id as the
    trigger: `both_orders` adds its mirror image.

    Args:
        counting: how.
        days: target days and the engagements of each.
        items: ids of all items, ascending; None: they are looked up.
        num_tasks: tasks, and so output files; None: as many as the engagements ask for, at most twice `spark.sql.shuffle.partitions`.

    Raises:
        SettingsError: there are no days.
    """
    _check_days(days)

    def transform(engagements: DataFrame) -> DataFrame:
        recent = engagements.transform(_of_days(counting.window, days))
        shared = _shared(recent, items)
        blocks = recent.transform(_by_user(counting.window, days, shared))
        rule = CountRule(symmetric=counting.window.symmetric, min_users=counting.min_users)
        return _cells(blocks, counting, days, shared, num_tasks).mapInArrow(partial(_decoded, shared=shared, rule=rule), _DAILY_SCHEMA)

    return transform


def write_pairs(
    spark: SparkSession,
    events: EventFiles,
    counting: Counting,
    *,
    days: Mapping[date, int],
    items: pa.Array,
    landmark: date,
    half_life_days: float,
    holdout_from: date,
    folders: Mapping[str, str],
    num_tasks: int | None = None,
) -> DataFrame:
    """co_engagement_daily and co_engagement_totals at once, from files of engagements to files of pairs; rows of `FILE_SCHEMA`.

    What `count_daily_pairs` makes of all days up to the last one, and the sums of it.

    Args:
        spark: whose tasks read, count and write.
        events: all engagements.
        counting: how.
        days: all days that have engagements, up to the last that counts, and how many each has.
        items: ids of all items, ascending.
        landmark: day d0 of the weights.
        half_life_days: days after which a co-engagement counts half.
        holdout_from: days from here on do not enter fit_weight.
        folders: path or URI of the tables, by the kinds `daily` and `totals`; without `daily`, no rows of days are made.
        num_tasks: as in `count_daily_pairs`.

    Raises:
        SettingsError: there are no days.
    """
    _check_days(days)
    shared = spark.sparkContext.broadcast(items)
    blocks = _read_by_user(spark, events, counting.window, days, shared)
    totals = _total_rule(landmark, half_life_days, holdout_from, counting.min_users)
    rule = CountRule(symmetric=counting.window.symmetric, min_users=counting.min_users, totals=totals, daily="daily" in folders)
    cells = _cells(blocks, counting, days, shared, num_tasks)
    return cells.mapInArrow(partial(_written, shared=shared, rule=rule, folders=folders, spans=day_spans(days)), FILE_SCHEMA)


@dataclass(frozen=True, kw_only=True)
class PairChanges:
    """What has become of the files of pairs: rows of `FILE_SCHEMA` for those written, paths below the table's folder of those replaced, by
    kind, and how many totals are others than before.
    """

    files: Sequence[Row]
    removed: Mapping[str, Collection[str]]
    num_touched: int


def update_pairs(
    spark: SparkSession,
    events: EventFiles,
    counting: Counting,
    *,
    days: Mapping[date, int],
    stale: Collection[date],
    moved: Collection[date],
    reach_days: int | None,
    known: Mapping[date, int],
    items: pa.Array,
    landmark: date,
    half_life_days: float,
    holdout_from: date,
    before: Mapping[str, Mapping[str, KnownFile]],
    folders: Mapping[str, str],
    num_tasks: int | None = None,
) -> PairChanges:
    """co_engagement_daily and co_engagement_totals of a night from those of the night before: what `write_pairs` would make of all days.

    Args:
        spark: whose tasks read, count and write.
        events: all engagements.
        counting: how.
        days: engagements of the stale days that have some.
        stale: days whose rows may differ from those of the night before.
        moved: days that left or entered the holdout since.
        reach_days: days before a target day within which its triggers lie; None: any number.
        known: engagements of each day.
        items: ids of all items, ascending.
        landmark: day d0 of the weights, as in the night before.
        half_life_days: as in the night before.
        holdout_from: days from here on do not enter fit_weight.
        before: by kind, `daily` and `totals`, the files of the night before by path or URI.
        folders: as in `write_pairs`.
        num_tasks: as in `count_daily_pairs`.
    """
    daily, added = folders["daily"], list[Row]()
    if days:
        shared = spark.sparkContext.broadcast(items)
        blocks = _read_by_user(spark, events, counting.window, days, shared, known=known, reach_days=reach_days)
        rule = CountRule(symmetric=counting.window.symmetric, min_users=counting.min_users)
        written = partial(_written, shared=shared, rule=rule, folders=folders, spans=day_spans(days))
        added = _cells(blocks, counting, days, shared, num_tasks).mapInArrow(written, FILE_SCHEMA).collect()
    new = {f"{daily}/{row['name']}": KnownFile(row["size"]) for row in added}
    affected = new | {uri: file for uri, file in before["daily"].items() if file.may_hold({*stale, *moved})}
    totals = _total_rule(landmark, half_life_days, holdout_from, counting.min_users)
    days_of: dict[str, Any] = {"recounted": _numbers(stale), "moved": _numbers(moved), "holdout_from": totals.holdout_from}
    drop = partial(drop_days, folder=daily, added=frozenset(row["name"] for row in added), **days_of)
    dropped = _by_files(spark, affected).mapInArrow(drop, DROPPED_SCHEMA).collect() if affected else []
    gone = {row["replaces"] for row in dropped} - {None}
    files = [*added, *(row for row in dropped if row["name"])]
    gains = Gains.of([row["pairs"] for row in dropped if row["pairs"]], totals)
    if not len(gains.pairs.keys):
        return PairChanges(files=files, removed={"daily": gone, "totals": set()}, num_touched=0)
    now = {uri: file for uri, file in before["daily"].items() if uri.removeprefix(f"{daily}/") not in gone}
    now |= {f"{daily}/{row['name']}": KnownFile(row["size"]) for row in files}
    renewed = _renew(spark, before["totals"], gains, folder=folders["totals"], symmetric=counting.window.symmetric)
    open_ = gains.without([row["pairs"] for row in renewed if row["pairs"] is not None])
    summed = _add_up(spark, now, open_, counting, totals, folders["totals"])
    num_settled = (2 if counting.window.symmetric else 1) * (len(gains.pairs.keys) - len(open_.keys))
    return PairChanges(
        files=[*files, *summed, *(row for row in renewed if row["name"])],
        removed={"daily": gone, "totals": {row["replaces"] for row in renewed} - {None}},
        num_touched=num_settled + sum(row["num_rows"] for row in summed),
    )


def _renew(spark: SparkSession, totals: Mapping[str, KnownFile], gains: Gains, *, folder: str, symmetric: bool) -> list[Row]:
    """What the files of totals are with what their pairs have gained, and which pairs that settles."""
    if not totals:
        return []
    shared = spark.sparkContext.broadcast(gains)
    renew = partial(_renewed, shared=shared, folder=folder, symmetric=symmetric)
    return _by_files(spark, totals).mapInArrow(renew, DROPPED_SCHEMA).collect()


def _add_up(
    spark: SparkSession, daily: Mapping[str, KnownFile], touched: Touched, counting: Counting, rule: TotalRule, folder: str
) -> list[Row]:
    """Files of the totals of some pairs, added up from all their days."""
    if not len(touched.keys):
        return []
    shared = spark.sparkContext.broadcast(touched)
    tasks = max(1, min(2 * _shuffle_partitions(spark), ceil(len(touched.keys) / _PAIRS_PER_TASK)))
    blocks = _by_files(spark, daily, _SCANNED_BYTES).mapInArrow(partial(_touched_blocks, shared=shared, num_buckets=tasks), PACKED_SCHEMA)
    add_up = partial(_added_up, rule=rule, symmetric=counting.window.symmetric, folder=folder)
    return blocks.repartitionById(tasks, F.col("bucket")).mapInArrow(add_up, FILE_SCHEMA).collect()


def _numbers(days: Collection[date]) -> list[int]:
    return [day_number(day) for day in days]


def _by_files(spark: SparkSession, files: Mapping[str, KnownFile], task_bytes: int = _TASK_BYTES) -> DataFrame:
    """Paths or URIs of some files, at least one, dealt to tasks of about one size."""
    uris = sorted(files)
    tasks = deal([files[uri].size for uri in uris], most=task_bytes)
    dealt = spark.createDataFrame(list(zip(tasks, uris, strict=True)), "task int, uri string")
    return dealt.repartitionById(tasks[-1] + 1, F.col("task")).select("uri")


def _touched_blocks(batches: Batches, *, shared: Any, num_buckets: int) -> Iterator[pa.RecordBatch]:
    return pack_by_pair(rows_of_touched(batches, touched=shared.value), num_buckets=num_buckets)


def _added_up(batches: Batches, *, rule: TotalRule, symmetric: bool, folder: str) -> Iterator[pa.RecordBatch]:
    return write_totals(total_pairs(batches, rule=rule, symmetric=symmetric), folder=folder)


def _renewed(batches: Batches, *, shared: Any, folder: str, symmetric: bool) -> Iterator[pa.RecordBatch]:
    return renew_totals(batches, folder=folder, gains=shared.value, symmetric=symmetric)


def _check_days(days: Collection[date]) -> None:
    if not days:
        raise SettingsError("no days to count; name at least one target day")


def _cells(blocks: DataFrame, counting: Counting, days: Mapping[date, int], shared: Shared, num_tasks: int | None) -> DataFrame:
    """Blocks of windows, all of a cell with one task, from blocks of engagements by user."""
    num_events = sum(days.values())
    tasks = num_tasks or _num_tasks(blocks.sparkSession, num_events)
    num_cells = max(tasks, ceil(num_events / _ENGAGEMENTS_PER_CELL))
    rule = counting.rule(days, classes_for(num_cells, symmetric=counting.window.symmetric))
    cells = blocks.mapInArrow(partial(_made, shared=shared, rule=rule), PACKED_SCHEMA)
    return cells.repartitionById(tasks, F.col("bucket") % tasks)


def _num_tasks(spark: SparkSession, num_events: int) -> int:
    return max(1, min(2 * _shuffle_partitions(spark), ceil(num_events / _ENGAGEMENTS_PER_TASK)))


def _shared(events: DataFrame, items: pa.Array | None) -> Shared:
    return events.sparkSession.sparkContext.broadcast(all_items(events) if items is None else items)


def all_items(engagements: DataFrame) -> pa.Array:
    """Ids of all items engaged with, ascending in bytes."""
    return encode(engagements.select("item_id").distinct().toArrow()["item_id"])[1]


def _packed(batches: Batches, *, shared: Shared, num_buckets: int) -> Iterator[pa.RecordBatch]:
    return pack_by_user(batches, items=shared.value, num_buckets=num_buckets)


def _packed_files(parts: Batches, *, rule: EventRule, shared: Shared, num_buckets: int) -> Iterator[pa.RecordBatch]:
    return pack_by_user(read_events(parts, rule=rule, num_buckets=num_buckets), items=shared.value, num_buckets=num_buckets)


def _made(batches: Batches, *, shared: Shared, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    return make_windows(batches, items=shared.value, rule=rule)


def _cut(batches: Batches, *, shared: Shared, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    return measure_cuts(batches, items=shared.value, rule=rule)


def _decoded(batches: Batches, *, shared: Shared, rule: CountRule) -> Iterator[pa.RecordBatch]:
    return decoded_days(count_cells(batches, items=shared.value, rule=rule))


def _written(batches: Batches, *, shared: Shared, rule: CountRule, **files: Any) -> Iterator[pa.RecordBatch]:
    return write_counted(count_cells(batches, items=shared.value, rule=rule), **files)


def measure_days(
    spark: SparkSession,
    events: EventFiles,
    counting: Counting,
    *,
    days: Mapping[date, int],
    items: pa.Array,
    known: Mapping[date, int] | None = None,
    reach_days: int | None = None,
) -> DataFrame:
    """One row per target day that says what the cap cuts from it; the arguments are those of `write_pairs` and `update_pairs`.

    Columns event_date, num_capped_groups (user-days, or sessions up to the day), num_cut_items (distinct items of these that take no
    part). A day from which nothing is cut has no row.
    """
    shared = spark.sparkContext.broadcast(items)
    blocks = _read_by_user(spark, events, counting.window, days, shared, known=known, reach_days=reach_days)
    cuts = blocks.mapInArrow(partial(_cut, shared=shared, rule=counting.rule(days, 1)), CUT_SCHEMA)
    sums = [F.sum(name).alias(name) for name in ("num_capped_groups", "num_cut_items")]
    return cuts.groupBy(F.date_from_unix_date("day").alias("event_date")).agg(*sums)


def collect_user_items(engaged: DataFrame, *, hash_key: bytes, max_users: int) -> UserItems:
    """Who ever engaged what: what swing needs of single users.

    It passes through the driver and then to each worker: 8 bytes per distinct user and item, and the ids.

    Args:
        engaged: rows of `sum_user_items`.
        hash_key: secret key of the user hashes.
        max_users: users that count per trigger; those with the smallest keyed hashes.
    """
    return index_user_items(engaged.select("user_id", "item_id").toArrow(), hash_key=hash_key, max_users=max_users)


def write_scores(
    spark: SparkSession,
    totals: Mapping[str, KnownFile],
    popularity: DataFrame,
    user_items: UserItems,
    *,
    landmark: date,
    holdout_from: date,
    max_pairs_per_trigger: int,
    run_date: date,
    folder: str,
    num_tasks: int | None = None,
) -> list[Row]:
    """co_engagement_totals to co_engagement_pairs, from files to files; rows of `FILE_SCHEMA`.

    `conditional` is the share among all pairs of the trigger, before the cut to `max_pairs_per_trigger` (heaviest first, ties by
    target id).

    Args:
        spark: whose tasks read, score and write.
        totals: files of co_engagement_totals by path or URI.
        popularity: item_popularity as of the same run date and landmark; the denominators.
        user_items: who ever engaged what up to the same run date.
        landmark: as in the totals.
        holdout_from: as in the totals.
        max_pairs_per_trigger: pairs kept.
        run_date: as of which day the totals are.
        folder: path or URI of co_engagement_pairs.
        num_tasks: tasks; None: twice `spark.sql.shuffle.partitions`. Each holds the totals of its triggers in memory.
    """
    if not totals:
        return []
    tasks = num_tasks or 2 * _shuffle_partitions(spark)
    blocks = _by_files(spark, totals).mapInArrow(partial(_totals_by_trigger, num_buckets=tasks), PACKED_SCHEMA)
    strongest = partial(strongest_pairs, max_pairs=max_pairs_per_trigger)
    strong = blocks.repartitionById(tasks, F.col("bucket")).mapInArrow(strongest, PACKED_SCHEMA).persist(StorageLevel.DISK_ONLY)
    try:
        parts = strong.mapInArrow(count_partners, PARTNER_SCHEMA)
        partners = parts.groupBy("item_id").agg(*(F.sum(name).alias(name) for name in ("num_triggers", "num_user_days")))
        items = ItemTotals.of(popularity.select("item_id", "weight", "num_user_days").toArrow(), partners.toArrow())
        shared = spark.sparkContext.broadcast((items, user_items))
        dates = {"landmark_date": landmark, "holdout_from": holdout_from, "as_of": run_date}
        return strong.mapInArrow(partial(_scored, shared=shared, folder=folder, dates=dates), FILE_SCHEMA).collect()
    finally:
        strong.unpersist()


def _totals_by_trigger(batches: Batches, *, num_buckets: int) -> Iterator[pa.RecordBatch]:
    return pack_by_trigger(read_totals(batches), num_buckets=num_buckets)


def _scored(batches: Batches, *, shared: Any, **where: Any) -> Iterator[pa.RecordBatch]:
    items, user_items = shared.value
    return write_scored(batches, items=items, user_items=user_items, **where)


def holdout_start(num_engagements: Mapping[date, int], *, holdout_share: float, run_date: date) -> date:
    """First day of the shortest run of last days that holds `holdout_share` of the engagements up to the run date.

    It is before the run date, and after the first day with engagements, so that both sides hold something; where both cannot be,
    the second wins. With a single day of engagements it is that day.

    Args:
        num_engagements: by day.
        holdout_share: of all engagements up to the run date.
        run_date: later days are ignored.

    Raises:
        SourceError: there are no engagements.
    """
    days = sorted(day for day, num in num_engagements.items() if num and day <= run_date)
    if not days:
        raise SourceError(f"no engagements up to {run_date}; choose a later --run-date or check source.events")
    if len(days) == 1:
        return days[0]
    wanted = holdout_share * sum(num_engagements[day] for day in days)
    held, start = 0, len(days)
    while held < wanted:
        start -= 1
        held += num_engagements[days[start]]
    return max(days[1], min(days[start], run_date - timedelta(days=1)))


def engagements_per_day(engagements: DataFrame) -> dict[date, int]:
    """Rows by event_date."""
    return {row["event_date"]: row["count"] for row in engagements.groupBy("event_date").count().collect()}


def both_orders(pairs: DataFrame) -> DataFrame:
    """Rows of (trigger_item_id, target_item_id, ...) of a symmetric window, each with its mirror image."""
    mirrored = F.inline(F.array(*(F.struct(F.col(i).alias("trigger_item_id"), F.col(j).alias("target_item_id")) for i, j in _ORDERS)))
    others = [name for name in pairs.columns if name not in _ORDERS[0]]
    return pairs.select(*others, mirrored)


def future_pairs(daily: DataFrame, *, symmetric: bool) -> DataFrame:
    """co_engagement_daily to (trigger_item_id, target_item_id, num_user_days): what happened, for judging lists."""
    summed = daily.groupBy("trigger_item_id", "target_item_id").agg(F.sum("num_users").alias("num_user_days"))
    return both_orders(summed) if symmetric else summed


def check_landmark(landmark: date, half_life_days: float, run_date: date) -> None:
    """Raise SettingsError where weights as of the run date would overflow."""
    exponent = (run_date - landmark).days / half_life_days
    if exponent > _MAX_EXPONENT:
        raise SettingsError(
            f"landmark {landmark} is {exponent:.0f} half-lives before {run_date}, at most {_MAX_EXPONENT} keep weights in range; "
            "choose a later landmark or a longer pairs.half_life_days"
        )


def decay(day: Column, landmark: date, half_life_days: float) -> Column:
    """What a day weighs against the landmark: 2^((day - landmark) / half life), never 0."""
    exponent = F.datediff(day, F.lit(landmark)) / F.lit(float(half_life_days))
    return F.pow(F.lit(2.0), F.greatest(exponent, F.lit(LEAST_EXPONENT)))


def _dated(frame: DataFrame, landmark: date, holdout_from: date, run_date: date) -> DataFrame:
    dates = {"landmark_date": landmark, "holdout_from": holdout_from, "as_of": run_date}
    return frame.withColumns({name: F.lit(day) for name, day in dates.items()})


def _total_rule(landmark: date, half_life_days: float, holdout_from: date, min_users: int) -> TotalRule:
    days = {"landmark": day_number(landmark), "holdout_from": day_number(holdout_from)}
    return TotalRule(half_life_days=half_life_days, min_users=min_users, **days)


def _shuffle_partitions(spark: SparkSession) -> int:
    """The session's setting: the explicit numbers here keep adaptive execution from merging tasks whose input is small but whose
    output, pairs, is not.
    """
    return int(spark.conf.get("spark.sql.shuffle.partitions") or 1)


def _of_days(window: WindowSettings, days: Collection[date]) -> Transform:
    """Engagements that can take part in a pair of the days: by date where the window has seconds, else by session or user."""

    def transform(engagements: DataFrame) -> DataFrame:
        events = engagements.where(F.col("event_date") <= F.lit(max(days)))
        recent = where_days(days)
        if window.kind == "session":
            keys = ["user_id", "session_id"]
            return events.join(events.where(recent).select(*keys).distinct(), on=keys, how="left_semi")
        if window.window_seconds is not None:
            lookback = range(ceil(window.window_seconds / _SECONDS_PER_DAY) + 1)
            return events.where(where_days({day - timedelta(days=back) for day in days for back in lookback}))
        return events.join(events.where(recent).select("user_id").distinct(), on="user_id", how="left_semi")

    return transform


def _by_user(window: WindowSettings, days: Mapping[date, int], shared: Shared) -> Transform:
    """Blocks of engagements, all of a user with one task; those without a session form no session windows."""

    def transform(events: DataFrame) -> DataFrame:
        buckets = _num_buckets(events.sparkSession, days)
        time, day = F.unix_micros("engaged_at").alias("time"), F.unix_date("event_date").alias("day")
        by_session = window.kind == "session"
        if by_session:
            events = events.where(F.col("session_id").isNotNull())
        bucket = F.pmod(F.hash("user_id"), F.lit(buckets)).alias("bucket")
        rows = events.select(bucket, "user_id", *(["session_id"] if by_session else []), "item_id", day, time)
        blocks = rows.mapInArrow(partial(_packed, shared=shared, num_buckets=buckets), PACKED_SCHEMA)
        return blocks.repartitionById(buckets, F.col("bucket"))

    return transform


def _read_by_user(
    spark: SparkSession,
    events: EventFiles,
    window: WindowSettings,
    days: Mapping[date, int],
    shared: Shared,
    *,
    known: Mapping[date, int] | None = None,
    reach_days: int | None = None,
) -> DataFrame:
    """The same blocks, of files.

    Triggers of a target day may lie `reach_days` before it, None: on any day; `known` says how many engagements each day has, where the
    target days are not all of them.
    """
    last = day_number(max(days))
    runs = (
        ((_FIRST_DAY, last),) if reach_days is None else tuple(_runs({day_number(day) - n for day in days for n in range(reach_days + 1)}))
    )
    read = {day: num for day, num in (known or days).items() if any(first <= day_number(day) <= end for first, end in runs)}
    buckets = _num_buckets(spark, read)
    rule = EventRule(days=runs, actions=events.actions, by_session=window.kind == "session")
    parts = deal_files(events.sizes)
    dealt = spark.createDataFrame(parts, PART_SCHEMA).repartitionById(parts[-1].task + 1, F.col("task"))
    blocks = dealt.mapInArrow(partial(_packed_files, rule=rule, shared=shared, num_buckets=buckets), PACKED_SCHEMA)
    return blocks.repartitionById(buckets, F.col("bucket"))


def _runs(days: Collection[int]) -> list[tuple[int, int]]:
    """First and last of each run of days."""
    runs: list[tuple[int, int]] = []
    for day in sorted(days):
        if runs and day - runs[-1][1] == 1:
            runs[-1] = (runs[-1][0], day)
        else:
            runs.append((day, day))
    return runs


def _num_buckets(spark: SparkSession, days: Mapping[date, int]) -> int:
    num_events = sum(days.values())
    return max(_num_tasks(spark, num_events), ceil(num_events / _BUCKET_EVENTS))


def where_days(days: Collection[date]) -> str:
    """An SQL condition on event_date: one range per run of days."""
    runs = [(EPOCH + timedelta(days=first), EPOCH + timedelta(days=last)) for first, last in _runs([day_number(day) for day in days])]
    return " OR ".join(f"event_date BETWEEN DATE'{first}' AND DATE'{last}'" for first, last in runs) or "false"
