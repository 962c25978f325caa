"""The rules of the repository, held by parsing it: import direction, length, documentation, locks.

And what set-up says when it cannot go on, on a machine that lacks Java, Python or uv.
"""

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.settings import Section
from conf.tables import TABLES
from tests.conftest import ROOT

PACKAGES = ("conf", "features", "models", "validation", "jobs")
MAY_IMPORT = {
    "conf": {"conf"},
    "features": {"conf", "features"},
    "models": {"conf", "models"},
    "validation": {"conf", "validation"},
    "jobs": set(PACKAGES),
}
BANNED = {
    "conf": {"torch", "pyspark", "delta", "feast", "faiss", "great_expectations"},
    "features": {"torch"},
    "models": {"pyspark", "delta", "feast"},
    "validation": {"torch"},
    "jobs": set[str](),
}
GENERATED = {".git", ".venv", ".jars", ".ivy", "var", "__pycache__", ".hypothesis", "spark-warehouse", "metastore_db", "derby.log"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no modules under {folders}"
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Where, and the full name of each imported module, also inside functions."""
    for node in ast.walk(parsed(path)):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from ((where, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: relative import; imports are absolute, e.g. features.pairs"
            yield where, node.module or ""


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file that is part of the project."""
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in GENERATED and not name.endswith("_cache")]
        for path in (Path(folder, name) for name in files if name not in GENERATED):
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8", errors="replace")


def test_imports_point_one_way() -> None:
    faults = []
    for package in PACKAGES:
        for where, name in (found for path in modules(package) for found in imports(path)):
            root = name.partition(".")[0]
            if root in {*PACKAGES, "tests"} and root not in MAY_IMPORT[package]:
                faults.append(f"{where}: {package} imports {name}; it may import {sorted(MAY_IMPORT[package])} and libraries")
            if root in BANNED[package]:
                faults.append(f"{where}: {package} imports {root}, which does not belong there")
    assert not faults, "\n".join(faults)


def test_modules_are_imported_by_full_name_only() -> None:
    # `spark-submit jobs/x.py` puts jobs/ first on sys.path: `import session` would work there and load the module twice
    bare = {path.stem for path in modules(*PACKAGES)} - {"__init__"} - set(sys.stdlib_module_names)
    faults = [
        f"{where}: imports {name} by its bare name" for path in modules(*PACKAGES, "tests") for where, name in imports(path) if name in bare
    ]
    assert not faults, "\n".join(faults)


def test_no_job_shadows_a_module_used_here() -> None:
    # for the same reason a jobs/queue.py would be found instead of the standard library's
    used = {name.partition(".")[0] for path in modules(*PACKAGES, "tests") for _, name in imports(path)}
    taken = (used | set(sys.stdlib_module_names) | set(PACKAGES)) - {"__future__"}
    assert not {path.stem for path in modules("jobs")} & taken


def test_no_scan_of_a_table_is_left_unfinished() -> None:
    """`Dataset.head` leaves threads of Arrow reading, and a process that ends meanwhile hangs: see jobs.reader.first_row."""
    found = [path.name for path in modules(*PACKAGES) if re.search(r"dataset\(\)\s*\.head\(", path.read_text(encoding="utf-8"))]
    assert found == []


def test_functions_are_short() -> None:
    lengths = {}
    for path in modules(*PACKAGES):
        for node in ast.walk(parsed(path)):
            if isinstance(node, Function):
                lengths[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    too_long = {name: length for name, length in lengths.items() if length > 70}
    assert not too_long, f"over 70 lines: {too_long}"
    assert statistics.median(lengths.values()) <= 12
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 40


def undocumented(path: Path) -> Iterator[str]:
    tree = parsed(path)
    if tree.body and not ast.get_docstring(tree):
        yield f"{path.relative_to(ROOT)}: module"
    owners: list[ast.Module | ast.ClassDef] = [
        tree,
        *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"),
    ]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_everything_public_is_documented() -> None:
    faults = [fault for path in modules(*PACKAGES) for fault in undocumented(path)]
    assert not faults, "\n".join(faults)


def test_every_table_and_column_has_a_comment() -> None:
    for table in TABLES.values():
        assert table.comment.endswith("."), table.name
        assert set(table.key) | set(table.order_by) <= set(table.column_names), table.name
        assert not [column.name for column in table.columns if len(column.comment) < 4], table.name


def sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    for known in section.__subclasses__():
        yield known
        yield from sections(known)


def test_every_setting_is_described() -> None:
    faults = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not (field.description or "").endswith(".")
    ]
    assert not faults, f"no sentence of description: {faults}"
    assert all(section.model_config.get("frozen") and section.model_config.get("extra") == "forbid" for section in sections())


MACHINE_PATHS = re.compile(r"(?<![\w.~*}$)-])/(?:work|root|home|Users|tmp)/\w")
HOSTS = re.compile(r"pypi\.org|pythonhosted\.org|repo1\.maven\.org|maven\.apache\.org|maven\.org|anaconda\.org|spark-packages\.org")


def test_no_file_names_a_machine_or_a_registry() -> None:
    faults = []
    for path, text in texts():
        in_tests = path.parts[0] == "tests"  # they may make up paths, and this file holds the patterns
        for number, line in enumerate(text.splitlines(), start=1):
            if not in_tests and (found := MACHINE_PATHS.search(line) or HOSTS.search(line)):
                faults.append(f"{path}:{number}: {found.group()}")
    assert not faults, "\n".join(faults)
    assert MACHINE_PATHS.search('root = "/tmp/lake"')
    assert HOSTS.search("https://pypi.org/simple")


def pins(lock: str) -> dict[str, str]:
    """Everything the lock says about each pin; a package may be pinned twice under different markers."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / lock).read_text())
    return {entry.partition(" ")[0]: entry for entry in entries}


def test_locks_pin_by_hash_and_name_no_index() -> None:
    for lock, asked in (("requirements.lock", "requirements.in"), ("requirements-dev.lock", "requirements-dev.in")):
        entries = pins(lock)
        assert not [name for name, entry in entries.items() if "==" not in name or "--hash=sha256:" not in entry], lock
        assert not re.search(r"index-url|find-links|trusted-host|://| @ ", (ROOT / lock).read_text()), lock
        wanted = re.findall(r"^([A-Za-z][\w-]*)", (ROOT / asked).read_text(), flags=re.MULTILINE)
        locked = {re.sub(r"[-_.]+", "-", name.partition("==")[0].partition("[")[0]).lower() for name in entries}
        assert {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} <= locked, f"{lock} is older than {asked}: run make lock"
    assert set(pins("requirements.lock")) <= set(pins("requirements-dev.lock")), "the two locks pin different versions: run make lock"


def test_one_delta_version_everywhere() -> None:
    makefile = re.search(r"^DELTA := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert makefile is not None
    assert f"\ndelta-spark=={makefile.group(1)} " in (ROOT / "requirements.in").read_text()
    assert re.findall(r"delta-spark_[\d.]+_[\d.]+:([\d.]+\d)", (ROOT / "jobs" / "session.py").read_text()) == [makefile.group(1)]


def make(*targets: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return subprocess.run(
        ["make", "--no-print-directory", *targets],
        cwd=folder,
        env=kept | {"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make (\S+) +\S", make().stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(phony.group(1).split())


def only(folder: Path, **programs: str) -> str:
    """A PATH with a shell's usual tools and nothing of ours, but for the given scripts."""
    folder.mkdir()
    for tool in ("sh", "make", "awk", "sed", "grep", "rm", "mkdir", "touch", "env"):
        found = [Path(place, tool) for place in os.environ["PATH"].split(os.pathsep) if Path(place, tool).exists()]
        (folder / tool).symlink_to(found[0])
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


SETUP_FAULTS = [
    ("java", {}, "found no java that runs at java, wanted Java 17 or 21: `apt-get install"),
    (
        "java",
        {"java": """echo 'openjdk version "11.0.2" 2019-01-15' >&2"""},
        'found openjdk version "11.0.2" 2019-01-15 at java, wanted Java 17',
    ),
    ("java", {"java": "exit 1"}, "found no java that runs"),  # macOS has such a placeholder
    ("env", {}, "found no python3, wanted Python 3.11"),
    ("env", {"python3": "[ $1 != -V ] || echo Python 3.9.2; [ $1 = -V ]"}, "found Python 3.9.2, wanted Python 3.11"),
    ("env", {"python3": "case $2 in *ensurepip*|uv) exit 1;; esac"}, "found python3 without the modules venv and ensurepip"),  # Debian
    ("lock", {}, "found no uv"),
]


@pytest.mark.parametrize(("target", "programs", "message"), SETUP_FAULTS)
def test_setup_says_in_one_line_what_is_missing(tmp_path: Path, target: str, programs: dict[str, str], message: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("Makefile", "requirements-dev.lock"):
        (project / name).write_text((ROOT / name).read_text())
    done = make(target, folder=project, PATH=only(tmp_path / "bin", **programs))
    assert done.returncode != 0
    assert message in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1, done.stdout + done.stderr
    assert not (project / ".venv").exists()


def test_an_interrupted_setup_does_not_look_finished(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements-dev.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    # uv makes an environment that runs, then fails to fill it
    script = 'case $1 in venv) mkdir -p .venv/bin; printf "#!/bin/sh\\n" > .venv/bin/python; chmod +x .venv/bin/python;; pip) exit 3;; esac'
    disk = "echo Filesystem 1024-blocks Used Available; echo disk 9000000 8700000 300000"
    programs = {"uv": script, "python3": "exit 0", "chmod": 'exec /bin/chmod "$@"', "df": disk}
    path = only(tmp_path / "bin", **programs)
    for _ in range(2):
        done = make("env", folder=tmp_path, PATH=path)
        assert done.returncode != 0, done.stdout
        assert "If the disk was full: found 0.3 GB free here and 0.3 GB free in /tmp, wanted 7 GB here" in done.stderr
        assert not (tmp_path / ".venv" / ".ok").exists()
    (tmp_path / "bin" / "uv").write_text((tmp_path / "bin" / "uv").read_text().replace("exit 3", ":"))
    assert make("env", folder=tmp_path, PATH=path).returncode == 0
    assert (tmp_path / ".venv" / ".ok").exists()


def test_the_zip_is_importable_with_its_settings(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    made = make("--assume-old=env", "zip", f"PY={sys.executable}", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    code = "import conf.settings, jobs.pages; print(conf.settings.load_settings('demo').name, conf.settings.__file__)\n"
    code += "assert jobs.pages.environment().get_template('home.html') and jobs.pages.text('page.css')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": "mtmh.zip"}, cwd=tmp_path / "var", capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("demo ")
    assert "mtmh.zip" in done.stdout
