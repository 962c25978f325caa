"""A night that builds on another one equals a night that starts from nothing, whatever happened to the events in between."""

import dataclasses
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import Row, SparkSession

from conf.settings import WindowSettings
from conf.tables import CO_ENGAGEMENT_TOTALS
from features.changed_pairs import Gains, Touched, drop_days, renew_totals, rows_of_touched, write_totals
from features.event_files import EventFiles
from features.increments import DayState, changed_days, fingerprint_days, longest_session, moved_days, stale_days, window_reach
from features.pair_counts import CountRule, count_cells
from features.pair_files import KnownFile, PairFile
from features.pair_kernels import packed
from features.pair_totals import TotalRule, pack_by_pair, total_pairs
from features.pairs import holdout_start, update_pairs, where_days, write_pairs
from tests.features.test_pairs import (
    DAY,
    FIRST,
    HALF_LIFE,
    LANDMARK,
    POSITION,
    SESSION,
    TIME,
    WINDOWS,
    counting,
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
    how = counting(window, max_items_per_user_day=max_items)
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


RULE = TotalRule(landmark=0, half_life_days=5.0, holdout_from=7, min_users=2)


def coded(rows: Sequence[tuple[str, str]], **columns: pa.Array) -> pa.Table:
    sides = {side: pa.array([row[n] for row in rows], pa.string()).dictionary_encode() for n, side in enumerate(CO_ENGAGEMENT_TOTALS.key)}
    return pa.table(sides | columns)


def test_touched_pairs_are_found_in_either_order() -> None:
    rng = random.Random(1)
    names = [f"i{n}" for n in range(40)]
    pairs = sorted({tuple(sorted(rng.sample(names, 2))) for _ in range(60)})
    told = [
        packed(0, coded(rows, day=ones, num_users=ones, kind=ones, mark=ones))["block"][0].as_py()
        for rows in (pairs[:20], pairs[10:])
        for ones in [pa.array([1] * len(rows), pa.int32())]
    ]
    touched = Gains.of(told, RULE).pairs
    assert len(touched.keys) == len(pairs)
    asked = [(rng.choice([*names, "unknown"]), rng.choice([*names, "another"])) for _ in range(900)]
    for either_order, asked_for in ((False, asked), (True, [tuple(sorted(pair)) for pair in asked])):
        places = touched.places(coded(asked), either_order=either_order)
        assert places.tolist() == [pairs.index(pair) if pair in pairs else -1 for pair in asked_for]
    nothing = Gains.of([], RULE).pairs
    assert (nothing.places(coded(asked), either_order=True) == -1).all()


Days = dict[tuple[int, str, str], set[int]]
"""Users by day, trigger and target."""


def day_table(days: Days, min_users: int) -> pa.Table:
    keys = sorted(days)
    dates = pa.array([day for day, *_ in keys], pa.int32()).cast(pa.date32())
    users, hashes = pa.array([len(days[key]) for key in keys], pa.int64()), [sorted(days[key])[:min_users] for key in keys]
    return coded([key[1:] for key in keys], event_date=dates, num_users=users, user_hashes=pa.array(hashes, pa.list_(pa.int64())))


def files_of(days: Days, folder: Path, min_users: int) -> list[str]:
    """URIs of files of daily rows, three days each."""
    found = []
    for start in range(0, 12, 3):
        new = PairFile(kind="daily", folder=str(folder))
        new.write(day_table({key: users for key, users in days.items() if start <= key[0] < start + 3}, min_users))
        found += [f"{folder}/{name}" for batch in new.close() for name in batch["name"].to_pylist()]
    return found


def uris(paths: Collection[str]) -> list[pa.RecordBatch]:
    return [pa.record_batch({"uri": pa.array([path], pa.string())}) for path in sorted(paths)]


def add_up(paths: Collection[str], pairs: Touched | None, rule: TotalRule, folder: Path, *, symmetric: bool) -> list[str]:
    """URIs of files with the totals of some pairs, None: of all."""
    rows = [pq.read_table(path, read_dictionary=list(CO_ENGAGEMENT_TOTALS.key)) for path in paths]
    if pairs is None:
        batches = [
            batch for table in rows for batch in table.set_column(
                table.column_names.index("event_date"), "day", table["event_date"].cast(pa.int32())).to_batches()
        ]  # fmt: skip
    else:
        batches = list(rows_of_touched(uris(paths), touched=pairs))
    blocks = pack_by_pair(batches, num_buckets=1)
    written = write_totals(total_pairs(blocks, rule=rule, symmetric=symmetric), folder=str(folder))
    return [f"{folder}/{name}" for batch in written for name in batch["name"].to_pylist()]


def totals_frame(paths: Collection[str]) -> pd.DataFrame:
    tables = [pq.read_table(path).to_pandas() for path in paths]
    frame = pd.concat(tables) if tables else pd.DataFrame(columns=list(CO_ENGAGEMENT_TOTALS.column_names))
    return sorted_frame(frame.astype({"trigger_item_id": str, "target_item_id": str}))


def rows_of(batches: Iterator[pa.RecordBatch]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.to_pylist()]


def replaced(paths: Sequence[str], rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """The files that are current once those rows of DROPPED_SCHEMA have come true."""
    gone = {f"{folder}/{row['replaces']}" for row in rows if row["replaces"]}
    return [path for path in paths if path not in gone] + [f"{folder}/{row['name']}" for row in rows if row["name"]]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), symmetric=st.booleans(), min_users=st.sampled_from([1, 2, 3]), only_more=st.booleans())
def test_totals_gain_what_changed_days_say(seed: int, symmetric: bool, min_users: int, only_more: bool) -> None:
    """By columns alone: daily rows change on some days and the holdout moves; totals are renewed, and equal those of all rows."""
    rng = random.Random(seed)
    names = [f"i{n}" for n in range(6)]
    pairs = [(a, b) for a in names for b in names if (a < b if symmetric else a != b)]

    def some(days: Collection[int]) -> Days:
        found = ((day, *pair) for day in days for pair in pairs if rng.random() < 0.3)
        return {key: set(rng.sample(range(-3, 4), rng.randint(1, 3))) for key in found}

    was, stale = some(range(10)), {10} if only_more else set(rng.sample(range(12), 3))
    as_it_was = {key: users for key, users in was.items() if key[0] in stale and rng.random() < 0.7}
    anew = some(sorted(stale)) | as_it_was
    then, rule = (dataclasses.replace(RULE, min_users=min_users, holdout_from=rng.randint(4, 9)) for _ in range(2))
    days = {"recounted": stale, "moved": set(range(*sorted((then.holdout_from, rule.holdout_from)))), "holdout_from": rule.holdout_from}
    with TemporaryDirectory() as root:
        daily, totals, scratch = (Path(root, name) for name in ("daily", "totals", "scratch"))
        for folder in (daily, totals, scratch):
            folder.mkdir()
        old_daily, added = files_of(was, daily, min_users), files_of(anew, daily, min_users)
        old_totals = add_up(old_daily, None, then, totals, symmetric=symmetric)
        names_of_added = {path.removeprefix(f"{daily}/") for path in added}
        dropped = rows_of(drop_days(uris([*old_daily, *added]), folder=str(daily), added=names_of_added, **days))
        gains = Gains.of([row["pairs"] for row in dropped if row["pairs"]], rule)
        renewed = rows_of(renew_totals(uris(old_totals), folder=str(totals), gains=gains, symmetric=symmetric))
        left = gains.without([row["pairs"] for row in renewed if row["pairs"] is not None])
        new_daily = replaced([*old_daily, *added], dropped, daily)
        new_totals = replaced(old_totals, renewed, totals) + add_up(new_daily, left, rule, totals, symmetric=symmetric)
        wanted = totals_frame(add_up(new_daily, None, rule, scratch, symmetric=symmetric))
        pd.testing.assert_frame_equal(totals_frame(new_totals), wanted, rtol=1e-12)
        if only_more and then.holdout_from == rule.holdout_from:
            known = zip(*(totals_frame(old_totals)[side] for side in CO_ENGAGEMENT_TOTALS.key), strict=True)
            assert not set(known) & set(of_keys(left)), "a pair that only gains is not added up again"


def of_keys(pairs: Touched) -> list[tuple[str, ...]]:
    names = pairs.items.to_pylist()
    return [(names[key // len(names)], names[key % len(names)]) for key in pairs.keys.tolist()]


# --- With Spark: nights that build on each other -------------------------------------------------------------------------------


def nights(pool: pd.DataFrame, rng: random.Random) -> Iterator[tuple[date, pd.DataFrame]]:
    """Run dates and the events as they stand then: a day more and nothing else, a day more and much else, the same day again, and back."""
    events = pool[[rng.random() < 0.9 for _ in range(len(pool))]]
    for step in (3, 4, 5, 5, 3):
        run_date = FIRST + timedelta(days=step - 1)
        yield run_date, events[events.event_date <= run_date]
        events = tampered(events, pool, rng) if step > 3 else events


def sorted_frame(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame.sort_values(list(CO_ENGAGEMENT_TOTALS.key)).reset_index(drop=True)
    return rows[list(CO_ENGAGEMENT_TOTALS.column_names)]


class Lake:
    """Tables as folders of files, and which files are the current ones."""

    def __init__(self, folder: Path) -> None:
        self.folders = {kind: str(folder / kind) for kind in ("daily", "totals")}
        self.files: dict[str, dict[str, KnownFile]] = {"daily": {}, "totals": {}}
        for path in self.folders.values():
            Path(path).mkdir(parents=True)

    def change(self, files: Sequence[Row], removed: Mapping[str, Collection[str]] | None) -> None:
        for kind, known in self.files.items():
            names = set(known) if removed is None else {f"{self.folders[kind]}/{name}" for name in removed[kind]}
            assert names <= set(known)
            kept = {uri: file for uri, file in known.items() if uri not in names}
            mine = (file for file in files if file.kind == kind)
            self.files[kind] = kept | {f"{self.folders[kind]}/{file.name}": KnownFile.of(file) for file in mine}

    def rows(self, kind: str) -> pd.DataFrame:
        tables = [pq.read_table(uri).to_pandas() for uri in self.files[kind]]
        return pd.concat(tables) if tables else pd.DataFrame(columns=list(CO_ENGAGEMENT_TOTALS.column_names))


def daily_rows(lake: Lake) -> Rows:
    return sorted(
        (row.event_date, str(row.trigger_item_id), str(row.target_item_id), row.num_users, tuple(row.user_hashes))
        for row in lake.rows("daily").itertuples()
    )


@pytest.mark.parametrize("window", [SESSION, TIME, POSITION], ids=lambda window: window.kind)
def test_nights_equal_a_rebuild(spark: SparkSession, tmp_path: Path, window: WindowSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late, corrected and deleted events, deleted users and a way back: files of days and totals hold what a rebuild would write."""
    monkeypatch.setattr("features.pair_files._SPAN_ROWS", 40)
    rng = random.Random(window.kind)
    pool = world(seed=len(window.kind), num_events=400, num_users=12, num_items=40)
    mine, was, holdout_before, reach, touched = Lake(tmp_path / "mine"), dict[date, DayState](), FIRST, 0, []
    for number, (run_date, events) in enumerate(nights(pool, rng)):
        now = states(events)
        changed, reach = changed_days(was, now), max(reach, longest(events))
        far = window_reach(window, longest_session_days=reach)
        stale = stale_days(changed, was.keys() | now.keys(), reach_days=far)
        holdout = holdout_start({day: state.num_events for day, state in now.items()}, holdout_share=0.3, run_date=run_date)
        folder = tmp_path / f"events-{number}"
        to_spark(spark, events).repartition(2).sortWithinPartitions("event_date").write.parquet(str(folder))
        files = EventFiles(sizes={str(path): path.stat().st_size for path in folder.glob("*.parquet")})
        items = pa.array(sorted(set(events.item_id)))
        counts = {day: state.num_events for day, state in now.items()}
        rule = {"landmark": LANDMARK, "half_life_days": HALF_LIFE, "holdout_from": holdout, "items": items, "num_tasks": 3}
        how = counting(window, max_items_per_user_day=5)
        changes = update_pairs(
            spark,
            files,
            how,
            days={day: counts[day] for day in stale & counts.keys()},
            stale=stale,
            moved=moved_days(holdout_before, holdout),
            reach_days=far,
            known=counts,
            before=mine.files,
            folders=mine.folders,
            **rule,
        )
        mine.change(changes.files, changes.removed)
        scratch = Lake(tmp_path / f"scratch-{number}")
        scratch.change(write_pairs(spark, files, how, days=counts, folders=scratch.folders, **rule).collect(), None)
        assert daily_rows(mine) == daily_rows(scratch)
        found, wanted = (
            sorted_frame(lake.rows("totals").astype({"trigger_item_id": str, "target_item_id": str})) for lake in (mine, scratch)
        )
        pd.testing.assert_frame_equal(found, wanted, rtol=1e-12)
        touched.append((changes.num_touched, len(wanted)))
        was, holdout_before = now, holdout
    assert any(0 < num < all_ for num, all_ in touched), "some totals stayed as they were"


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
