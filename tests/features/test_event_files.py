"""Engagements from files: every row once, whatever the parts, and only those that count."""

from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.event_files import EventRule, deal_files, read_events
from features.pair_kernels import day_number

FIRST = date(2024, 3, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Three files of 30, 5 and 1 events in row groups of 4; times as Spark writes them by default, and as others do."""
    folder = tmp_path_factory.mktemp("events")
    start = 0
    for name, size in (("large", 30), ("small", 5), ("tiny", 1)):
        numbers = range(start, start + size)
        times = [datetime(2024, 3, 1, tzinfo=UTC) + timedelta(hours=7 * n, microseconds=n) for n in numbers]
        rows = {
            "user_id": [f"ü{n % 7}" for n in numbers],
            "item_id": [f"i{n}" for n in numbers],
            "action": ["buy" if n % 3 else "view" for n in numbers],
            "engaged_at": pa.array(times, pa.timestamp("us", tz="UTC")),
            "session_id": pa.array([None if n % 5 == 0 else f"s{n % 2}" for n in numbers], pa.string()),
            "event_date": [at.date() for at in times],
        }
        old_times = {"use_deprecated_int96_timestamps": name == "large"}
        pq.write_table(pa.table(rows), folder / f"{name}.parquet", row_group_size=4, **old_times)
        start += size
    return {str(path): path.stat().st_size for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("task_bytes", [1, 1_000, 3_000, 1 << 30])
def test_parts_hold_every_row_once(files: dict[str, int], task_bytes: int) -> None:
    parts = deal_files(files, task_bytes=task_bytes)
    assert [part.task for part in parts] == sorted(part.task for part in parts)
    assert {part.task for part in parts} == set(range(parts[-1].task + 1))
    read = _read(files, EventRule(days=((0, day_number(date(2030, 1, 1))),), actions=None, by_session=False), task_bytes=task_bytes)
    assert sorted(read["item_id"].to_pylist()) == sorted(f"i{n}" for n in range(36))
    micros = dict(zip(read["item_id"].to_pylist(), read["time"].to_pylist(), strict=True))
    assert micros["i9"] == int(datetime(2024, 3, 1, tzinfo=UTC).timestamp() + 7 * 9 * 3600) * 1_000_000 + 9
    buckets = set(zip(read["user_id"].to_pylist(), read["bucket"].to_pylist(), strict=True))
    assert len(buckets) == 7  # a user has one bucket, in whatever file
    assert {bucket for _, bucket in buckets} <= {0, 1, 2}


def test_only_what_counts_is_read(files: dict[str, int]) -> None:
    read = _read(files, EventRule(days=((0, day_number(FIRST) + 4),), actions=("buy",), by_session=True))
    expected = {f"i{n}" for n in range(36) if n % 3 and n % 5 and 7 * n < 5 * 24}
    assert set(read["item_id"].to_pylist()) == expected
    assert read.column_names == ["bucket", "user_id", "session_id", "item_id", "day", "time"]


def test_days_are_read_and_other_row_groups_are_left_alone(files: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    first, groups = day_number(FIRST), list[int]()
    read_groups = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *a, row_groups, **k: groups.extend(row_groups) or read_groups(*a, row_groups=row_groups, **k)
    )
    read = _read(files, EventRule(days=((first, first), (first + 4, first + 5)), actions=None, by_session=False))
    wanted = {n for n in range(36) if 7 * n // 24 in (0, 4, 5)}
    assert set(read["item_id"].to_pylist()) == {f"i{n}" for n in wanted}
    assert len(groups) == len({n // 4 for n in wanted}), "row groups of four events each"


def test_small_files_share_a_task() -> None:
    parts = deal_files({f"f{n}": 10 for n in range(10)} | {"large": 95}, task_bytes=40)
    by_task = [[(part.uri, part.part, part.num_parts) for part in parts if part.task == task] for task in range(parts[-1].task + 1)]
    assert by_task[0] == [(f"f{n}", 0, 1) for n in range(4)]
    assert [part for task in by_task for part in task if part[0] == "large"] == [("large", n, 3) for n in range(3)]
    assert max(map(len, by_task)) == 4


def _read(files: dict[str, int], rule: EventRule, *, task_bytes: int = 1 << 30) -> pa.Table:
    parts = deal_files(files, task_bytes=task_bytes)
    rows = pa.RecordBatch.from_pylist([part._asdict() for part in parts])
    return pa.concat_tables(
        [pa.Table.from_batches([batch]) for batch in read_events([rows], rule=rule, num_buckets=3)]
    ).unify_dictionaries()
