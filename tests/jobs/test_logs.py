"""What a log collector reads: one JSON object a line, with the night it is about, and nothing where people read."""

import io
import json
from collections.abc import Iterator

import pytest

from conf.errors import GateError
from conf.settings import LogSettings, load_settings
from jobs import logs
from jobs.arguments import parse, report_errors
from jobs.progress import Display


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    lines = io.StringIO()
    logs.configure(LogSettings(format="json"), stream=lines)
    yield lines
    logs.configure(LogSettings())


def test_lines_are_objects_that_say_which_night_and_stage(stream: io.StringIO) -> None:
    display = Display()
    with logs.about(run_id="2024-03-31-0a", stage="ingest"):
        display.say("[green]✓[/green] ingest: [bold]3 s[/bold]")
        display.say('two\nlines, a "quote" and \\[1]', level="warning")
    display.say("done")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [{name: value for name, value in line.items() if name != "time"} for line in lines] == [
        {"level": "info", "run_id": "2024-03-31-0a", "stage": "ingest", "message": "✓ ingest: 3 s"},
        {"level": "warning", "run_id": "2024-03-31-0a", "stage": "ingest", "message": 'two\nlines, a "quote" and [1]'},
        {"level": "info", "message": "done"},
    ]
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_an_error_that_ends_a_job_is_the_last_line(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report_errors(lambda: (_ for _ in ()).throw(GateError("found [1], wanted [2]")))  # type: ignore[misc]
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["level"], last["message"]) == ("error", "GateError: found [1], wanted [2]")
    assert capsys.readouterr().err == ""


def test_progress_is_a_line_now_and_then_and_no_bar(stream: io.StringIO) -> None:
    display, seen = Display(seconds_per_line=0.01), []
    with display.watch("training", lambda: (seen.append(1) or len(seen), 9.0, "steps")):  # type: ignore[func-returns-value]
        while len(seen) < 3:
            pass
    assert json.loads(stream.getvalue().splitlines()[0])["message"].startswith("training: 1/9 steps")


def test_the_setting_is_read_and_decides_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "demo", "--run-date", "2017-11-30"]
    assert not logs.is_json()
    arguments = parse([*flags, "--set", "log.format=json"], description="a night")
    try:
        assert logs.is_json()
        assert arguments.settings.fingerprint() == load_settings("demo", ["alerts.command=[mail]"]).fingerprint()
        Display().say("on standard error")
        assert json.loads(capsys.readouterr().err)["message"] == "on standard error"
    finally:
        parse(flags, description="a night")
    assert not logs.is_json()
