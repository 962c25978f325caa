"""The README keeps its word: modules, flags, make targets, tables and the settings example exist as written."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from conf.settings import load_settings
from conf.tables import TABLES
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
GUIDES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "tutorial.md")
"""Pages by hand whose commands take too long to be run here; the tutorial's are run."""


def _flags(module: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return capsys.readouterr().out


def test_commands_name_modules_with_these_flags(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for kind, block in [*BLOCKS, *re.findall(r"```(\w+)\n(.*?)```", GUIDES, flags=re.DOTALL)] if kind == "sh"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]*python -m jobs[^`\n]*)`", README + GUIDES)
    commands = [line for line in lines if "jobs." in line or "jobs/" in line]
    assert len(commands) >= 6
    for command in commands:
        module = re.search(r"jobs[./](\w+)", command)
        assert module is not None, command
        known = _flags(f"jobs.{module.group(1)}", capsys)
        after = command[module.end() :].split("#")[0]
        for flag in re.findall(r"(?<=\s)--[a-z-]+", after):
            assert flag in known, f"{flag} in: {command}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|\n)make ([a-z-]+)", README + GUIDES + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in listed for target in named)


def test_every_table_is_described() -> None:
    described = {name for name in TABLES if f"`{name}`" in README}
    assert described == set(TABLES)


def test_the_settings_example_loads(tmp_path: Path) -> None:
    (example,) = [block for kind, block in BLOCKS if kind == "yaml"]
    path = tmp_path / "my.yaml"
    path.write_text(example)
    settings = load_settings(str(path))
    assert settings.source.events.columns.user_id == yaml.safe_load(example)["source"]["events"]["columns"]["user_id"]
    assert settings.lake.root == "var/lake/my"


@pytest.mark.parametrize("config", ["demo", "retail_gifts", "ifdb_games"])
def test_packaged_overlays_load(config: str) -> None:
    assert load_settings(config).name == config


def test_figures_are_those_of_the_measurements() -> None:
    """Recall and relevance of the table, a row a set in the order of docs/benchmarks.md; the soup's merged list is the demo's."""
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    sets = re.findall(r"^\*\*[^\n]+cut \d.+?\|$(?=\n\n)", measured, flags=re.DOTALL | re.MULTILINE)
    columns = ("mtmh merged (default)", "smooth_svd (best engagement-only on validation)", "counts", "content")
    rows = re.findall(r"^\|[^|]+\|((?: \**\d\.\d{4} · \d\.\d{4}\** \|)+)$", README, flags=re.MULTILINE)
    assert len(rows) == len(sets) == 3
    for part, row in zip(sets, rows, strict=True):
        cells = {line.split(" | ")[0].lstrip("| "): line.split(" | ") for line in part.splitlines() if line.startswith("| ")}
        wanted = [tuple(re.findall(r"\d\.\d{4}", cells[name][place])[0] for place in (1, 3)) for name in columns]
        assert re.findall(r"(\d\.\d{4}) · (\d\.\d{4})", row) == wanted
    shown = re.findall(r"^\| [12] \|.+\| ([^|:]+?)(?::[^|]*)? \|$", README, flags=re.MULTILINE)
    printed = measured[measured.index("(1100555)") :]
    listed = [line.split("│")[4].strip() for line in printed.splitlines() if re.match(r"│ \d │", line)][: len(shown)]
    assert len(shown) == 2
    assert all(name.startswith(start) for name, start in zip(shown, listed, strict=True)), (shown, listed)
