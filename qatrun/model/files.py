"""What a file really is, where it is not what its name says: told from its first bytes."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs"


def what_it_is(path: Path) -> str | None:
    """The rest of a sentence that begins with the file's name: empty, a Git LFS pointer, a web page; else None."""
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if not head:
        return "is empty" if path.stat().st_size == 0 else None
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    if head[:1] == b"<" and (head[:5].lower() in (b"<!doc", b"<html", b"<?xml", b"<head", b"<body")):
        return "is a web page, not the file itself: it must be downloaded again"
    return None
