"""The same answer from other tools, each by the best query one can write: what `make bench-pairs` compares with.

The answer: per ordered pair (trigger, target) the user-days of its co-engagement, for pairs of at least two distinct users, written as
Parquet with the columns trigger_item_id, target_item_id, num_user_days. scipy knows no users: it counts all pairs of a log in which a user
has one session a day, and is compared where it has the same pairs.

`min(user) <> max(user)` says "at least two distinct users" without counting them; symmetric pairs are counted once and mirrored at the end.
"""

# ruff: noqa: S608 - paths, columns and numbers of our own

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench_worlds import START, Work

Method = Callable[[Work, Path], None]
_MICROS = 1_000_000
HALF_LIFE_DAYS = 1000.0
"""Of the weights, here and in ours."""


def duckdb_pairs(work: Work, out: Path) -> None:
    """DuckDB: ids to integers, a self-join, distinct (pair, day, user), a group-by, ids to text."""
    counted = f"SELECT i, j, count(*) n FROM ({_found(work)}) GROUP BY i, j HAVING min(u) <> max(u)"
    _duckdb(work, out, f"CREATE TEMP TABLE counted AS {counted}", _totals_to(out, work, "n num_user_days"))


def duckdb_state(work: Work, out: Path) -> None:
    """DuckDB, writing all that mtmh writes: decayed weights, and the rows of each day with the two smallest user hashes."""
    weight, early = f"pow(2.0, d / {HALF_LIFE_DAYS})", "FILTER (d < 0)"  # the holdout begins on day 0, as ours does
    fit = f"CASE WHEN min(u) {early} <> max(u) {early} THEN sum({weight}) {early} ELSE 0 END"
    rows = "SELECT d, i, j, count(*) n, min(h, 2) h FROM found JOIN hashed USING (u) GROUP BY d, i, j"
    _duckdb(
        work,
        out,
        f"CREATE TEMP TABLE found AS {_found(work)}",
        "CREATE TEMP TABLE hashed AS SELECT u, hash(user_id) h FROM users",
        f"""COPY (SELECT DATE '{START.date()}' + d event_date, x.item_id trigger_item_id, y.item_id target_item_id, n num_users,
            r.h user_hashes FROM ({rows}) r JOIN items x USING (i) JOIN items y ON y.i = j)
            TO '{out.with_name("duckdb_state-days.parquet")}' (FORMAT parquet)""",
        f"""CREATE TEMP TABLE counted AS SELECT i, j, count(*) n, sum({weight}) w, {fit} f FROM found
            GROUP BY i, j HAVING min(u) <> max(u)""",
        _totals_to(out, work, "w weight, n num_user_days, f fit_weight"),
    )


def _duckdb(work: Work, out: Path, *statements: str) -> None:
    """Run statements over `items`, `users` and `e`: the engagements in numbers, days from the first one of the log."""
    import duckdb

    columns, joined = ("DISTINCT s, i, u", "JOIN sessions USING (session_id)") if work.window.kind == "session" else ("i, u, t", "")
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory = '{out.parent}/duckdb'; SET preserve_insertion_order = false; SET threads = 2")
    number = "row_number() OVER ()::INT"
    ids = (("items", "item_id", "i"), ("users", "user_id", "u"), ("sessions", "session_id", "s"))
    coded = (f"CREATE TEMP TABLE {name} AS SELECT {c}, {number} {n} FROM (SELECT DISTINCT {c} FROM events)" for name, c, n in ids)
    events = f"""CREATE TEMP TABLE events AS SELECT user_id, item_id, session_id, epoch_us(engaged_at) t, event_date
        FROM read_parquet('{work.folder}/*.parquet')"""
    e = f"""CREATE TEMP TABLE e AS SELECT {columns}, (event_date - DATE '{START.date()}')::INT d
        FROM events JOIN items USING (item_id) JOIN users USING (user_id) {joined}"""
    for statement in (events, *coded, e, *statements):
        connection.execute(statement)


def _found(work: Work) -> str:
    """Distinct pairs i, j by day d and user u; of sessions, each pair once."""
    on = "a.s = b.s AND a.i < b.i"
    if work.window.kind != "session":
        on = f"a.u = b.u AND a.i <> b.i AND b.t BETWEEN a.t AND a.t + {_window(work)}"
    return f"SELECT DISTINCT a.i i, b.i j, b.d d, a.u u FROM e a JOIN e b ON {on}"


def _totals_to(out: Path, work: Work, columns: str) -> str:
    """A statement that writes the table `counted` with ids as text, pairs of sessions in both orders."""
    mirror = "UNION ALL SELECT j, i, * EXCLUDE (i, j) FROM counted" if work.window.kind == "session" else ""
    return f"""COPY (SELECT x.item_id trigger_item_id, y.item_id target_item_id, {columns}
        FROM (SELECT i, j, * EXCLUDE (i, j) FROM counted {mirror}) JOIN items x USING (i) JOIN items y ON y.i = j)
        TO '{out}' (FORMAT parquet)"""


def polars_pairs(work: Work, out: Path) -> None:
    """Polars: the same plan on its streaming engine."""
    import polars as pl

    session = work.window.kind == "session"
    events = pl.scan_parquet(f"{work.folder}/*.parquet")
    group = "session_id" if session else "user_id"
    coded = events.select(
        *(pl.col(name).rank("dense").cast(pl.UInt32).alias(short) for name, short in ((group, "g"), ("user_id", "u"), ("item_id", "i"))),
        pl.col("engaged_at").dt.epoch("us").alias("t"),
        pl.col("event_date").cast(pl.Int32).alias("d"),
        "item_id",
    ).collect()
    names = coded.select("i", "item_id").unique().sort("i")["item_id"]
    e = coded.lazy().select("g", "u", "i", *(["d"] if session else ["t", "d"])).unique()
    pairs = e.join(e.select("g", pl.col("i").alias("j"), *([] if session else [pl.col("t").alias("tj"), pl.col("d").alias("dj")])), on="g")
    if session:
        pairs = pairs.filter(pl.col("i") < pl.col("j")).select("i", "j", "u", "d")
    else:
        near = (pl.col("tj") >= pl.col("t")) & (pl.col("tj") - pl.col("t") <= _window(work)) & (pl.col("i") != pl.col("j"))
        pairs = pairs.filter(near).select("i", "j", "u", pl.col("dj").alias("d"))
    users = pl.col("u")
    counted = pairs.unique().group_by("i", "j").agg(pl.len().alias("n"), users.min().alias("low"), users.max().alias("high"))
    found = counted.filter(pl.col("low") != pl.col("high")).select("i", "j", "n").collect(engine="streaming")
    if session:
        found = pl.concat([found, found.select(pl.col("j").alias("i"), pl.col("i").alias("j"), "n")])
    ids = {"trigger_item_id": names.gather(found["i"] - 1), "target_item_id": names.gather(found["j"] - 1)}
    pl.DataFrame(ids | {"num_user_days": found["n"]}).write_parquet(out)


def scipy_pairs(work: Work, out: Path) -> None:
    """scipy: the product of the sparse (sessions x items) matrix with itself, on one thread; no privacy minimum."""
    from scipy import sparse

    table = pq.read_table(work.folder, columns=["session_id", "item_id"])
    session, item = (table[name].combine_chunks().dictionary_encode() for name in ("session_id", "item_id"))
    rows, columns = (coded.indices.to_numpy() for coded in (session, item))
    matrix = sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(session.dictionary), len(item.dictionary)))
    matrix.data[:] = 1
    product = (matrix.T @ matrix).tocoo()
    kept = product.row != product.col
    names = item.dictionary
    columns_ = [names.take(pa.array(product.row[kept])), names.take(pa.array(product.col[kept])), pa.array(product.data[kept], pa.int64())]
    pq.write_table(pa.table(columns_, names=["trigger_item_id", "target_item_id", "num_user_days"]), out)


def self_join_pairs(spark: Any, work: Work, out: Path) -> None:
    """The Spark self-join that people write: text ids, adaptive execution."""
    events = spark.read.parquet(str(work.folder)).selectExpr(
        "user_id", "item_id", "session_id", "unix_micros(engaged_at) AS t", "event_date"
    )
    events.createOrReplaceTempView("events")
    group = "session_id" if work.window.kind == "session" else "user_id"
    near = "" if work.window.kind == "session" else f"AND b.t BETWEEN a.t AND a.t + {_window(work)}"
    found = spark.sql(f"""
        SELECT i trigger_item_id, j target_item_id, count(DISTINCT u, d) num_user_days FROM (
            SELECT a.item_id i, b.item_id j, a.user_id u, b.event_date d FROM events a JOIN events b
            ON a.{group} = b.{group} AND a.item_id <> b.item_id {near})
        GROUP BY i, j HAVING count(DISTINCT u) >= 2""")
    found.write.mode("overwrite").parquet(str(out))


def answers_differ(mine: Path, other: Path, *, other_has_more: bool) -> str | None:
    """What is different between two answers; None if nothing is.

    Args:
        mine: Parquet file or folder.
        other: another one.
        other_has_more: the other one may hold further pairs.
    """
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads = 2")
    columns = "trigger_item_id, target_item_id, num_user_days"
    for name, path in (("mine", mine), ("other", other)):
        place = f"{path}/*.parquet" if path.is_dir() else str(path)
        connection.execute(f"CREATE VIEW {name} AS SELECT {columns} FROM read_parquet('{place}')")
    missing = _one(connection, "SELECT count(*) FROM (SELECT * FROM mine EXCEPT ALL SELECT * FROM other)")
    sizes = [_one(connection, f"SELECT count(*) FROM {name}") for name in ("mine", "other")]
    if missing or (sizes[0] != sizes[1] and not other_has_more):
        return f"{missing} of {sizes[0]} pairs are not among the {sizes[1]} of the other"
    return None


def _one(connection: Any, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])


def _window(work: Work) -> int:
    assert work.window.window_seconds is not None
    return work.window.window_seconds * _MICROS
