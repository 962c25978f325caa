"""Files that readers never see half of."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or as it was: a reader never sees half of it, and a full disk leaves no empty file."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
