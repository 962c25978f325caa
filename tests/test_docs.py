"""The documentation keeps its word: generated pages are up to date, and every command of the tutorial runs."""

import ast
import importlib
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf import errors
from conf.tables import TABLES
from jobs.method_pictures import pictures
from jobs.write_docs import EXAMPLES, pages
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_generated_pages_are_up_to_date() -> None:
    stale = [name for name, text in pages().items() if not (ROOT / "docs" / name).is_file() or (ROOT / "docs" / name).read_text() != text]
    assert stale == [], "run `make docs`"
    assert {path.name for path in (ROOT / "docs" / "tables").iterdir()} == {f"{name}.md" for name in [*TABLES, "README"]}
    assert set(EXAMPLES) <= set(TABLES)


def test_pictures_of_the_method_are_up_to_date_and_looked_at() -> None:
    """By their text: the last digits of a position may differ between machines."""
    folder, made = ROOT / "docs", pictures()
    texts = re.compile(r">([^<>]*\w[^<>]*)<")
    stale = [name for name, picture in made.items() if texts.findall(picture) != texts.findall((folder / name).read_text())]
    assert stale == [], "run `make docs`"
    shown = {f"pictures/{path.name}" for path in (folder / "pictures").iterdir()}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {name for name in shown if name not in text} == set()
    assert {name for name in shown if name.endswith(".svg")} == set(made)


def anchors(page: Path) -> set[str]:
    """What headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    linked = set()
    for page in PAGES:
        for link, anchor in re.findall(r"[]][(](?!https?:)([^)#]*)(?:#([^)]+))?[)]", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve() if link else page
            assert target.exists(), f"{page.relative_to(ROOT)} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)} links to #{anchor} of {target.name}"
            linked.add(target)
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page not in linked] == []


def commands(text: str) -> list[str]:
    """Blocks of shell commands; a job stands alone, as it is run in this process."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [part for block in blocks for part in (block.splitlines() if "-m jobs." in block else [block])]


@pytest.mark.night
def test_the_tutorial_runs(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder; jobs share the Spark session of the tests, whose JVM stays where it was started: it needs absolute paths."""
    monkeypatch.chdir(tmp_path)
    said: dict[str, str] = {}
    for command in commands(TUTORIAL):
        if "-m jobs.explore" in command:
            serve(command, tmp_path)
        elif "-m jobs." in command:
            module, *arguments = shlex.split(command.partition(" -m ")[2])
            importlib.import_module(module).main(arguments)
            said[module] = capsys.readouterr().out
        else:
            local = command.replace(".venv/bin/python", sys.executable).replace("path: var/shop", f"path: {tmp_path}/var/shop")
            subprocess.run(["bash", "-euc", local], check=True, cwd=tmp_path, capture_output=True)
    assert {"jobs.nightly", "jobs.show", "jobs.query", "jobs.look_up", "jobs.export"} == set(said)
    assert "Tomato sauce" in said["jobs.show"]
    assert len({"tomato-sauce", "parmesan", "basil", "olive-oil"} & set(re.findall(r"[a-z-]+", said["jobs.query"]))) >= 3
    assert re.match(r"\d[\d,]+ neighbors in var/shop/lists.parquet", said["jobs.export"])


def serve(command: str, folder: Path) -> None:
    """Run the explorer until it has found a misspelled item."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = shlex.split(re.sub(r"port=\d+", f"port={port}", command).partition(" -m ")[2])
    server = subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, env={"PYTHONPATH": str(ROOT)})
    try:
        answer = ""
        while "Spaghetti" not in answer:
            assert server.poll() is None, "the explorer has ended"
            time.sleep(0.1)
            try:
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/search?q=spagetti").read().decode()
            except OSError:
                continue
    finally:
        server.terminate()
        server.wait()


def test_operations_name_every_exit_code_and_airflow_starts_jobs_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MtmhError)]
    assert listed == {0, *(kind.exit_code for kind in kinds)}
    dag = ast.parse((ROOT / "docs" / "examples" / "airflow_dag.py").read_text(encoding="utf-8"))
    texts = [node for node in ast.walk(dag) if isinstance(node, ast.keyword) and node.arg == "bash_command"]
    words = ["".join(part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)) for node in texts]
    assert [command.split()[2] for command in words] == ["jobs.nightly", "jobs.maintain"]
    for command in words:
        module = importlib.import_module(command.split()[2])
        with pytest.raises(SystemExit):
            module.main(["--help"])
        known = capsys.readouterr().out
        assert [word for word in command.split() if word.startswith("--") and word not in known] == []
