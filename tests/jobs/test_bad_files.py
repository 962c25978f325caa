"""Files that no careful writer leaves: each is one clear error, or is read with what cannot be used refused and counted.

What ingest does with an events table is done here without a night: read, check, count.
"""

import codecs
import gzip
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from conf.errors import SourceError
from conf.settings import load_settings
from features.engagements import check_events, event_metrics
from jobs.sources import read_source, reading_sources
from tests.worlds import write_config

NIGHT, NOW = date(2024, 3, 31), datetime(2024, 6, 1, tzinfo=UTC)
AT = datetime(2024, 3, 1, 10, tzinfo=UTC)
COLUMNS: dict[str, Any] = {"who": ["u1", "u2"], "what": ["a", "b"], "at": [AT, AT], "basket": ["s", "s"]}
LINES = ["who,what,at,basket", "u1,a,2024-03-01,s", "u2,café,2024-03-01,s"]
Write = Callable[[Path], object]
CSV: dict[str, object] = {"format": "csv"}


def _parquet(*files: Mapping[str, Any]) -> Write:
    """Files of these columns, in the order of their days."""

    def write(folder: Path) -> None:
        for number, columns in enumerate(files):
            pq.write_table(pa.table(dict(columns)), folder / f"2024-03-0{number + 1}.parquet")

    return write


def _bytes(content: bytes, name: str = "events.csv") -> Write:
    return lambda folder: (folder / name).write_bytes(content)


def _csv(*lines: str, encoding: str = "utf-8") -> Write:
    return _bytes("\n".join([*lines, ""]).encode(encoding))


def _twice(name: str) -> Write:
    """A column more, whose name is there already."""
    names, values = [*COLUMNS, name], [*COLUMNS.values(), ["x", "y"]]
    arrays = [pa.array(column) for column in values]
    return lambda folder: pq.write_table(pa.Table.from_arrays(arrays, names=names), folder / "part-0.parquet")


def _structs(folder: Path) -> None:
    _parquet(COLUMNS | {"what": [{"id": "a"}, {"id": "b"}]})(folder)


# what lies in the folder, settings of the source, and what the error says
FAULTS: dict[str, tuple[Write, dict[str, object], str]] = {
    "ids are text, then numbers": (_parquet(COLUMNS, COLUMNS | {"what": [1, 2]}), {}, r"cannot read.*2024-03-0[12]\.parquet"),
    "ids are numbers, then text": (_parquet(COLUMNS | {"what": [1, 2]}, COLUMNS), {}, r"cannot read.*2024-03-0[12]\.parquet"),
    "times are timestamps, then text": (
        _parquet(COLUMNS, COLUMNS | {"at": ["2024-03-01"] * 2}),
        {},
        r"cannot read.*2024-03-0[12]\.parquet",
    ),
    "a column twice": (_twice("who"), {}, r"cannot read the events table.*`who`.*\n.*source\.events\.path"),
    "a column twice but for case": (_twice("WHO"), {}, r"cannot read the events table.*`who`"),
    "structs as ids": (_structs, {}, r"'what' is struct<id:string>; wanted text or an integer.*source\.events\.columns\.item_id"),
    "bytes as ids": (_parquet(COLUMNS | {"what": [b"a", b"b"]}), {}, "'what' is binary; wanted text or an integer"),
    "floats as ids": (_parquet(COLUMNS | {"what": [1.0, 2.0]}), {}, "store float ids as text or integer"),
    "nanoseconds": (_parquet(COLUMNS | {"at": pa.array([AT, AT], pa.timestamp("ns", "UTC"))}), {}, "cannot read the events table.*NANOS"),
    "a folder with a mark alone": (_bytes(b"", "_SUCCESS"), {}, "cannot read the events table.*infer"),
    "no bytes": (_bytes(b"", "part-0.parquet"), {}, r"cannot read .*part-0\.parquet"),
    "text that is called Parquet": (_csv(*LINES), {}, r"cannot read .*events\.csv"),
    "no Delta table": (_parquet(COLUMNS), {"format": "delta"}, "cannot read the events table"),
    "an empty file of text": (_bytes(b""), CSV, "the events table has no columns"),
    "a header twice": (_csv("who,who,what,at,basket", "u1,u1,a,2024-03-01,s"), CSV, r"missing columns \['who'\].*have \['who0', 'who1'"),
    "another separator": (_csv(*(line.replace(",", ";") for line in LINES)), CSV, r"missing columns .*have \['who;what;at;basket'\]"),
    "UTF-16 that is not said": (_csv(*LINES, encoding="utf-16"), CSV, "missing columns"),
    "no header": (_csv(*LINES[1:]), CSV, r"missing columns .*have \['u1', 'a', "),
    "half an archive": (
        _bytes(gzip.compress("\n".join(LINES * 500).encode())[:-60], "events.csv.gz"),
        CSV,
        r"cannot read.*events\.csv\.gz",
    ),
    "no archive": (_bytes(b"\x1f\x8b" + b"x" * 200, "events.csv.gz"), CSV, "cannot read the events table: gzip data.*source.events.path"),
}
# what lies in the folder, settings of the source, rows that are read and refused
READ: dict[str, tuple[Write, dict[str, object], int, int]] = {
    "a new column": (_parquet(COLUMNS, COLUMNS | {"channel": ["web", "shop"]}), {}, 4, 0),
    "a column that is not mapped changes its type": (_parquet(COLUMNS | {"note": ["x", "y"]}, COLUMNS | {"note": [1, 2]}), {}, 4, 0),
    "the session is gone": (_parquet(COLUMNS, {name: COLUMNS[name] for name in ("who", "what", "at")}), {}, 4, 0),
    "the user has another name": (_parquet(COLUMNS, {"customer" if name == "who" else name: COLUMNS[name] for name in COLUMNS}), {}, 4, 2),
    "columns in another order": (_parquet(COLUMNS, dict(reversed(COLUMNS.items()))), {}, 4, 0),
    "ids that are all null": (_parquet(COLUMNS | {"what": pa.nulls(2)}), {}, 2, 2),
    "names in capitals": (_parquet({name.upper(): values for name, values in COLUMNS.items()}), {}, 2, 0),
    "a header alone": (_csv(LINES[0]), CSV, 0, 0),
    "a mark of byte order": (_bytes(codecs.BOM_UTF8 + "\n".join(LINES).encode()), CSV, 2, 0),
    "Latin-1 that is not said": (_csv(*LINES, encoding="latin-1"), CSV, 2, 1),
    "Latin-1 that is said": (_csv(*LINES, encoding="latin-1"), CSV | {"options": {"encoding": "ISO-8859-1"}}, 2, 0),
    "UTF-16 that is said": (_csv(*LINES, encoding="utf-16"), CSV | {"options": {"encoding": "UTF-16", "multiLine": "true"}}, 2, 0),
    "lines of Windows": (_bytes("\r\n".join(LINES).encode()), CSV, 2, 0),
    "a comma in an id": (_csv(LINES[0], "u1,a,b,2024-03-01,s", 'u1,"a,b",2024-03-01,s'), CSV, 2, 1),
    "rows that are too short": (_csv(LINES[0], "u1", "u1,a", "u1,a,2024-03-01"), CSV, 3, 2),
    "a line break in an id": (_csv(LINES[0], 'u1,"a\nb",2024-03-01,s'), CSV, 2, 2),
    "a quote that is not closed": (_csv(LINES[0], 'u1,"a,2024-03-01,s', *LINES[1:]), CSV, 3, 1),
    "a null byte": (_csv(LINES[0], "u1,a\x00b,2024-03-01,s"), CSV, 1, 0),
    "an archive": (_bytes(gzip.compress("\n".join(LINES).encode()), "events.csv.gz"), CSV, 2, 0),
}


def _counted(spark: SparkSession, folder: Path, write: Write, over: Mapping[str, object]) -> tuple[float, float]:
    (folder / "events").mkdir()
    write(folder / "events")
    mapped = {"user_id": "who", "item_id": "what", "engaged_at": "at", "session_id": "basket"}
    source = {"events": {"path": str(folder / "events"), "columns": mapped} | over, "items": {"path": str(folder / "items")}}
    settings = load_settings(str(write_config(folder, source=source)))
    with reading_sources(settings.source):
        frame = read_source(spark, settings.source.events, name="events")
        checked = check_events(frame, source=settings.source.events, run_date=NIGHT, now=NOW, hash_key=b"key")
        checked.select("reason", "row").collect()
        counted = event_metrics(checked, source=settings.source.events)
    return counted["num_source_events"], counted["num_rejected_events"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_table_that_cannot_be_read_is_one_clear_error(spark: SparkSession, tmp_path: Path, name: str) -> None:
    write, over, says = FAULTS[name]
    with pytest.raises(SourceError, match=f"(?s){says}"):
        _counted(spark, tmp_path, write, over)


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_is_counted(spark: SparkSession, tmp_path: Path, name: str) -> None:
    write, over, num_rows, num_refused = READ[name]
    assert _counted(spark, tmp_path, write, over) == (num_rows, num_refused)
