"""What a night has to do over: from what changed in `engagements` to the days and pairs that it touches.

A night knows, per day, a fingerprint of the engagements that the last good night counted. Whatever made a day differ (new, late,
corrected or deleted events, another user's history, a run date further back), its fingerprint tells. A changed day d touches the target
days d to d + reach, as far forward as the window reaches: these are counted again, whole. Of their rows only those that differ touch a
pair's total, and there are two ways to bring it up to date:

- a pair that had enough users before, and only gained rows, is its former total plus these rows;
- every other touched pair (new, or one that lost a row, or reaches the privacy minimum tonight) is added up again from all its days,
  as distinct users cannot be subtracted.

All other totals stay as they are: in landmark form a total does not change as it ages.

Worked example, sessions within a day, night of March 5: a late event of March 1 changes day 1 only. Days 1 and 5 are counted again; of
day 1 only the pairs with the late item differ.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from math import ceil

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import WindowSettings
from features.pairs import where_days

_PAIR = ["trigger_item_id", "target_item_id"]
_EVENT = ["user_id", "item_id", "action", "engaged_at", "session_id"]  # unique, and nothing else of an event decides a count
_SECONDS_PER_DAY = 86_400
_MAX_BROADCAST_PAIRS = 2_000_000  # some 200 MB in the JVM; above, both sides of a join are shuffled


@dataclass(frozen=True, kw_only=True)
class DayState:
    """The engagements of a day: how many, and a hash of all of them."""

    num_events: int
    fingerprint: str


def fingerprint_days(engagements: DataFrame) -> DataFrame:
    """Engagements to (event_date, num_events, fingerprint).

    The fingerprint is the exclusive or of 128 bits per event: no order of rows matters, no sum overflows, and since keys are unique no
    event can cancel another.
    """
    halves = [F.bit_xor(F.xxhash64(*salt, *map(F.col, _EVENT))) for salt in ([], [F.lit("second half")])]
    fingerprint = F.concat(*(F.lpad(F.hex(half), 16, "0") for half in halves))
    return engagements.groupBy("event_date").agg(F.count(F.lit(1)).alias("num_events"), fingerprint.alias("fingerprint"))


def changed_days(old: Mapping[date, DayState], new: Mapping[date, DayState]) -> set[date]:
    """Days whose engagements differ, days that came and days that went."""
    return {day for day in old.keys() | new.keys() if old.get(day) != new.get(day)}


def stale_days(changed: Collection[date], known: Collection[date], *, reach_days: int | None) -> set[date]:
    """The target days, among those with engagements now or before, whose counts a changed day can reach.

    Args:
        changed: days whose engagements differ.
        known: days with engagements, now or before.
        reach_days: how many days after a trigger its target can be; None: any number.
    """
    order = sorted(changed)
    stale = set()
    for day in known:
        before = bisect_right(order, day)
        if before and (reach_days is None or (day - order[before - 1]).days <= reach_days):
            stale.add(day)
    return stale


def window_reach(window: WindowSettings, *, longest_session_days: int) -> int | None:
    """Days after a trigger within which its target lies; None: there is no such bound.

    Args:
        window: which later engagements count.
        longest_session_days: days from the first to the last engagement of any session.
    """
    if window.kind == "session":
        return longest_session_days
    return None if window.window_seconds is None else ceil(window.window_seconds / _SECONDS_PER_DAY)


def longest_session(engagements: DataFrame, changed: Collection[date]) -> DataFrame:
    """Engagements to one row: `days` that the longest session with an engagement on a changed day spans after its first day.

    What a session was before a change, a former night has seen.
    """
    keys = ["user_id", "session_id"]
    events = engagements.where(F.col("session_id").isNotNull())
    touched = events.join(events.where(where_days(changed)).select(*keys).distinct(), on=keys, how="left_semi")
    span = F.date_diff(F.max("event_date"), F.min("event_date"))
    return touched.groupBy(*keys).agg(span.alias("days")).agg(F.coalesce(F.max("days"), F.lit(0)).alias("days"))


def corrections(before: DataFrame, after: DataFrame, *, recounted: Collection[date], holdout_before: date, holdout_from: date) -> DataFrame:
    """The rows of co_engagement_daily that touch a total, by what they do to it.

    Args:
        before: the table as of the last good night.
        after: the table as of this night, up to its run date.
        recounted: days whose rows may differ.
        holdout_before: holdout_from of the last good night.
        holdout_from: of this night.

    Returns:
        Columns event_date, trigger_item_id, target_item_id, num_users, user_hashes; `counts`: the row is to be added to the total
        (else only to its fit_weight, as its day left the holdout); `again`: the total has to be added up again, since the row replaces
        another, took one away, or left fit_weight.
    """
    moved_days = [min(holdout_before, holdout_from) + timedelta(days=n) for n in range(abs((holdout_from - holdout_before).days))]
    back = F.lit(holdout_from < holdout_before)
    moved = after.where(where_days(moved_days)).withColumns(
        {"counts": F.lit(False), "again": back | F.expr(where_days(set(moved_days) & set(recounted)))}
    )
    return _changed_rows(before.where(where_days(recounted)), after.where(where_days(recounted))).unionByName(moved)


def _changed_rows(before: DataFrame, after: DataFrame) -> DataFrame:
    keys = ["event_date", *_PAIR]
    old = before.select(*keys, F.col("num_users").alias("old_users"), F.col("user_hashes").alias("old_hashes"))
    both = after.join(old, on=keys, how="full_outer")
    same = F.col("num_users").eqNullSafe(F.col("old_users")) & F.col("user_hashes").eqNullSafe(F.col("old_hashes"))
    states: dict[str, Column] = {"counts": F.lit(True), "again": F.col("old_users").isNotNull()}
    return both.where(~same).withColumns(states).drop("old_users", "old_hashes")


def touched_pairs(rows: DataFrame, totals: DataFrame, *, holdout_from: date) -> DataFrame:
    """Corrections to the pairs they touch, one row each: trigger_item_id, target_item_id, `again` (add it up again from all its days).

    Args:
        rows: of `corrections`.
        totals: co_engagement_totals of the last good night.
        holdout_from: of this night.
    """
    fits = F.col("event_date") < F.lit(holdout_from)
    touched = rows.groupBy(*_PAIR).agg(F.bool_or("again").alias("again"), F.bool_or(fits).alias("fits"))
    known = totals.join(touched.select(*_PAIR), on=_PAIR, how="left_semi").select(*_PAIR, "fit_weight")
    unknown = F.col("fit_weight").isNull()  # below the minimum so far, wholly or (a fit_weight of 0) before the holdout
    again = F.col("again") | unknown | (F.col("fits") & (F.col("fit_weight") <= 0))
    return touched.join(known, on=_PAIR, how="left").select(*_PAIR, again.alias("again"))


def night_parts(
    rows: DataFrame, touched: DataFrame, *, after: DataFrame, totals: DataFrame, num_touched: int
) -> tuple[DataFrame, DataFrame]:
    """What this night's totals are the sum of: rows of co_engagement_daily with `counts`, and earlier totals.

    Args:
        rows: of `corrections`.
        touched: of `touched_pairs`.
        after: co_engagement_daily as of this night, up to its run date.
        totals: co_engagement_totals of the last good night.
        num_touched: rows of `touched`.
    """
    if num_touched <= _MAX_BROADCAST_PAIRS:
        touched = F.broadcast(touched)
    again, more = (touched.where(condition).select(*_PAIR) for condition in (F.col("again"), ~F.col("again")))
    history = after.join(again, on=_PAIR, how="left_semi").withColumn("counts", F.lit(True))
    additions = rows.join(more, on=_PAIR, how="left_semi").drop("again")
    return history.unionByName(additions), totals.join(again, on=_PAIR, how="left_anti")
