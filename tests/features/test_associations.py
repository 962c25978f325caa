"""Association scores that a baseline ranks by, against their formulas written out in plain Python."""

import random
from collections import Counter
from datetime import datetime
from itertools import combinations
from math import log, sqrt

import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from conf.tables import ENGAGEMENTS
from features import swing
from features.pair_kernels import keyed_hash
from features.pair_scores import BM25_B, BM25_K1
from tests.features.test_pairs import (
    DECAY,
    HALF_LIFE,
    KEY,
    LANDMARK,
    SESSION_DIRECTED,
    counter,
    popular,
    score,
    sum_totals,
    to_spark,
    totals_oracle,
    who,
    world,
)

Pair = tuple[str, str]
CAP = 4


def sparse_world() -> pd.DataFrame:
    """Each of 12 users engages about half of 24 items, so that overlaps differ and a cap can leave a pair without users."""
    events, rng = world(seed=31, num_events=1500, num_users=12, num_items=24), random.Random(1)
    liked = {(f"u{user}", f"i{item}") for user in range(12) for item in range(24) if rng.random() < 0.5}
    return events[[(row.user_id, row.item_id) in liked for row in events.itertuples()]]


def scored(frame: DataFrame, *, max_users: int = 60, max_pairs: int = 100, num_tasks: int = 2) -> dict[Pair, dict[str, float]]:
    """The rows of co_engagement_pairs by pair."""
    popularity = popular(frame)
    users = who(frame, max_users=max_users)
    totals = frame.transform(counter(SESSION_DIRECTED)).transform(sum_totals(min_users=2, **DECAY))
    rows = score(totals, popularity, users, max_pairs=max_pairs, num_tasks=num_tasks)
    return {(row["trigger_item_id"], row["target_item_id"]): row for row in rows.to_dict("records")}


def decayed_jaccard(events: pd.DataFrame, weights: dict[Pair, float]) -> dict[Pair, float]:
    item: Counter[str] = Counter()
    for item_id, _, day in {(row.item_id, row.user_id, row.event_date) for row in events.itertuples()}:
        item[item_id] += 2.0 ** ((day - LANDMARK).days / HALF_LIFE)
    return {(i, j): min(1.0, both / max(item[i] + item[j] - both, both)) for (i, j), both in weights.items()}


def bm25(counts: dict[Pair, float]) -> dict[Pair, float]:
    length: Counter[str] = Counter()
    for (i, _), count in counts.items():
        length[i] += count
    mean = sum(length.values()) / len(length)
    num_triggers = Counter(j for _, j in counts)
    found = {}
    for (i, j), count in counts.items():
        idf = log(1 + (len(length) - num_triggers[j] + 0.5) / (num_triggers[j] + 0.5))
        found[i, j] = idf * count * (BM25_K1 + 1) / (count + BM25_K1 * (1 - BM25_B + BM25_B * length[i] / mean))
    return found


def swings(events: pd.DataFrame, pairs: set[Pair], *, max_users: int) -> dict[Pair, float]:
    items = {user: set(mine) for user, mine in events.groupby("user_id")["item_id"]}
    found = {}
    for i, j in pairs:
        kept = sorted((user for user in items if i in items[user]), key=lambda user: keyed_hash(user, key=KEY))[:max_users]
        both = [items[user] for user in kept if j in items[user]]
        found[i, j] = sum(1 / sqrt(len(u)) / sqrt(len(v)) / (swing.ALPHA + len(u & v)) for u, v in combinations(both, 2))
    return found


def column(rows: dict[Pair, dict[str, float]], name: str) -> dict[Pair, float]:
    return {pair: row[name] for pair, row in rows.items()}


def test_scores_equal_their_formulas(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    events = sparse_world()
    expected = totals_oracle(events, SESSION_DIRECTED, min_users=2)
    weights, counts = ({pair: values[n] for pair, values in expected.items()} for n in (0, 1))
    rows = scored(to_spark(spark, events))
    assert len(expected) > 200
    assert column(rows, "decayed_jaccard") == pytest.approx(decayed_jaccard(events, weights), rel=1e-9)
    assert column(rows, "bm25") == pytest.approx(bm25(counts), rel=1e-9)
    assert column(rows, "swing") == pytest.approx(swings(events, set(expected), max_users=60), rel=1e-9)

    # the cap leaves the smallest hashes, whatever the order of rows and tasks; BM25 sees what is kept
    shuffled = to_spark(spark, events.sample(frac=1, random_state=2)).repartition(3)
    capped = scored(shuffled, max_users=CAP, max_pairs=5, num_tasks=5)
    assert len(capped) < len(expected)
    wanted = swings(events, set(capped), max_users=CAP)
    assert column(capped, "swing") == pytest.approx(wanted, rel=1e-9)
    assert column(capped, "bm25") == pytest.approx(bm25(column(capped, "num_user_days")), rel=1e-9)
    ids = [pa.chunked_array([pa.array(side)]) for side in zip(*sorted(capped), strict=True)]
    monkeypatch.setattr(swing, "_BATCH_ITEMS", 1)  # each trigger in a sparse product of its own
    alone = swing.swing_scores(who(shuffled, max_users=CAP), *ids)
    assert dict(zip(sorted(capped), alone, strict=True)) == pytest.approx(wanted, rel=1e-9)
    assert 0.0 in wanted.values()
    assert any(wanted[pair] < rows[pair]["swing"] for pair in wanted)


def test_swing_of_a_single_pair_of_users(spark: SparkSession) -> None:
    def event(user: str, item: str, day: int) -> tuple[object, ...]:
        moment = datetime(2024, 3, day, 12)
        return (user, item, "buy", pd.Timestamp(moment), "s", 1.0, moment.date())

    events = [event(user, item, day) for user in "pq" for item, day in (("x", 2), ("y", 2), ("y", 3))] + [event("p", "z", 3)]
    later = [event(user, item, 7) for user in "pqr" for item in "xyv"]  # after the run date
    frame = to_spark(spark, pd.DataFrame(events + later, columns=list(ENGAGEMENTS.column_names)))
    rows = scored(frame)
    assert rows.keys() == {("x", "y"), ("y", "x")}  # they tie on day 2
    # of three and two items, two are shared
    assert column(rows, "swing") == pytest.approx(dict.fromkeys(rows, 1 / sqrt(3) / sqrt(2) / (1 + 2)), rel=1e-12)
    # y follows x on day 3 again: the pair outweighs x, and the score is capped
    assert rows["x", "y"]["decayed_jaccard"] == 1.0
    assert 0.0 < rows["y", "x"]["decayed_jaccard"] < 1.0
