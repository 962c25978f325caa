"""What the last nights did, without Spark: `python -m jobs.status --config demo`."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from conf.errors import PublishError, TableError
from conf.settings import Settings
from conf.tables import RUNS
from jobs.arguments import add_config, report_errors, settings_of
from jobs.ledger import Ledger, StageRecord
from jobs.nightly import STAGES
from jobs.publication import base_run, published
from jobs.reader import lake_root, table_exists
from jobs.remerge import STAGE as REMERGE

_DONE = "done"


def last_nights(settings: Settings, count: int) -> list[dict[str, Any]]:
    """The newest runs, newest first: run_id, run_date, state, seconds, gates that failed or warned, notes, report, published.

    `state` is done, or names the stage that failed, or the one that is to come next (a night that runs, or was killed); of lists that were
    merged again it is that.

    Raises:
        TableError: no night has been run on this lake, or the first is in its first stage.
    """
    root = lake_root(settings.lake)
    records = Ledger(root=root).records() if table_exists(root, RUNS) else []
    if not records:
        raise TableError(f"no stage has ended yet on the lake {root}; run `python -m jobs.nightly`, or check lake.root and lake.variant")
    runs: dict[str, dict[str, StageRecord]] = {}
    for record in records:
        if record.stage in (*STAGES, REMERGE):
            runs.setdefault(record.run_id, {})[record.stage] = record
            runs[record.run_id] = runs.pop(record.run_id)  # behind all that were touched before
    try:
        current = published(root).run_id
    except PublishError:
        current = ""
    newest = list(reversed(runs.items()))[:count]
    nights = [_night(run_id, stages) | {"published": run_id == current} for run_id, stages in newest]
    reports = {run_id: next((r.report for r in reversed(stages.values()) if r.report), None) for run_id, stages in runs.items()}
    return [night | {"report": reports[night["run_id"]] or reports.get(base_run(night["run_id"]))} for night in nights]


def _night(run_id: str, stages: dict[str, StageRecord]) -> dict[str, Any]:
    failed = next((record for record in stages.values() if record.status == "failed"), None)
    waiting = next((stage for stage in STAGES if stage not in stages), None)
    done = "merged again" if REMERGE in stages else _DONE if waiting is None else f"before {waiting}"
    state = f"failed in {failed.stage}" if failed else done
    records = list(stages.values())
    notes = [note for record in records for note in record.notes]
    return {
        "run_id": run_id,
        "run_date": records[0].run_date.isoformat(),
        "state": state,
        "ended_at": records[-1].ended_at.isoformat(timespec="seconds"),
        "seconds": round(sum(record.seconds for record in records), 1),
        "warnings": [note.removeprefix("warning: ") for note in notes if note.startswith("warning: ")],
        "error": failed.error if failed else None,
    }


def table_of(nights: Sequence[dict[str, Any]]) -> RichTable:
    """The nights for a terminal."""
    table = RichTable("run", "state", "ended (UTC)", "minutes", "warnings", "published", title="the last nights", title_justify="left")
    for night in nights:
        shown = [night["ended_at"][:16], f"{night['seconds'] / 60:.1f}", "\n".join(night["warnings"]), "yes" if night["published"] else ""]
        table.add_row(night["run_id"], night["state"], *shown)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print the last nights."""
    parser = argparse.ArgumentParser(description="what the last nights did")
    add_config(parser)
    parser.add_argument("--nights", type=int, default=10, help="how many, newest first")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON list on standard output")

    def run() -> None:
        values = parser.parse_args(argv)
        nights = last_nights(settings_of(values), max(1, values.nights))
        if values.json:
            print(json.dumps(nights, indent=1))
            return
        console = Console()
        console.print(table_of(nights))
        if nights[0]["error"]:
            console.print(f"the newest failed: {nights[0]['error']}\nrun the same command again once that is mended", markup=False)

    report_errors(run)


if __name__ == "__main__":
    main()
