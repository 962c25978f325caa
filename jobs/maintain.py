"""House-keeping of a lake, without Spark: `python -m jobs.maintain --config demo`, once a week or once a night.

Compacts tables to which nights add small files, forgets what belongs to nights that are kept no longer, and removes files that no
version of the last `lake.keep_nights` days names. Whatever a kept night, a rollback or the next night's increments read stays. Logs of
older versions are removed by Delta itself, with every checkpoint.
"""

import argparse
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from conf.settings import LakeSettings, Settings
from conf.tables import (
    ENGAGEMENTS,
    EVALUATION,
    ITEM_ANNOTATIONS,
    ITEM_NEIGHBORS,
    PAIR_RELEVANCE,
    REJECTED_ROWS,
    RELEVANCE_FEEDBACK,
    RUNS,
    Table,
    signals_of,
    tables_with,
)
from jobs.arguments import add_config, report_errors, settings_of
from jobs.ledger import Ledger
from jobs.publication import kept_runs
from jobs.reader import kept_days, lake_root, open_table, shared_folder, table_exists

_GROWING = (ENGAGEMENTS, ITEM_ANNOTATIONS, PAIR_RELEVANCE, REJECTED_ROWS, RELEVANCE_FEEDBACK, EVALUATION, RUNS)
"""Tables that a night adds to; the others are written anew, or have files of a night or of some days on purpose, as the history does."""


def maintain(settings: Settings) -> list[dict[str, object]]:
    """Compact, forget, vacuum; per table what was done."""
    root, done = lake_root(settings.lake), list[dict[str, object]]()
    forget = _forgotten(root, settings.lake.keep_nights)
    for table in (table for table in _tables_ever(root, settings) if table_exists(root, table)):
        row: dict[str, object] = {"table": table.name, "forgotten_rows": 0, "compacted_files": 0}
        if table is REJECTED_ROWS and forget:
            named = ", ".join(f"'{run_id}'" for run_id in forget)
            row["forgotten_rows"] = open_table(root, table).delete(f"run_id IN ({named})")["num_deleted_rows"]
        if table in _GROWING:
            row["compacted_files"] = open_table(root, table).optimize.compact()["numFilesRemoved"]
        row["removed_files"] = _vacuum(root, table, _hours(settings.lake))
        done.append(row)
    done.append({"table": "_artifacts", "forgotten_rows": 0, "compacted_files": 0, "removed_files": _drop_artifacts(settings, forget)})
    return done


def _tables_ever(root: str, settings: Settings) -> list[Table]:
    """All tables, those of signals that are no longer in the settings included: what they held must go, too."""
    written = {name for record in Ledger(root=root).records() for name in record.output_versions}
    return tables_with(sorted({*settings.pairs.signals, *signals_of(written)}))


def _vacuum(root: str, table: Table, hours: int) -> int:
    """Remove files that no version of these hours names, those that no commit ever named included; how many."""
    full = table is not ITEM_NEIGHBORS  # a publication links old files there before its commit names them
    removed = open_table(root, table).vacuum(hours, dry_run=False, enforce_retention_duration=False, full=full)
    for checksum in Path(root, table.name).glob(".*.crc"):  # Hadoop's, beside each file on a local disk; a root that is a URI has none
        if not checksum.with_name(checksum.name[1:].removesuffix(".crc")).exists():
            checksum.unlink(missing_ok=True)
    return len(removed)


def _hours(lake: LakeSettings) -> int:
    """How long a file stays that the current version no longer names."""
    return 24 * kept_days(lake)


def _forgotten(root: str, keep_nights: int) -> list[str]:
    """Runs of nights more than `keep_nights` before the newest one, sorted; run ids are made of dates and hashes, nothing to escape."""
    dates = {record.run_id: record.run_date for record in Ledger(root=root).records()}
    if not dates:
        return []
    newest, kept = max(dates.values()), kept_runs(root)
    return sorted(run for run, day in dates.items() if newest - day > timedelta(days=keep_nights) and run not in kept)


def _drop_artifacts(settings: Settings, forget: Sequence[str]) -> int:
    """Remove checkpoints, indexes and reports of forgotten runs; returns the number of files."""
    count = 0
    for run_id in forget:
        folder: Path = shared_folder(settings.lake) / "_artifacts" / run_id
        if folder.is_dir():
            count += sum(1 for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
    return count


def tables_maintained(rows: Sequence[dict[str, object]]) -> RichTable:
    """For a terminal."""
    names = ["table", "forgotten_rows", "compacted_files", "removed_files"]
    table = RichTable(*(name.replace("_", " ") for name in names), title="house-keeping", title_justify="left")
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Keep the house."""
    parser = argparse.ArgumentParser(description="compact, forget old nights, vacuum")
    add_config(parser)

    def run() -> None:
        values = parser.parse_args(argv)
        Console().print(tables_maintained(maintain(settings_of(values))))

    report_errors(run)


if __name__ == "__main__":
    main()
