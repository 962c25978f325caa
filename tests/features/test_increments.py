"""A night that builds on another one equals a night that starts from nothing, whatever happened to the events in between."""

import random
from collections.abc import Iterator
from datetime import date, timedelta

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

from conf.settings import WindowSettings
from conf.tables import CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_TOTALS
from features.increments import (
    DayState,
    changed_days,
    corrections,
    fingerprint_days,
    longest_session,
    night_parts,
    stale_days,
    touched_pairs,
    window_reach,
)
from features.pair_counts import CountRule, count_cells
from features.pair_totals import TotalRule, pack_by_pair, total_pairs
from features.pairs import Counting, count_daily_pairs, holdout_start, one_order, sum_totals, where_days
from tests.features.test_pairs import (
    DAY,
    FIRST,
    HALF_LIFE,
    KEY,
    LANDMARK,
    POSITION,
    SESSION,
    TIME,
    WINDOWS,
    kernel_windows,
    to_spark,
    world,
)

Rows = list[tuple[object, ...]]


# --- Without Spark: which days a change can reach ------------------------------------------------------------------------------


def kernel_counts(events: pd.DataFrame, window: WindowSettings, *, max_items: int) -> dict[date, Rows]:
    """Rows of co_engagement_daily by day, through the kernels alone."""
    if events.empty:
        return {}
    how = Counting(window=window, max_items_per_user_day=max_items, min_users=2, hash_key=KEY)
    if window.kind == "session" and events.session_id.isna().all():
        return {}
    blocks, items = kernel_windows(events, how)
    found: dict[date, Rows] = {}
    for part in count_cells(blocks, items=items, rule=CountRule(symmetric=window.symmetric, min_users=2)):
        for row in part.daily.to_pylist():
            found.setdefault(row["event_date"], []).append(tuple(row.values()))
    return {day: sorted(rows) for day, rows in found.items()}


def states(events: pd.DataFrame) -> dict[date, DayState]:
    return {
        day: DayState(num_events=len(rows), fingerprint=str(sorted(map(str, rows.itertuples(index=False)))))
        for day, rows in events.groupby("event_date")
    }


def longest(events: pd.DataFrame) -> int:
    spans = events[events.session_id.notna()].groupby(["user_id", "session_id"]).event_date.agg(["min", "max"])
    return max(((row["max"] - row["min"]).days for _, row in spans.iterrows()), default=0)


def tampered(events: pd.DataFrame, pool: pd.DataFrame, rng: random.Random) -> pd.DataFrame:
    """The events after a day of a shop: some came late, some were corrected or deleted, and now and then a user is."""
    kept = events[[rng.random() > 0.03 for _ in range(len(events))]]
    if rng.random() < 0.3:
        kept = kept[kept.user_id != rng.choice(["u0", "u1", "u2"])]
    late = pool[[rng.random() < 0.03 for _ in range(len(pool))]]
    moved = kept[[rng.random() < 0.02 for _ in range(len(kept))]].assign(session_id="moved")
    return pd.concat([moved, kept, late]).drop_duplicates(["user_id", "item_id", "action", "engaged_at"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(range(len(WINDOWS))), cap=st.sampled_from([3, 200]))
def test_days_out_of_reach_keep_their_counts(seed: int, kind: int, cap: int) -> None:
    rng, window = random.Random(seed), WINDOWS[kind]
    pool = world(seed=seed, num_events=120)
    old = pool[[rng.random() < 0.8 for _ in range(len(pool))]]
    new = tampered(old, pool, rng) if rng.random() < 0.8 else old[old.event_date != rng.choice(sorted(set(old.event_date)))]
    was, now = states(old), states(new)
    reach = window_reach(window, longest_session_days=max(longest(old), longest(new)))
    stale = stale_days(changed_days(was, now), was.keys() | now.keys(), reach_days=reach)
    before, after = (kernel_counts(events, window, max_items=cap) for events in (old, new))
    different = {day for day in before.keys() | after.keys() if before.get(day) != after.get(day)}
    assert different <= stale
    assert changed_days(was, now) <= stale


def test_reach_is_as_far_as_the_window() -> None:
    days = [date(2024, 3, n) for n in range(1, 20)]
    reach = {1: 1, DAY: 1, DAY + 1: 2}
    windows = {seconds: WindowSettings(kind="time", window_seconds=seconds) for seconds in reach}
    assert {seconds: window_reach(window, longest_session_days=9) for seconds, window in windows.items()} == reach
    assert stale_days({days[3]}, days, reach_days=2) == set(days[3:6])
    assert stale_days({days[3], days[15]}, days, reach_days=0) == {days[3], days[15]}
    assert window_reach(POSITION, longest_session_days=9) is None
    assert stale_days({days[3]}, days, reach_days=None) == set(days[3:])
    assert stale_days(set(), days, reach_days=None) == set()
    assert where_days([days[4], days[2], days[3], days[9]]) == (
        "event_date BETWEEN DATE'2024-03-03' AND DATE'2024-03-05' OR event_date BETWEEN DATE'2024-03-10' AND DATE'2024-03-10'"
    )
    assert where_days([]) == "false"


def days_of(rows: list[dict[str, object]], *, flagged: bool = False) -> pa.Table:
    """Rows of co_engagement_daily as the kernel that adds them up reads them."""
    schema = pa.schema(
        [("trigger_item_id", pa.string()), ("target_item_id", pa.string()), ("day", pa.int32()), ("num_users", pa.int64())]
        + [("user_hashes", pa.list_(pa.int64()))]
        + ([("counts", pa.bool_())] if flagged else [])
    )
    return pa.Table.from_pylist(rows, schema=schema)


def added_up(*tables: pa.Table, holdout_from: int) -> pa.Table:
    rule = TotalRule(landmark=0, half_life_days=3.0, holdout_from=holdout_from, min_users=2)
    blocks = [block for table in tables for block in pack_by_pair(table.to_batches(), num_buckets=1)]
    return pa.Table.from_batches(list(total_pairs(blocks, rule=rule)))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), moved=st.integers(0, 2))
def test_a_total_grows_by_what_is_added_to_it(seed: int, moved: int) -> None:
    rng = random.Random(seed)
    cells = {(rng.choice("abcd"), rng.choice("wxyz"), rng.randrange(7)) for _ in range(60)}
    rows = []
    for i, j, day in sorted(cells):
        users = sorted(rng.sample(range(5), rng.randint(1, 3)))
        rows.append({"trigger_item_id": i, "target_item_id": j, "day": day, "num_users": len(users), "user_hashes": users[:2]})
    holdout = 3 + moved
    was = added_up(days_of([row for row in rows if row["day"] < 6]), holdout_from=3)
    known = {(row["trigger_item_id"], row["target_item_id"]): row["fit_weight"] for row in was.to_pylist()}
    parts = []
    for row in rows:
        pair = (row["trigger_item_id"], row["target_item_id"])
        left_holdout = any(r["day"] in range(3, holdout) for r in rows if (r["trigger_item_id"], r["target_item_id"]) == pair)
        if pair not in known or (left_holdout and not known[pair]):
            parts.append(row | {"counts": True})
            known.pop(pair, None)
        elif row["day"] == 6 or row["day"] in range(3, holdout):
            parts.append(row | {"counts": row["day"] == 6})
    kept = pa.array([(row["trigger_item_id"], row["target_item_id"]) in known for row in was.to_pylist()], pa.bool_())
    mine = added_up(days_of(parts, flagged=True), was.filter(kept), holdout_from=holdout).to_pandas()
    pd.testing.assert_frame_equal(mine, added_up(days_of(rows), holdout_from=holdout).to_pandas(), rtol=1e-12)


# --- With Spark: nights that build on each other -------------------------------------------------------------------------------


def nights(pool: pd.DataFrame, rng: random.Random) -> Iterator[tuple[date, pd.DataFrame]]:
    """Run dates and the events as they stand then: forward, twice the same, and back."""
    events = pool[[rng.random() < 0.9 for _ in range(len(pool))]]
    for step in (4, 5, 5, 3):
        run_date = FIRST + timedelta(days=step - 1)
        yield run_date, events[events.event_date <= run_date]
        events = tampered(events, pool, rng)


def sorted_frame(frame: DataFrame) -> pd.DataFrame:
    return frame.toPandas().sort_values(list(CO_ENGAGEMENT_TOTALS.key)).reset_index(drop=True)


def rows_of(daily: DataFrame) -> Rows:
    return sorted((*row[:4], tuple(row[4])) for row in daily.collect())


@pytest.mark.parametrize("window", [SESSION, TIME], ids=["session", "time"])
def test_nights_equal_a_rebuild(spark: SparkSession, window: WindowSettings) -> None:
    """Late, corrected and deleted events, deleted users and a way back: the recounted days and the totals are those of a rebuild."""
    rng = random.Random(window.kind)
    pool = world(seed=len(window.kind), num_events=300, num_items=12)
    daily, totals = (spark.createDataFrame([], table.ddl) for table in (CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_TOTALS))
    was: dict[date, DayState] = {}
    kept: Rows = []
    holdout_before, reach, ways = FIRST, 0, []
    for run_date, events in nights(pool, rng):
        now = states(events)
        changed, reach = changed_days(was, now), max(reach, longest(events))
        stale = stale_days(changed, was.keys() | now.keys(), reach_days=window_reach(window, longest_session_days=reach))
        holdout = holdout_start({day: state.num_events for day, state in now.items()}, holdout_share=0.3, run_date=run_date)
        how = Counting(window=window, max_items_per_user_day=5, min_users=2, hash_key=KEY)
        whole = count_daily_pairs(how, days=dict.fromkeys(now, 9), num_tasks=1)
        scratch = rows_of(to_spark(spark, events).transform(whole))
        kept = sorted([row for row in kept if row[0] not in stale] + [row for row in scratch if row[0] in stale])
        assert kept == scratch
        after = spark.createDataFrame([(*row[:4], list(row[4])) for row in kept], CO_ENGAGEMENT_DAILY.ddl)
        earlier_totals = one_order(totals) if window.symmetric else totals
        rows = corrections(daily, after, recounted=stale, holdout_before=holdout_before, holdout_from=holdout)
        touched = touched_pairs(rows, earlier_totals, holdout_from=holdout).toPandas()
        assert not touched.duplicated(["trigger_item_id", "target_item_id"]).any()
        ways.append((int(touched["again"].sum()), len(touched)))
        rule = {"landmark": LANDMARK, "half_life_days": HALF_LIFE, "holdout_from": holdout, "min_users": 2, "num_tasks": 2}
        rule["symmetric"] = window.symmetric
        found = spark.createDataFrame(touched)
        parts, earlier = night_parts(rows, found, after=after, totals=earlier_totals, num_touched=len(touched))
        mine = sorted_frame(parts.transform(sum_totals(earlier=earlier, **rule)))
        pd.testing.assert_frame_equal(mine, sorted_frame(after.transform(sum_totals(**rule))), rtol=1e-12)
        totals, daily, was, holdout_before = spark.createDataFrame(mine, CO_ENGAGEMENT_TOTALS.ddl), after, now, holdout
    assert any(0 < again < num for again, num in ways)  # both ways to bring a total up to date were taken


def test_the_longest_session_is_that_of_a_changed_day(spark: SparkSession) -> None:
    events = world(seed=4, num_events=120)
    spans = events[events.session_id.notna()].groupby(["user_id", "session_id"]).event_date.agg(["min", "max", set])
    for day in (FIRST, FIRST + timedelta(days=3)):
        wanted = max((row["max"] - row["min"]).days for _, row in spans.iterrows() if day in row["set"])
        assert to_spark(spark, events).transform(lambda frame, day=day: longest_session(frame, {day})).first()["days"] == wanted


def test_a_fingerprint_sees_every_change_and_no_order(spark: SparkSession) -> None:
    events = world(seed=3, num_events=80)

    def found(frame: pd.DataFrame) -> dict[date, DayState]:
        rows = to_spark(spark, frame).repartition(3).transform(fingerprint_days).collect()
        return {row[0]: DayState(num_events=row[1], fingerprint=row[2]) for row in rows}

    plain = found(events)
    assert {state.num_events for state in plain.values()} == {len(rows) for _, rows in events.groupby("event_date")}
    assert found(events.sample(frac=1, random_state=4)) == plain
    row = events.index[7]
    for column, value in (("user_id", "other"), ("item_id", "other"), ("session_id", "other")):
        other = events.copy()
        other.loc[row, column] = value
        assert changed_days(plain, found(other)) == {events.loc[row, "event_date"]}
    assert changed_days(plain, found(events.drop(index=row))) == {events.loc[row, "event_date"]}
