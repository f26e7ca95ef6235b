"""Files that go into a sandbox, come out of it, or must be gone before the next job."""

from __future__ import annotations

import base64
import json
import os


def write_files(data: bytes) -> None:
    """Put the given files below the working directory; a name that ends in / is a folder."""
    for name, content in json.loads(data).items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if not name.endswith("/"):
            with open(name, "wb") as file:
                file.write(base64.b64decode(content))


def collect(patterns: list[str], most: int) -> dict[str, str]:
    """The regular files below the working directory that match, as base64, as long as they fit."""
    import fnmatch

    found: dict[str, str] = {}
    for folder, inner, names in os.walk(".") if patterns else ():
        inner[:] = [name for name in inner if not is_mount(os.path.join(folder, name))]
        for name in names:
            path = os.path.join(folder, name)[2:]
            if not any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
                continue
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with os.fdopen(fd, "rb") as file:
                    content = file.read(most + 1)
            except OSError:
                continue
            most -= len(content)
            if most >= 0:
                found[path] = base64.b64encode(content).decode()
    return found


def empty(folder: str) -> None:
    """Delete what is in a folder. No name gets long, however deep it goes: inner folders are moved up. What
    is another file system (the interpreter, where it lies here) stays."""
    waiting = [entry.path for entry in os.scandir(folder) if not is_mount(entry.path)]
    while waiting:
        path = waiting.pop()
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            continue
        os.chmod(path, 0o700)
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)  # a folder that cannot be written to cannot be moved
                moved = os.path.join(folder, os.urandom(8).hex())
                os.rename(entry.path, moved)
                waiting.append(moved)
            else:
                os.unlink(entry.path)
        os.rmdir(path)


def is_mount(path: str) -> bool:
    """Whether another file system begins here; not, if a program took it away."""
    try:
        return os.lstat(path).st_dev != os.lstat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False
