"""Pair counting against DuckDB, which joins every engagement with every other and knows nothing of windows as ranges."""

import os
import random
import zlib
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from conf.errors import SettingsError, SourceError
from conf.settings import WindowSettings
from conf.tables import CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_PAIRS, CO_ENGAGEMENT_TOTALS, ENGAGEMENTS, ITEM_POPULARITY
from features.event_files import EventFiles
from features.pair_counts import CountRule, count_cells
from features.pair_files import FILE_SCHEMA, KnownFile, day_spans
from features.pair_kernels import PACKED_SCHEMA, check_num_items, day_number, keyed_hash, row_order
from features.pair_totals import TOTAL_SCHEMA, TotalRule, pack_by_pair, total_pairs
from features.pairs import (
    Counting,
    all_items,
    collect_user_items,
    count_daily_pairs,
    count_popularity,
    engagements_per_day,
    future_pairs,
    holdout_start,
    measure_days,
    sum_user_items,
    write_pairs,
    write_scores,
)
from features.swing import UserItems
from features.windows import make_windows, pack_by_user

FIRST, LAST = date(2024, 3, 1), date(2024, 3, 6)
KEY = b"key of the tests"
DAY = 86_400

SESSION = WindowSettings(kind="session", symmetric=True)
SESSION_DIRECTED = WindowSettings(kind="session")
TIME = WindowSettings(kind="time", window_seconds=DAY + 1800)
TIME_SYMMETRIC = WindowSettings(kind="time", window_seconds=3600, symmetric=True)
POSITION = WindowSettings(kind="position", max_distance=2)
POSITION_SYMMETRIC = WindowSettings(kind="position", max_distance=3, window_seconds=DAY, symmetric=True)
WINDOWS = (SESSION, SESSION_DIRECTED, TIME, TIME_SYMMETRIC, POSITION, POSITION_SYMMETRIC)


def world(seed: int, *, num_events: int = 400, num_users: int = 6, num_items: int = 9) -> pd.DataFrame:
    """Few users, few items and times on half hours: ties, repeats, second actions and sessions across midnight are all common."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_events):
        user = f"u{rng.randrange(num_users)}"
        at = datetime(2024, 2, 29, 12) + timedelta(minutes=30 * rng.randrange(12 + 6 * 48))
        session = rng.choice([None, f"s{(at.day + (at.hour > 18)) % 31}", f"s{rng.randrange(3)}"])
        rows.append((user, f"i{rng.randrange(num_items)}", rng.choice(["buy", "view"]), at, session, 1.0, at.date()))
    frame = pd.DataFrame(rows, columns=list(ENGAGEMENTS.column_names))
    return frame.drop_duplicates(list(ENGAGEMENTS.key))


def to_spark(spark: SparkSession, frame: pd.DataFrame) -> DataFrame:
    rows = [(*row[:3], row[3].to_pydatetime().replace(tzinfo=UTC), row[4] or None, *row[5:]) for row in frame.itertuples(index=False)]
    return spark.createDataFrame(rows, StructType.fromDDL(ENGAGEMENTS.ddl))


def counter(window: WindowSettings, **over: object) -> Callable[[DataFrame], DataFrame]:
    days = dict.fromkeys((FIRST + timedelta(days=n) for n in range(6)), 60)
    given = {"days": days} | {name: over.pop(name) for name in ("days", "num_tasks") if name in over}
    return count_daily_pairs(counting(window, **over), **given)


def counting(window: WindowSettings, **over: object) -> Counting:
    given: dict[str, Any] = {"max_items_per_user_day": 200, "max_triggers_per_target": 500, "min_users": 2, "hash_key": KEY}
    return Counting(window=window, **(given | over))


def sum_totals(
    *, landmark: date, half_life_days: float, holdout_from: date, min_users: int, symmetric: bool = False, num_tasks: int = 2
) -> Callable[[DataFrame], DataFrame]:
    """Rows of co_engagement_daily to co_engagement_totals, through the kernel that a night adds touched pairs up with."""
    days = {"landmark": day_number(landmark), "holdout_from": day_number(holdout_from)}
    add_up = partial(total_pairs, rule=TotalRule(half_life_days=half_life_days, min_users=min_users, **days), symmetric=symmetric)

    def transform(daily: DataFrame) -> DataFrame:
        day = F.unix_date("event_date").alias("day")
        rows = daily.select("trigger_item_id", "target_item_id", day, "num_users", "user_hashes")
        blocks = rows.mapInArrow(partial(pack_by_pair, num_buckets=num_tasks), PACKED_SCHEMA)
        return blocks.repartitionById(num_tasks, F.col("bucket")).mapInArrow(add_up, TOTAL_SCHEMA)

    return transform


def score(totals: DataFrame, popularity: DataFrame, users: UserItems, *, max_pairs: int, num_tasks: int | None = None) -> pd.DataFrame:
    """Rows of co_engagement_pairs, by files as a night makes them."""
    with TemporaryDirectory() as root:
        totals.write.parquet(f"{root}/totals")
        (Path(root) / "pairs").mkdir()
        files = {str(path): KnownFile(path.stat().st_size) for path in Path(root, "totals").glob("*.parquet")}
        rule: dict[str, Any] = {"max_pairs_per_trigger": max_pairs, "num_tasks": num_tasks, **AS_OF}
        found = write_scores(totals.sparkSession, files, popularity, users, folder=f"{root}/pairs", **rule)
        tables = [pq.read_table(f"{root}/pairs/{file['name']}") for file in found]
        assert sum(file["num_rows"] for file in found) == sum(map(len, tables))
        wanted = list(CO_ENGAGEMENT_PAIRS.column_names)
        assert all(table.column_names == wanted for table in tables)
        frame = pd.concat([table.to_pandas() for table in tables]) if tables else pd.DataFrame(columns=wanted)
        return frame.astype({"trigger_item_id": str, "target_item_id": str})


def who(frame: DataFrame, *, max_users: int = 60) -> UserItems:
    return collect_user_items(frame.transform(sum_user_items(**DATED)), hash_key=KEY, max_users=max_users)


def popular(frame: DataFrame) -> DataFrame:
    return frame.transform(sum_user_items(**DATED)).transform(count_popularity(**AS_OF))


def event_files(frame: DataFrame, folder: Path, actions: tuple[str, ...] | None = None) -> EventFiles:
    """Engagements as the files that a stage reads."""
    frame.write.parquet(str(folder))
    return EventFiles(sizes={str(path): path.stat().st_size for path in folder.glob("*.parquet")}, actions=actions)


def counted(frame: DataFrame) -> list[tuple[object, ...]]:
    return sorted(tuple(row) for row in frame.collect())


def condition(window: WindowSettings, max_triggers: int = 500) -> str:
    """The definition of the window, as a join condition between trigger a and target b."""
    if window.kind == "session":
        return "a.session_id = b.session_id"
    seconds = "true" if window.window_seconds is None else f"b.t - a.t <= {window.window_seconds * 1_000_000}"
    seconds += f" and b.n - a.n <= {max_triggers}"
    if window.kind == "time":
        return seconds
    between = "select count(distinct m.item_id) from e m where m.user_id = a.user_id and m.t > a.t and m.t <= b.t"
    return f"({between}) <= {window.max_distance} and {seconds}"


def oracle(events: pd.DataFrame, window: WindowSettings, *, min_users: int = 2, max_triggers: int = 500) -> list[tuple[object, ...]]:
    """All pairs of engagements of a user, filtered; symmetric ones in one order; then users counted."""
    connection = duckdb.connect()
    connection.execute("set threads to 1")
    connection.register("raw", events)
    hashes = pd.DataFrame({"user_id": (users := sorted(set(events.user_id))), "hash": [keyed_hash(user, key=KEY) for user in users]})
    connection.register("hashes", hashes)
    place = "dense_rank() over (partition by user_id order by epoch_us(engaged_at), item_id) n"
    connection.execute(f"create table e as select distinct user_id, item_id, epoch_us(engaged_at) t, session_id, {place} from raw")
    connection.execute("create table days as select distinct user_id, item_id, epoch_us(engaged_at) t, engaged_at::date d from raw")
    joined = f"""
        select distinct d.d, a.item_id i, b.item_id j, a.user_id from e a join e b on a.user_id = b.user_id
        join days d on d.user_id = b.user_id and d.item_id = b.item_id and d.t = b.t
        where a.item_id <> b.item_id and a.t <= b.t and {condition(window, max_triggers)} and d.d between '{FIRST}' and '{LAST}'"""
    both = "least(i, j) i, greatest(i, j) j" if window.symmetric else "i, j"
    pairs = f"with p as ({joined}) select distinct d, {both}, user_id from p"
    smallest = f"list_sort(list(hash))[1:{min_users}]"
    counts = f"select d, i, j, count(*), {smallest} from ({pairs}) join hashes using (user_id) group by all order by all"
    rows = connection.execute(counts).fetchall()
    return [(d, i, j, n, list(h)) for d, i, j, n, h in rows]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w.kind}-{'symmetric' if w.symmetric else 'directed'}")
def test_daily_counts_equal_duckdb(spark: SparkSession, window: WindowSettings) -> None:
    events = world(seed=WINDOWS.index(window))
    expected = oracle(events, window)
    assert len(expected) > 100
    # neither the order of rows nor the partitions matter; 7 tasks count a grid of cells
    shuffled = to_spark(spark, events.sample(frac=1, random_state=1)).repartition(3)
    assert counted(shuffled.transform(counter(window, num_tasks=7))) == expected
    # days counted apart from others see as far back as their window reaches
    late = [row for row in expected if row[0] == LAST]
    assert late
    assert counted(shuffled.transform(counter(window, days={LAST: 1}, num_tasks=1))) == late


def test_known_pairs(spark: SparkSession) -> None:
    def event(item: str, at: str, session: str | None, user: str = "u") -> tuple[object, ...]:
        moment = datetime.fromisoformat(at)
        return (user, item, "buy", pd.Timestamp(moment), session, 1.0, moment.date())

    events = pd.DataFrame(
        [
            event("bread", "2024-03-01 23:59:00", "s"),
            event("butter", "2024-03-02 00:01:00", "s"),  # the pair belongs to the day of the target
            event("bread", "2024-03-02 00:01:00", "other"),  # another session pairs with nothing
            event("salt", "2024-03-03 10:00:00", None),  # neither does a missing one, twice
            event("oil", "2024-03-03 10:00:00", None),
            event("tea", "2024-03-04 08:00:00", "t"),  # a tie counts in both directions, of each user
            event("milk", "2024-03-04 08:00:00", "t"),
            event("tea", "2024-03-04 08:00:00", "t", user="v"),
            event("milk", "2024-03-04 08:00:00", "t", user="v"),
        ],
        columns=list(ENGAGEMENTS.column_names),
    )
    rows = counted(to_spark(spark, events).transform(counter(SESSION_DIRECTED)))
    assert [row[:4] for row in rows] == [
        (date(2024, 3, 2), "bread", "butter", 1),
        (date(2024, 3, 4), "milk", "tea", 2),
        (date(2024, 3, 4), "tea", "milk", 2),
    ]
    assert rows[1][4] == sorted(keyed_hash(user, key=KEY) for user in "uv")


@pytest.mark.parametrize("window", [TIME, TIME_SYMMETRIC, POSITION], ids=["time", "symmetric", "position"])
def test_a_target_has_at_most_so_many_triggers(window: WindowSettings) -> None:
    events = world(seed=17, num_events=500)
    expected = sorted((*row[:4], tuple(row[4])) for row in oracle(events, window, max_triggers=2))
    blocks, items = kernel_windows(events, counting(window, max_triggers_per_target=2))
    parts = count_cells(blocks, items=items, rule=CountRule(symmetric=window.symmetric, min_users=2))
    rows = [tuple(row.values()) for part in parts for row in part.daily.to_pylist()]
    assert sorted((*row[:4], tuple(row[4])) for row in rows if FIRST <= row[0] <= LAST) == expected
    assert len(expected) < len(oracle(events, window))


@pytest.mark.parametrize("window", [SESSION, TIME], ids=["session", "time"])
def test_cap_keeps_the_smallest_hashes(spark: SparkSession, tmp_path: Path, window: WindowSettings) -> None:
    events = world(seed=11, num_events=500)
    cap = 4
    scope = events.session_id if window.kind == "session" else events.event_date.astype(str)
    kept = []
    for day in [FIRST + timedelta(days=n) for n in range(6)]:  # a session is capped by what it held up to the target day
        known = events[events.event_date <= day] if window.kind == "session" else events
        ranks = known.assign(scope=scope)[known.session_id.notna() | (window.kind != "session")].copy()
        ranks["hash"] = [keyed_hash(f"{r.user_id}\x1f{r.scope}\x1f{r.item_id}", key=KEY) for r in ranks.itertuples()]
        ranks["rank"] = ranks.groupby(["user_id", "scope"])["hash"].rank(method="dense")
        part = ranks[ranks["rank"] <= cap].drop(columns=["scope", "hash", "rank"])
        kept += [row for row in oracle(part, window) if row[0] == day]
    frame = to_spark(spark, events)
    assert counted(frame.transform(counter(window, max_items_per_user_day=cap))) == sorted(kept)
    assert kept != oracle(events, window)
    some: dict[str, Any] = {"days": {FIRST: 1, LAST: 1}, "items": all_items(frame)}
    measured = measure_days(spark, event_files(frame, tmp_path / "events"), counting(window, max_items_per_user_day=cap), **some).collect()
    for row in measured:  # a session has been cut on a day if it has an engagement there
        known = events[events.event_date <= row.event_date] if window.kind == "session" else events[events.event_date == row.event_date]
        known = known.assign(scope=scope)[known.session_id.notna() | (window.kind != "session")]
        here = set(known[known.event_date == row.event_date][["user_id", "scope"]].itertuples(index=False, name=None))
        sizes = known.groupby(["user_id", "scope"]).item_id.nunique()
        over = [int(size) - cap for group, size in sizes.items() if group in here and size > cap]
        assert (row.num_capped_groups, row.num_cut_items) == (len(over), sum(over))
    assert sum(row.num_cut_items for row in measured) > 0
    assert {row.event_date for row in measured} == {FIRST, LAST}


@pytest.mark.parametrize("window", [SESSION, TIME], ids=["symmetric", "directed"])
def test_cells_of_many_passes_and_of_wide_keys_count_the_same(window: WindowSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    events = world(seed=31, num_events=300)
    expected = sorted((row[0], *row[1:4], tuple(row[4])) for row in oracle(events, window))
    for pass_pairs, key_bits in ((10**6, 63), (20, 63), (10**6, 9)):  # in one pass, in many, and with two columns to sort
        monkeypatch.setattr("features.pair_counts.KEY_BITS", key_bits)
        rule = CountRule(symmetric=window.symmetric, min_users=2, pass_pairs=pass_pairs)
        blocks, items = kernel_windows(events, counting(window), num_classes=2)
        parts = list(count_cells(blocks, items=items, rule=rule))
        assert (len(parts) > 4) == (pass_pairs == 20)
        rows = [tuple(row.values()) for part in parts for row in part.daily.to_pylist()]
        found = sorted((*row[:4], tuple(row[4])) for row in rows if FIRST <= row[0] <= LAST)
        assert found == expected


def kernel_windows(events: pd.DataFrame, how: Counting, *, num_classes: int = 1) -> tuple[list[pa.RecordBatch], pa.Array]:
    """Blocks of windows, and the ids of all items, through the kernels alone."""
    used = events[events.session_id.notna()] if how.window.kind == "session" else events
    used = used.sample(frac=1, random_state=3)
    columns = {
        "bucket": pa.array([zlib.crc32(user.encode()) % 2 for user in used.user_id], pa.int32()),
        "user_id": pa.array(used.user_id.tolist(), pa.string()),
        "session_id": pa.array(used.session_id.tolist(), pa.string()),
        "item_id": pa.array(used.item_id.tolist(), pa.string()),
        "day": pa.array([(day - date(1970, 1, 1)).days for day in used.event_date], pa.int32()),
        "time": pa.array([int(at.replace(tzinfo=UTC).timestamp()) * 1_000_000 for at in used.engaged_at], pa.int64()),
    }
    items = pa.array(sorted(set(used.item_id)), pa.string())
    packed = list(pack_by_user([pa.RecordBatch.from_pydict(columns)], items=items, num_buckets=2))
    rule = how.rule(set(used.event_date), num_classes)
    buckets = [[batch for batch in packed if batch["bucket"][0].as_py() == number] for number in range(2)]
    return [block for bucket in buckets for block in make_windows(bucket, items=items, rule=rule)], items


def test_rows_are_ordered_as_by_a_sort_of_columns() -> None:
    rng = np.random.default_rng(7)
    small, wide = rng.integers(0, 4, 50), rng.integers(-(2**62), 2**62, 50)
    wide[:20] = wide[0]
    for columns in ((small,), (small, rng.integers(0, 3, 50)), (wide, small), (small, wide, small[::-1].copy())):
        assert row_order(*columns).tolist() == np.lexsort(columns[::-1]).tolist()
    assert row_order(np.zeros(0, np.int64)).tolist() == []


def test_spans_of_days_double_with_age() -> None:
    days = [FIRST + timedelta(days=n) for n in range(31)]
    heavy = day_spans(dict.fromkeys(days, 10**6))
    ends = [*heavy[1:], days[-1] + timedelta(days=1)]
    assert [(end - start).days for start, end in zip(heavy, ends, strict=True)] == [16, 8, 4, 2, 1]
    assert day_spans(dict.fromkeys(days, 10)) == days[:1]  # too few for more than one file


LANDMARK, HALF_LIFE, HOLDOUT = date(2024, 2, 1), 10.0, date(2024, 3, 5)
DECAY = {"landmark": LANDMARK, "half_life_days": HALF_LIFE, "holdout_from": HOLDOUT}
DATED = DECAY | {"run_date": LAST}
AS_OF = {"landmark": LANDMARK, "holdout_from": HOLDOUT, "run_date": LAST}


def totals_oracle(events: pd.DataFrame, window: WindowSettings, *, min_users: int) -> dict[tuple[str, str], tuple[float, ...]]:
    """Weight, user-days, fit weight, conditional, cosine, jaccard and lift of every pair with enough true distinct users."""
    connection = duckdb.connect()
    daily = pd.DataFrame(oracle(events, window, min_users=10**6), columns=["d", "i", "j", "n", "hashes"])
    mirrored = daily.rename(columns={"i": "j", "j": "i"}) if window.symmetric else daily[:0]
    connection.register("daily", pd.concat([daily, mirrored]))
    connection.register("raw", events)
    rows = connection.execute(f"""
        with p as (select item_id, count(distinct user_id || event_date) n from raw group by all),
        w as (select *, n * pow(2, date_diff('day', date '{LANDMARK}', d::date) / {HALF_LIFE}) f, d < '{HOLDOUT}' early from daily),
        t as (select i, j, sum(f) weight, sum(n) num, sum(f) filter (early) fit from w group by all),
        u as (select i, j, count(distinct h) users, count(distinct h) filter (early) fit_users
            from (select i, j, early, unnest(hashes) h from w) group by all),
        k as (select * from t join u using (i, j) where users >= {min_users})
        select i, j, weight, num, if(fit_users >= {min_users}, fit, 0), weight / sum(weight) over (partition by i),
            num / sqrt(a.n * b.n), least(1, num / greatest(a.n + b.n - num, num)), num * (select sum(n) from p) / (a.n * b.n)
        from k join p a on a.item_id = i join p b on b.item_id = j""").fetchall()
    return {(row[0], row[1]): tuple(float(value) for value in row[2:]) for row in rows}


@pytest.mark.parametrize("min_users", [2, 4])
def test_totals_equal_duckdb_and_keep_the_privacy_minimum(spark: SparkSession, min_users: int) -> None:
    events = world(seed=20 + min_users, num_events=260, num_items=16)
    frame = to_spark(spark, events)
    popularity = popular(frame).cache()
    daily = frame.transform(counter(SESSION, min_users=min_users)).cache()
    user_items = who(frame)
    summed = daily.transform(sum_totals(min_users=min_users, symmetric=True, **DECAY)).cache()
    totals = score(summed, popularity, user_items, max_pairs=100)
    measures = ["weight", "num_user_days", "fit_weight", "conditional", "cosine", "jaccard", "lift"]
    found = {(row.trigger_item_id, row.target_item_id): tuple(getattr(row, name) for name in measures) for row in totals.itertuples()}
    expected = totals_oracle(events, SESSION, min_users=min_users)
    all_pairs = {(row[1], row[2]) for row in oracle(events, SESSION)}
    assert 0 < len(expected) < 2 * len(all_pairs)  # the minimum cuts something, and a pair one user repeats is among it
    assert found.keys() == expected.keys()
    for pair, values in expected.items():
        assert found[pair] == pytest.approx(values, rel=1e-9), pair
    assert any(values[2] == 0 for values in expected.values())

    # the cut leaves the heaviest, ties by target id, whatever the partitions; conditional still is the share of all
    shuffled = daily.repartition(5).transform(sum_totals(min_users=min_users, symmetric=True, num_tasks=1, **DECAY))
    cut = score(shuffled, popularity, user_items, max_pairs=3, num_tasks=1)
    kept = {(row.trigger_item_id, row.target_item_id): row.conditional for row in cut.itertuples()}
    strongest = sorted(expected, key=lambda pair: (pair[0], -expected[pair][0], pair[1]))
    wanted = [pair for n, pair in enumerate(strongest) if n < 3 or strongest[n - 3][0] != pair[0]]
    assert kept.keys() == set(wanted)
    assert kept[wanted[0]] == pytest.approx(expected[wanted[0]][3])
    future = {(row.trigger_item_id, row.target_item_id): row.num_user_days for row in future_pairs(daily, symmetric=True).collect()}
    assert all(future[pair] == values[1] for pair, values in expected.items())
    for frame in (popularity, daily, summed):
        frame.unpersist()


@pytest.mark.parametrize(("window", "min_users"), [(SESSION, 2), (TIME, 4)], ids=["symmetric", "directed"])
def test_written_pairs_are_the_daily_rows_and_their_totals(
    spark: SparkSession, tmp_path: Path, window: WindowSettings, min_users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.pair_files._SPAN_ROWS", 60)
    frame = to_spark(spark, world(seed=40 + min_users, num_events=300, num_items=12)).where(F.col("event_date") >= F.lit(FIRST))
    days = engagements_per_day(frame)
    folders = {kind: str(tmp_path / kind) for kind in ("daily", "totals")}
    for folder in folders.values():
        Path(folder).mkdir()
    how = counting(window, min_users=min_users)
    later = to_spark(spark, world(seed=1, num_events=20)).withColumns(
        {"event_date": F.lit(LAST + timedelta(days=30)), "item_id": F.lit("new")}
    )
    sold = frame.withColumn("action", F.lit("sold")).withColumn("item_id", F.lit("i0"))
    events = event_files(frame.union(later).union(sold).repartition(2), tmp_path / "events", actions=("buy", "view"))
    files = write_pairs(spark, events, how, days=days, items=all_items(frame), folders=folders, num_tasks=3, **DECAY).collect()
    few = counting(window, max_items_per_user_day=2)
    cut = measure_days(spark, events, few, days=days, items=all_items(frame))
    alone = event_files(frame, tmp_path / "alone")
    assert counted(cut) == counted(measure_days(spark, alone, few, days=days, items=all_items(frame))) != []
    daily, totals = (spark.read.parquet(folders[kind]) for kind in ("daily", "totals"))
    expected = frame.transform(count_daily_pairs(how, days=days))
    assert counted(daily) == counted(expected)
    symmetric = window.symmetric
    summed = (
        expected.transform(sum_totals(min_users=min_users, symmetric=symmetric, **DECAY))
        .toPandas()
        .sort_values(["trigger_item_id", "target_item_id"])
    )
    written = totals.toPandas().sort_values(["trigger_item_id", "target_item_id"])
    pd.testing.assert_frame_equal(written.reset_index(drop=True), summed.reset_index(drop=True), rtol=1e-12)
    assert len(summed) > 10
    assert any(summed.fit_weight == 0)

    assert set(files[0].asDict()) == set(StructType.fromDDL(FILE_SCHEMA).names)
    sizes = {(file["kind"], file["name"]): file["size"] for file in files}
    assert sizes == {(kind, path.name): path.stat().st_size for kind in folders for path in Path(folders[kind]).iterdir()}
    spans = sorted({KnownFile.of(file)[1:] for file in files if file["kind"] == "daily"})
    assert len(spans) > 1  # a late event rewrites the files of some days only
    assert sum(file["num_rows"] for file in files if file["kind"] == "daily") == daily.count()


def test_popularity_equals_pandas(spark: SparkSession) -> None:
    events = world(seed=5)
    run_date = date(2024, 3, 4)
    as_of = {"landmark": LANDMARK, "run_date": run_date, "holdout_from": date(2024, 3, 3)}
    engaged = to_spark(spark, events).transform(sum_user_items(half_life_days=HALF_LIFE, **as_of))
    found = engaged.transform(count_popularity(**as_of))
    assert found.columns == list(ITEM_POPULARITY.column_names)
    days = events[events.event_date <= run_date].drop_duplicates(["item_id", "user_id", "event_date"]).copy()
    days["weight"] = [2.0 ** ((day - LANDMARK).days / HALF_LIFE) for day in days.event_date]
    days["fit_weight"] = days.weight.where(days.event_date < date(2024, 3, 3), 0.0)
    for row in found.collect():
        mine = days[days.item_id == row.item_id]
        assert row.num_user_days == len(mine)
        assert row.num_users == mine.user_id.nunique()
        assert row.weight == pytest.approx(mine.weight.sum(), rel=1e-9)
        assert row.fit_weight == pytest.approx(mine.fit_weight.sum(), rel=1e-9)
        assert (row.first_engaged_date, row.last_engaged_date) == (mine.event_date.min(), mine.event_date.max())
        assert (row.landmark_date, row.holdout_from, row.as_of) == (LANDMARK, date(2024, 3, 3), run_date)
    assert found.count() == days.item_id.nunique()


def test_holdout_start() -> None:
    def start(counts: dict[int, int], *, share: float, run_day: int) -> date:
        by_day = {date(2024, 3, day): count for day, count in counts.items()}
        return holdout_start(by_day, holdout_share=share, run_date=date(2024, 3, run_day))

    assert start({1: 50, 2: 30, 3: 15, 4: 5}, share=0.2, run_day=9) == date(2024, 3, 3)  # exactly a fifth
    assert start({1: 50, 2: 30, 3: 15, 4: 5}, share=0.21, run_day=9) == date(2024, 3, 2)
    assert start({1: 10, 2: 10, 9: 90}, share=0.1, run_day=9) == date(2024, 3, 8)  # before the run date
    assert start({8: 1, 9: 90}, share=0.1, run_day=9) == date(2024, 3, 9)  # but after the first day
    assert start({1: 1, 2: 9}, share=0.1, run_day=1) == date(2024, 3, 1)  # later days do not count
    with pytest.raises(SourceError, match="no engagements up to 2024-02-01"):
        holdout_start({FIRST: 1}, holdout_share=0.1, run_date=date(2024, 2, 1))


def test_no_engagements_give_no_pairs(spark: SparkSession) -> None:
    empty = spark.createDataFrame([], StructType.fromDDL(ENGAGEMENTS.ddl))
    daily = empty.transform(counter(TIME))
    assert daily.columns == list(CO_ENGAGEMENT_DAILY.column_names)
    popularity = popular(empty)
    totals = daily.transform(sum_totals(min_users=2, **DECAY))
    assert totals.columns == list(CO_ENGAGEMENT_TOTALS.column_names)
    assert score(totals, popularity, who(empty), max_pairs=9).empty
    rule: dict[str, Any] = {"max_pairs_per_trigger": 9, **AS_OF}
    assert write_scores(spark, {}, popularity, who(empty), folder="nowhere", **rule) == []


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(SettingsError, match="key of the user hashes is empty"):
        counter(TIME, hash_key=b"")
    with pytest.raises(SettingsError, match="no days to count"):
        counter(TIME, days={})
    with pytest.raises(SettingsError, match="half-lives before"):
        sum_user_items(**DATED | {"half_life_days": 0.01})


def test_more_items_than_an_index_holds_are_refused() -> None:
    check_num_items(2**31 - 1)
    with pytest.raises(SettingsError, match=r"found 2,147,483,648 different items, wanted at most 2,147,483,647: .*item_id"):
        check_num_items(2**31)


def test_a_long_key_is_taken_whole() -> None:
    long = os.urandom(100)
    assert keyed_hash("u", key=long) != keyed_hash("u", key=long[:64])
    assert keyed_hash("u", key=b"a") != keyed_hash("u", key=b"b")
