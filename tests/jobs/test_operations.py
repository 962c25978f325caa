"""What operators use: exit codes, alerts, status, house-keeping, ranges of nights. Real files and a real HTTP server, no Spark."""

import json
import sys
import threading
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from conf import errors
from conf.errors import GateError, MtmhError, SettingsError, TableError
from conf.settings import AlertSettings, Settings, load_settings
from conf.tables import CO_ENGAGEMENT_DAYS, REJECTED_ROWS, RUNS
from jobs.alerts import alert
from jobs.arguments import parse, report_errors
from jobs.ledger import Ledger, StageRecord, recorded
from jobs.maintain import main as maintain_main
from jobs.maintain import maintain
from jobs.nightly import STAGES
from jobs.reader import artifacts_of, lake_root, open_table
from jobs.status import last_nights
from jobs.status import main as status_main
from tests.lakes import write_table
from tests.list_world import arrow_schema

FAILURE = {"run_id": "2024-03-31-0a", "run_date": "2024-03-31", "stage": "ingest", "error": "SourceError: gone", "report": "report.html"}
NEWEST = date(2024, 3, 31)


def _record(run_date: date, stage: str, *, fault: str | None = None, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    ended = datetime(run_date.year, run_date.month, run_date.day, 3, list(STAGES).index(stage), tzinfo=UTC)
    record = StageRecord(
        run_id=f"{run_date}-0a",
        run_date=run_date,
        stage=stage,
        attempt=1,
        status="failed" if fault else "succeeded",
        started_at=ended - timedelta(seconds=30),
        ended_at=ended,
        seconds=30.0,
        input_versions={},
        output_versions={},
        fingerprint="f",
        settings_fingerprint="s",
        metrics={},
        notes=list(notes),
        error=fault,
    )
    return asdict(record) | {"sequence": int(ended.timestamp())}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A lake with three nights: an old one, a good one with a warning, and the newest, which failed."""
    found = load_settings("demo", [f"lake.root={tmp_path}", "lake.keep_nights=5"])
    old = NEWEST - timedelta(days=6)
    for run_date, stages in ((old, STAGES), (NEWEST - timedelta(days=1), STAGES)):
        for stage in stages:
            write_table(
                tmp_path, RUNS, [_record(run_date, stage, notes=("warning: churn is high",) if stage == "publish_neighbors" else ())]
            )
        folder = artifacts_of(found.lake, f"{run_date}-0a")
        folder.mkdir(parents=True)
        (folder / "report.html").write_text("a night")
        rejected = {"run_id": f"{run_date}-0a", "source": "events", "row": "{}", "reason": "no item id"}
        write_table(tmp_path, REJECTED_ROWS, [rejected])
    write_table(tmp_path, RUNS, [_record(NEWEST, "ingest", fault="SourceError: no file")])
    return found


def test_every_error_has_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MtmhError) and kind is not MtmhError]
    assert len(kinds) >= 8
    for kind in kinds:
        with pytest.raises(SystemExit) as stopped:
            report_errors(lambda kind=kind: (_ for _ in ()).throw(kind("what was found")))  # type: ignore[misc]
        assert stopped.value.code == kind.exit_code > 1
    assert "error: what was found" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a defect: its traceback, and Python's own status 1
        report_errors(lambda: print(1 // 0))


def test_status_says_how_the_last_nights_ended(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    newest, good, old = last_nights(settings, 10)
    assert (newest["run_date"], newest["state"], newest["error"]) == ("2024-03-31", "failed in ingest", "SourceError: no file")
    assert (good["state"], good["warnings"], good["seconds"]) == ("done", ["churn is high"], 30.0 * len(STAGES))
    assert old["run_date"] == "2024-03-25"
    flags = ["--config", "demo", "--set", f"lake.root={settings.lake.root}", "--nights", "2"]
    status_main([*flags, "--json"])
    assert [night["run_id"] for night in json.loads(capsys.readouterr().out)] == ["2024-03-31-0a", "2024-03-30-0a"]
    status_main(flags)
    assert "the newest failed: SourceError: no file" in capsys.readouterr().out
    other = settings.model_copy(update={"lake": settings.lake.model_copy(update={"variant": "other"})})
    with pytest.raises(TableError, match="no stage has ended yet"):
        last_nights(other, 1)
    DeltaTable.create(f"{lake_root(other.lake)}/{RUNS.name}", schema=arrow_schema(RUNS))  # a first night that is in its first stage
    with pytest.raises(TableError, match="no stage has ended yet"):
        last_nights(other, 1)


def test_status_knows_lists_that_were_merged_again(settings: Settings, tmp_path: Path) -> None:
    night, failed = NEWEST - timedelta(days=1), {"run_id": "2024-03-30-0a.m4", "status": "failed", "error": "GateError: few"}
    write_table(tmp_path, RUNS, [_record(night, "publish_online") | {"run_id": "2024-03-30-0a.m3", "stage": "remerge", "sequence": 9**11}])
    write_table(tmp_path, RUNS, [_record(night, "publish_online") | {"run_id": "2024-03-30-0a.m3", "sequence": 9**11 + 1}])
    write_table(tmp_path, RUNS, [_record(night, "publish_online") | failed | {"stage": "remerge", "sequence": 9**11 + 2}])
    states = {row["run_id"]: (row["state"], row["error"]) for row in last_nights(settings, 2)}
    assert states == {"2024-03-30-0a.m3": ("merged again", None), "2024-03-30-0a.m4": ("failed in remerge", "GateError: few")}


def test_house_keeping_forgets_old_nights_and_no_other(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["table"]: row for row in maintain(settings)}
    assert rows["rejected_rows"]["forgotten_rows"] == 1
    assert rows["runs"]["compacted_files"] == 2 * len(STAGES) + 1
    assert rows["_artifacts"]["removed_files"] == 1
    kept = open_table(settings.lake.root, REJECTED_ROWS).to_pyarrow_table()["run_id"].to_pylist()
    assert kept == ["2024-03-30-0a"]
    assert not artifacts_of(settings.lake, "2024-03-25-0a").exists()
    assert artifacts_of(settings.lake, "2024-03-30-0a").exists()
    assert len(last_nights(settings, 10)) == 3  # the ledger itself is kept whole
    maintain_main(["--config", "demo", "--set", f"lake.root={settings.lake.root}", "--set", "lake.keep_nights=5"])
    assert "house-keeping" in capsys.readouterr().out


def test_tables_of_a_signal_that_is_gone_are_cleaned_up_like_all_others(settings: Settings) -> None:
    """They hold hashes of users, whose deletion must reach them, too."""
    table, row = CO_ENGAGEMENT_DAYS.of_signal("click"), {"event_date": NEWEST, "num_events": 1, "fingerprint": "f"}
    for _ in range(2):
        write_table(Path(settings.lake.root), table, [row])
    write_table(Path(settings.lake.root), RUNS, [_record(NEWEST, "build_pairs") | {"output_versions": {table.name: 1}}])
    assert "click" not in settings.pairs.signals
    assert table.name in {done["table"] for done in maintain(settings)}


def test_past_nights_are_those_of_earlier_dates_whenever_they_ran(settings: Settings) -> None:
    """History that is filled in later, with fewer rows, says nothing about what tonight should have."""
    root = Path(settings.lake.root)
    for days, volume in ((3, 100.0), (2, 101.0), (40, 7.0), (41, 6.0), (2, 102.0)):
        row = _record(NEWEST - timedelta(days=days), "ingest") | {"metrics": {"rows": volume}, "settings_fingerprint": "volumes"}
        number = 10**10 + len(open_table(str(root), RUNS).to_pyarrow_table())
        write_table(root, RUNS, [row | {"sequence": number}])
    past = Ledger(root=str(root)).metrics_before(NEWEST, stage="ingest", settings_fingerprint="volumes")
    assert [night["rows"] for night in past] == [6.0, 7.0, 100.0, 102.0]
    earlier = Ledger(root=str(root)).metrics_before(NEWEST - timedelta(days=39), stage="ingest", settings_fingerprint="volumes")
    assert [night["rows"] for night in earlier] == [6.0, 7.0]


class _Hook(BaseHTTPRequestHandler):
    bodies: list[dict[str, str]]

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def test_a_failure_is_told_to_a_command_and_a_webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, told = list[str](), tmp_path / "told"
    program = f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(os.environ['MTMH_STAGE'] + ' ' + os.environ['MTMH_ERROR'])"
    server = HTTPServer(("127.0.0.1", 0), type("Hook", (_Hook,), {"bodies": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MTMH_WEBHOOK", f"http://127.0.0.1:{server.server_port}/secret-path")
    alert(AlertSettings(command=[sys.executable, "-c", program]), FAILURE, say=said.append)
    assert told.read_text() == "ingest SourceError: gone"
    (body,) = server.RequestHandlerClass.bodies  # type: ignore[attr-defined]
    assert body == FAILURE | {"text": f"mtmh: night {FAILURE['run_id']} failed in ingest: SourceError: gone"}
    server.shutdown()
    server.server_close()
    assert said == []
    alert(AlertSettings(command=["no-such-program"]), FAILURE, say=said.append)
    assert [line.partition(",")[0] for line in said] == ["alerts.command failed", "the webhook in MTMH_WEBHOOK failed"]
    monkeypatch.setenv("MTMH_WEBHOOK", "http://127.0.0.1:9/secret-path with a space")  # no OSError, but an HTTPException that names it
    alert(AlertSettings(), FAILURE, say=said.append)
    assert said[-1] == "the webhook in MTMH_WEBHOOK failed, nobody was told: InvalidURL"
    assert "secret-path" not in " ".join(said)


def test_what_failed_is_not_hidden_by_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    like = StageRecord(**{name: value for name, value in _record(NEWEST, "ingest").items() if name != "sequence"})
    with (
        pytest.raises(GateError, match="found few lists") as raised,
        recorded(Ledger(root=str(tmp_path / "gone")), "remerge", run_id="2024-03-31-0a.m3", run_date=NEWEST, like=like),
    ):
        raise GateError("found few lists")
    assert "the failure could not be written to the table runs" in raised.value.__notes__[0]


def test_a_range_of_nights_is_checked() -> None:
    flags = ["--config", "demo", "--run-date", "2017-11-01"]
    arguments = parse([*flags, "--to", "2017-11-03"], description="nights", ranged=True)
    assert (arguments.run_date, arguments.last_date) == (date(2017, 11, 1), date(2017, 11, 3))
    assert parse(flags, description="a night", ranged=True).last_date == date(2017, 11, 1)
    with pytest.raises(SettingsError, match="--to 2017-10-30 is before --run-date 2017-11-01"):
        parse([*flags, "--to", "2017-10-30"], description="nights", ranged=True)
    with pytest.raises(SettingsError, match="--to 'soon' is not a day"):
        parse([*flags, "--to", "soon"], description="nights", ranged=True)
