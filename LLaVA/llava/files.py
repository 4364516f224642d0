"""Writes files atomically, and knows the cache folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MADE = "suite.json"
"""The file in a folder of `make_once` that says which version it holds, and the sizes of its files."""


def atomic_write(path: Path | str, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file atomically: nobody reads an incomplete file, and the old content stays if writing fails.

    Parameters
    ----------
    path : path
        A missing folder is created. Of a link, the target is written; devices and pipes are written to directly.
    content : str, bytes or callable
        Text is written as UTF-8, with lone surrogates (from names that are not UTF-8) as escapes that JSON can read. A
        callable gets the path to write to.

    Raises
    ------
    OSError
        One sentence with the file and the reason.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            _fill(path, content)
            return
        target = path.resolve()
        _refuse_what_cannot_be(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not the process id: processes of two machines may write into one folder.
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            _fill(part, content)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(_sentence(path, error)) from error


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise an `OSError` where safetensors or PyTorch raise errors of their own because the system cannot write."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        if "inline_container.cc" in str(error):  # PyTorch's writer
            raise OSError(None, "not all of it could be written; the disk may be full") from error
        raise


def cache_folder() -> Path:
    """The user's cache folder: ``otprune`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises
    ------
    OSError
        If the variable is not set and the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "otprune"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder for a cache") from None


def made_folder(name: str, what: str) -> Path:
    """Where something that this package makes at first use lies: in ``$LLAVA_MINI_CACHE``, or in `cache_folder`.

    Raises
    ------
    OSError
        If that variable is not set and the user has no cache; names ``what`` has no place.
    """
    try:
        base = Path(os.environ.get("LLAVA_MINI_CACHE") or cache_folder()).expanduser()
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"no place for {what} ({error}): set LLAVA_MINI_CACHE to a folder") from None
    return base.absolute() / name


def make_once(
    folder: Path, version: str, what: str, make: Callable[[Path], object], force: bool = False, ours: bool = False
) -> None:
    """Make a folder of files unless it is there and whole.

    It appears at once: it is made beside its place and then renamed. Of several processes that want it at the same
    time, one makes it and the others wait.

    Parameters
    ----------
    folder : Path
        Absolute.
    version : str
        Of the content; another one's folder is replaced.
    what : str
        For errors: "the mini suite".
    make : callable
        Is given a folder that is not there yet, and fills it.
    force : bool
        Make it anew even if it is there.
    ours : bool
        Whether a folder of this name is replaced whatever it holds; otherwise only if it is empty or holds `MADE`.

    Raises
    ------
    FileExistsError
        If something else is there.
    OSError
        If it cannot be written.
    """
    if _is_whole(folder, version) and not force:
        return
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{what} cannot be built in {folder.parent} ({error.strerror}): set LLAVA_MINI_CACHE anew"
        ) from None
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _is_whole(folder, version) and not force:
            return
        # Of a folder that somebody has emptied in part, its name or its marker is left.
        ours = folder.is_dir() and (ours or (folder / MADE).exists() or not any(folder.iterdir()))
        if folder.exists() and not ours:
            raise FileExistsError(f"{folder} is there and is not {what}; choose another folder or remove it")
        building = folder.with_name(f".{folder.name}-{secrets.token_hex(16)}")
        try:
            make(building)
            write_json(building / MADE, {"version": version, "files": _sizes(building)})
            if folder.exists():
                outdated = folder.with_name(f".{folder.name}-{secrets.token_hex(16)}")
                folder.rename(outdated)
                shutil.rmtree(outdated)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _is_whole(folder: Path, version: str) -> bool:
    """Whether all files of this version are there, of the size that they were written with."""
    marker = read_json(folder / MADE)
    marker = marker if isinstance(marker, dict) else {}
    return marker.get("version") == version and marker.get("files") == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MADE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def read_json(path: Path) -> Any:
    """The file's content, or None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path | str, content: Any) -> None:
    """`atomic_write` of indented JSON; values of other types are written as text."""
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_csv(path: Path | str, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """`atomic_write` of a table."""
    atomic_write(path, csv_text(header, lines))


def csv_text(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def check_writable(path: Path | str) -> None:
    """Check before long work that a file can be written after it. Nothing is created.

    Raises
    ------
    OSError
        As `atomic_write`.
    """
    path = Path(path)
    try:
        _refuse_what_cannot_be(path.resolve())
    except OSError as error:
        raise type(error)(_sentence(path, error)) from error


def _fill(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    if callable(content):
        with system_errors():
            content(path)
    else:
        path.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def _refuse_what_cannot_be(path: Path) -> None:
    """Raise the error of writing without trying, which would create folders and replace read-only files."""
    if path.is_dir():
        raise IsADirectoryError(None, "it is a folder")
    if path.exists() and not _may(path, os.W_OK):
        raise PermissionError(None, "it is read-only")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(None, f"{folder} is no folder")
    if not _may(folder, os.W_OK | os.X_OK):
        raise PermissionError(None, f"the folder {folder} is read-only")


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _sentence(path: Path, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror or error}"
