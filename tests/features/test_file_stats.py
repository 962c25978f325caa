"""Statistics of files: what readers outside Spark skip files by."""

import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from features.file_stats import FileStats

ROWS = pa.table(
    {
        "id": pa.array(["b", "a", "\u00e9", "x" * 5_000]).dictionary_encode(),
        "day": pa.array([date(2024, 1, 3), date(2024, 1, 1), date(2024, 1, 2), date(2024, 1, 1)]),
        "weight": [0.1, -1e300, 5e-324, 7.0],
        "num_users": [3, 2**62, 1, 2],
        "hashes": [[1], [], [3, 4], [5]],
    }
)


def test_ends_are_those_of_all_rows() -> None:
    stats, none = FileStats(), FileStats()
    for start in (2, 0):
        stats.add(ROWS.slice(start, 2).unify_dictionaries())
    stats.add(ROWS.slice(0, 0))
    found = json.loads(stats.as_json())
    assert found["numRecords"] == 4
    assert found["minValues"] == {"id": "a", "day": "2024-01-01", "weight": -1e300, "num_users": 1}
    assert found["maxValues"] == {"id": "\u00e9", "day": "2024-01-03", "weight": 7.0, "num_users": 2**62}
    assert found["nullCount"] == dict.fromkeys(found["minValues"], 0)
    none.add(ROWS.slice(0, 0))
    assert json.loads(none.as_json()) == {"numRecords": 0, "minValues": {}, "maxValues": {}, "nullCount": {}}


def test_every_row_is_found_by_every_column(tmp_path: Path) -> None:
    stats, rows = FileStats(), ROWS.cast(pa.schema([f.with_type(pa.string()) if f.name == "id" else f for f in ROWS.schema]))
    stats.add(ROWS)
    pq.write_table(ROWS, tmp_path / "part.parquet", store_schema=False)
    table = DeltaTable.create(str(tmp_path), rows.schema)
    size = (tmp_path / "part.parquet").stat().st_size
    added = AddAction("part.parquet", size, {}, modification_time=0, data_change=True, stats=stats.as_json())
    table.create_write_transaction([added], "append", table.schema(), [])
    dataset = DeltaTable(str(tmp_path)).to_pyarrow_dataset()
    for name in ("id", "day", "weight", "num_users"):
        for row in rows.to_pylist():
            assert row in dataset.to_table(filter=ds.field(name) == row[name]).to_pylist()
    assert dataset.to_table(filter=ds.field("id") == "aa").num_rows == 0
    assert not list(dataset.get_fragments(filter=ds.field("day") > date(2024, 1, 3))), "a file that cannot hold a row is skipped"
