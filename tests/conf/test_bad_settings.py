"""Settings files and assignments that cannot be meant: one clear message each, whatever they hold, and no hang."""

from datetime import date
from pathlib import Path

import pytest

from conf.errors import SettingsError
from conf.settings import load_settings
from jobs.arguments import parse

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefghi", "bcdefghij", strict=True)
)

# content of a settings file, and what the message says
FILES: dict[str, tuple[bytes, str]] = {
    "a bomb of aliases": (BOMB.encode() + b"lake: *j\n", "aliases"),
    "a bomb in a list of numbers": (BOMB.encode() + b"evaluation: {cutoffs: *j}\n", "aliases"),
    "an alias of itself": (b"lake: &a {root: *a}\n", "alias inside"),
    "a tag that would run code": (b"lake: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "an unknown tag": (b"lake: !secret {root: x}\n", "not valid YAML"),
    "null bytes": (b"lake: {root: a\x00b}\n", "not valid YAML"),
    "no UTF-8": (b"lake: {root: caf\xe9}\n", "UTF-8"),
    "two documents": (b"lake: {root: a}\n---\nlake: {root: b}\n", "not valid YAML"),
    "a list": (b"- lake\n", "mapping"),
    "a word": (b"lake\n", "mapping"),
    "a section that is a word": (b"lake: here\n", "lake: "),
    "a key that is a number": (b"1: {root: a}\n", "1"),
    "a key twice": (b"lake: {root: a}\nlake: {root: b}\n", "twice"),
    "an unknown section": (b"lakes: {root: a}\n", "lakes"),
    "an unknown key": (b"lake: {roots: a}\n", "lake.roots"),
    "a brace that is not closed": (b"lake: {root: a\n", "not valid YAML"),
    "infinity": (b"pairs: {half_life_days: .inf}\n", "pairs.half_life_days"),
    "no number": (b"pairs: {half_life_days: .nan}\n", "pairs.half_life_days"),
    "a variant that leaves the lake": (b"lake: {variant: ../other}\n", "lake.variant"),
    "a variant that leaves the lake on a detour": (b"lake: {variant: a/../../other}\n", "lake.variant"),
    "a variant from the root": (b"lake: {variant: /etc}\n", "lake.variant"),
    "a name that is a path": (b"name: ../other\n", "name"),
    "a variant with a null byte": (b'lake: {variant: "a\\0"}\n', "lake.variant"),
}

# an assignment, and what the message says
ASSIGNMENTS = {
    "pairs": "wanted",
    "=1": "wanted",
    "pairs.half_life_days": "wanted",
    "pairs.half_life_days=": "pairs.half_life_days",
    "pairs.half_life_days=inf": "pairs.half_life_days",
    "pairs.half_life_days=.nan": "pairs.half_life_days",
    "pairs.half_life_days=ten": "pairs.half_life_days",
    "pairs.half_life_days.x=1": "pairs.half_life_days",
    "pairs..half_life_days=1": "pairs.",
    "retrieval.list_length=1e3.5": "retrieval.list_length",
    "retrieval.list_length=-3": "retrieval.list_length",
    "retrieval.list_length=99999999999999999999999": "retrieval.list_length",
    "pairs.window={kind: session, symmetric: maybe}": "pairs.window.symmetric",
    "pairs.window={kind: [session]}": "pairs.window.kind",
    "pairs.window={": "not valid YAML",
    "merge=[]": "merge",
    "merge=[{scope: a, kind: blend, value: 0}]": "default",
    "model.heads={}": "model.heads",
    "model.heads={engagement: {}}": "at least one task",
    "spark.driver_memory=lots": "spark.driver_memory",
    "source.events.time_format=%Q": "source.events",
    "lake.keep_nights=0": "lake.keep_nights",
}


@pytest.mark.parametrize("name", FILES)
def test_a_settings_file_that_cannot_be_meant(name: str, tmp_path: Path) -> None:
    content, says = FILES[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as raised:
        load_settings(str(path))
    assert says in str(raised.value), str(raised.value)
    assert len(str(raised.value)) < 2_000  # what was found is named, not poured out


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_an_assignment_that_cannot_be_meant(assignment: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings("demo", [assignment])
    assert ASSIGNMENTS[assignment] in str(raised.value), str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for path in (tmp_path / "folder.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(SettingsError, match=path.name):
            load_settings(str(path))
    with pytest.raises(SettingsError, match="no configuration named"):
        load_settings("../demo")


@pytest.mark.parametrize(
    "text", ["", "2017-02-29", "2017-13-01", "30.11.2017", "today", "2017-11-30T00:00", "٢٠١٧-11-30", "2017-11-30; DROP"]
)
def test_a_run_date_that_is_no_day(text: str) -> None:
    with pytest.raises(SettingsError, match="wanted YYYY-MM-DD"):
        parse(["--run-date", text, "--config", "demo"], description="a night")
    assert parse(["--run-date", "2016-02-29", "--config", "demo"], description="a night").run_date == date(2016, 2, 29)
