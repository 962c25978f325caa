"""Numbers of a benchmark in the form of all: `var/bench/<name>.json` with the machine, the commit, and rows that replace each other."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]
FOLDER = Path("var/bench")
_KEY = ("work", "size", "method")


def kept_rows(path: Path) -> list[Json]:
    """All that is there."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def keep_row(row: Json, path: Path) -> None:
    """Add a row, which replaces that of the same work, size and method."""
    rows = [old for old in kept_rows(path) if any(old[name] != row[name] for name in _KEY)] + [row]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607
    model = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{len(os.sched_getaffinity(0))} cores, {model[0] if model else 'unknown'}, load {os.getloadavg()[0]:.1f}"
    content = {"machine": machine, "commit": commit, "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
