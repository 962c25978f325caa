"""The documentation keeps its word: generated pages are up to date, and every command of the tutorial runs."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf import errors
from conf.tables import MERGE_POLICY, TABLES
from jobs.method_pictures import pictures
from jobs.publication import published
from jobs.reader import open_table
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


@dataclass(frozen=True, kw_only=True)
class Shop:
    """What the tutorial leaves: its folder, and what its jobs printed, by module."""

    folder: Path
    said: dict[str, str]

    def run(self, command: str) -> str:
        """Run a job in this process, which shares the tests' Spark session; what it prints."""
        module, *arguments = shlex.split(command.partition(" -m ")[2], comments=True)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.chdir(self.folder)
            importlib.import_module(module).main(arguments)
        return out.getvalue()


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """The tutorial, typed in an empty folder. Spark's JVM stays where it was started: it needs absolute paths."""
    shop = Shop(folder=tmp_path_factory.mktemp("tutorial"), said={})
    for command in commands(TUTORIAL):
        if "-m jobs.explore" in command:
            serve(command, shop.folder)
        elif "-m jobs." in command:
            shop.said[command.partition(" -m ")[2].split()[0]] = shop.run(command)
        else:
            local = command.replace(".venv/bin/python", sys.executable).replace("path: var/shop", f"path: {shop.folder}/var/shop")
            subprocess.run(["bash", "-euc", local], check=True, cwd=shop.folder, capture_output=True)
    return shop


@pytest.mark.night
def test_the_tutorial_runs(shop: Shop) -> None:
    said = shop.said
    assert {"jobs.nightly", "jobs.show", "jobs.query", "jobs.look_up", "jobs.export"} == set(said)
    assert "Tomato sauce" in said["jobs.show"]
    assert len({"tomato-sauce", "parmesan", "basil", "olive-oil"} & set(re.findall(r"[a-z-]+", said["jobs.query"]))) >= 3
    assert re.match(r"\d[\d,]+ neighbors in var/shop/lists.parquet", said["jobs.export"])


@pytest.mark.night
def test_commands_of_the_readme_and_the_operations_guide_run(shop: Shop) -> None:
    """On the tutorial's shop: with its settings, date, items and run. Left out is what other tests run (servers, backtests)."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/operations.md"))
    lines = re.findall(r"^(?: {4})?((?:[^\s`]+/)?python -m jobs\..+)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`((?:\S+/)?python -m jobs\.[^`\n]+)`", text)
    lines = [line for line in lines if not re.search(r"jobs\.(explore|backtest)", line)]
    root = str(shop.folder / "var/lake/shop")
    run_id = published(root).run_id
    names = {
        r"2017-11-30-1a2b3c4d|RUN_ID": run_id,
        r"--config (demo|my\.yaml)": "--config var/shop/shop.yaml",
        r"20\d\d-\d\d-\d\d(?![-\d])": "2024-05-31",
        r"1029743|SKU-1": "spaghetti",
        r"1082185": "basil",
    }
    said: dict[str, list[str]] = {}
    for line in lines:
        for name, mine in names.items():
            line = re.sub(name, mine, line)
        if "jobs.rollback" in line and published(root).run_id == run_id:  # there must be something to roll back
            open_table(root, MERGE_POLICY).update(updates={"value": "0.02"})
            shop.run("python -m jobs.remerge --config var/shop/shop.yaml")
        said.setdefault(line.partition(" -m ")[2].split()[0], []).append(shop.run(line))
    jobs = ("build_pairs", "export", "look_up", "maintain", "nightly", "query", "remerge", "rollback", "show", "status")
    assert sorted(said) == [f"jobs.{name}" for name in jobs]
    assert len(said["jobs.nightly"]) >= 5
    assert "Tomato sauce" in said["jobs.show"][0]
    assert "tomato-sauce" in said["jobs.query"][0] + said["jobs.look_up"][0]
    assert json.loads(said["jobs.status"][-1])[0]["run_date"] == "2024-05-31"
    assert published(root).run_id.startswith(run_id)


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
