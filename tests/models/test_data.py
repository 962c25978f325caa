"""Arrays from pinned Delta tables."""

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from conf.errors import TableError
from models.data import TableRef, TrainingData, load_training_data, read_table, vocabulary_fingerprint
from tests.models.small_world import HALF_LIFE, HOLDOUT_FROM, RUN_DATE, SmallWorld

FIT_DATE = HOLDOUT_FROM - timedelta(days=1)  # counts before the holdout are as of its eve, as all counts are as of the run date


def test_arrays_agree_with_the_baskets(world: SmallWorld, data: TrainingData) -> None:
    n = len(world.item_ids)
    pairs = {name: np.zeros((n, n)) for name in ("full", "fit", "holdout")}
    popularity = np.zeros((2, n))
    by_day: dict[date, set[tuple[int, int, int]]] = {}
    items_of: dict[date, set[tuple[int, int]]] = {}
    for user, day, items in world.baskets():  # a user counts once per pair and day
        by_day.setdefault(day, set()).update((user, i, j) for i in items for j in items if i != j)
        items_of.setdefault(day, set()).update((user, i) for i in items)
    for day, triples in by_day.items():
        for _, i, j in triples:
            pairs["full"][i, j] += 2 ** ((day - RUN_DATE).days / HALF_LIFE)  # decayed as of the run date
            pairs["fit"][i, j] += 2 ** ((day - FIT_DATE).days / HALF_LIFE) if day < HOLDOUT_FROM else 0
            pairs["holdout"][i, j] += day >= HOLDOUT_FROM
    for day, couples in items_of.items():
        for _, i in couples:
            popularity[0, i] += 2 ** ((day - RUN_DATE).days / HALF_LIFE)
            popularity[1, i] += 2 ** ((day - FIT_DATE).days / HALF_LIFE) if day < HOLDOUT_FROM else 0
    np.testing.assert_allclose(data.full.pairs.toarray(), pairs["full"], rtol=1e-5)
    np.testing.assert_allclose(data.fit.pairs.toarray(), pairs["fit"], rtol=1e-5)
    np.testing.assert_array_equal(data.holdout.toarray(), pairs["holdout"])
    np.testing.assert_allclose([data.full.popularity, data.fit.popularity], popularity, rtol=1e-5)
    for history, last in ((data.full, RUN_DATE), (data.fit, FIT_DATE)):
        users = sorted({f"u{u}" for u, _, _ in world.baskets()})  # rows ascend by id
        engaged = {(users.index(f"u{u}"), i) for u, day, items in world.baskets() if day <= last for i in items}
        assert set(zip(*(a.tolist() for a in history.user_items.nonzero()), strict=True)) == engaged
        assert set(history.user_items.data.tolist()) == {1.0}
    assert data.item_ids.tolist() == world.item_ids
    np.testing.assert_array_equal(data.content, world.content())
    assert data.eligible.sum() == n - 1
    assert len(data.examples.target) == world.tables()["relevance_examples"].num_rows


def test_later_events_and_unknown_items_stay_out(world: SmallWorld, tmp_path: Path) -> None:
    refs = world.write(tmp_path)
    before = load_training_data(refs, run_date=RUN_DATE, half_life_days=HALF_LIFE, symmetric=True)
    tomorrow = RUN_DATE + timedelta(days=1)
    late = {
        "engagements": {"user_id": "u0", "item_id": "b00-c0", "event_date": tomorrow},
        "co_engagement_daily": {"event_date": tomorrow, "trigger_item_id": "b00-c0", "target_item_id": "b01-c0", "num_users": 9},
        "co_engagement_pairs": {"trigger_item_id": "gone", "target_item_id": "b01-c0", "weight": 5.0, "fit_weight": 5.0},
        "relevance_examples": {"item_id": "b00-c0", "other_item_id": "gone", "target": 1.0},
    }
    for name, row in late.items():
        schema = pa.schema([field for field in world.tables()[name].schema if field.name in row])
        write_deltalake(refs[name].uri, pa.Table.from_pylist([row], schema), mode="append", schema_mode="merge")
    after = {name: TableRef(uri=ref.uri, version=int(name in late)) for name, ref in refs.items()}
    again = load_training_data(after, run_date=RUN_DATE, half_life_days=HALF_LIFE, symmetric=True)
    for name in ("pairs", "user_items"):
        assert (getattr(again.full, name) != getattr(before.full, name)).nnz == 0, name
    assert (again.holdout != before.holdout).nnz == 0
    assert len(again.examples.target) == len(before.examples.target)


def test_a_version_is_pinned_and_faults_are_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for version, value in enumerate((1, 2)):
        write_deltalake(uri, pa.table({"a": [value]}), mode="overwrite")
        assert read_table(TableRef(uri=uri, version=version), ["a"])["a"].to_pylist() == [value]
    assert read_table(TableRef(uri=uri, version=0), ["a"])["a"].to_pylist() == [1]
    with pytest.raises(TableError, match=r"missing columns \['b'\].*have \['a'\]"):
        read_table(TableRef(uri=uri, version=0), ["b"])
    with pytest.raises(TableError, match="no Delta table at version 7"):
        read_table(TableRef(uri=uri, version=7), ["a"])
    with pytest.raises(TableError, match="no Delta table at version 0"):
        read_table(TableRef(uri=str(tmp_path / "absent"), version=0), ["a"])


def test_vocabulary_fingerprint_reads_ids_and_order() -> None:
    ids = ["a", "b", "ab"]
    prints = {vocabulary_fingerprint(np.array(order, dtype=str)) for order in (ids, ids[::-1], ["a", "ba", "b"], ["a", "b"])}
    assert len(prints) == 4
