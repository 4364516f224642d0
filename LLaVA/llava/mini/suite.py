"""Small benchmarks with the columns of the real ones, built in seconds into the user's cache folder.

The eleven of the paper are one suite, those that have to be read another, each with a version and a folder of its own.

Every benchmark is a folder of parquet files that ``datasets.load_dataset(folder, ...)`` reads offline and that
lmms-eval's builtin task scores unchanged. The folders have the names of the real data sets below the suite's root: a
process whose working directory is that root finds them instead of the Hub's, even for a task whose code names a data
set (GQA's images).

Building checks every row and pixel against recorded hashes, so that a suite is the same on every machine. For the
command line, see ``python -m llava.mini.suite --help``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.benchmarks import BENCHMARKS, DOCUMENTS, PAPER, Benchmark, Data
from llava.command import Parser
from llava.files import MADE, made_folder, make_once, write_json
from llava.mini.benchmarks import BUILDERS, Table
from llava.mini.seeded_random import WORLD_VERSION

__all__ = ["DATA", "TASKS", "VERSION", "default_root", "prepare", "rows_of", "table_hash", "tasks_of", "version_of"]

RECORD_FILE = Path(__file__).with_name("suite.json")
RECORD_FILES = {PAPER: RECORD_FILE, DOCUMENTS: Path(__file__).with_name("documents.json")}
"""Group of benchmarks -> the hashes of its tables."""
MARKER = MADE


TASKS: dict[str, Benchmark] = {task: benchmark for benchmark in BENCHMARKS if (task := benchmark.mini)}
"""Embedded task -> its benchmark."""
DATA: dict[str, Data] = {task: benchmark.data for task, benchmark in TASKS.items() if benchmark.data}
"""Embedded task -> its data set."""


def tasks_of(group: str) -> dict[str, Benchmark]:
    """Those of `TASKS` that stand in a group."""
    return {task: benchmark for task, benchmark in TASKS.items() if benchmark.group == group}


def rows_of(task: str) -> int:
    """Number of questions of an embedded task."""
    data = DATA[task]
    return _recorded(TASKS[task].group)[f"{data.folder}/{data.config}/{data.split}"]["rows"]


def _recorded(group: str) -> dict[str, dict[str, Any]]:
    return json.loads(RECORD_FILES[group].read_text())


def version_of(group: str = PAPER) -> str:
    """The world's version and a digest of a suite's whole content."""
    whole = hashlib.sha256("".join(table["sha256"] for table in _recorded(group).values()).encode())
    return f"{WORLD_VERSION}-{whole.hexdigest()[:8]}"


VERSION = version_of()
"""Of the suite of eleven."""


def _name(group: str) -> str:
    return f"{'mini' if group == PAPER else group}-suite-{version_of(group)}"


def default_root(group: str = PAPER) -> Path:
    """The suite's folder: ``mini-suite-<VERSION>`` in ``$LLAVA_MINI_CACHE``, or in ``otprune`` in the user's cache.

    An OSError if that variable is not set and the user has no cache.
    """
    return made_folder(_name(group), "the mini suite")


def prepare(root: str | Path | None = None, force: bool = False, group: str = PAPER) -> Path:
    """Build the suite unless it is complete, and return its folder, absolute.

    It appears complete or not at all; see `llava.files.make_once`. The data of each of `TASKS` lie in their ``folder``
    below it.

    Parameters
    ----------
    root : path, optional
        The suite's own folder; by default `default_root(group)`.
    force : bool
        Rebuild it in any case.
    group : str
        Whose suite: that of the paper's benchmarks, or "documents".

    Raises
    ------
    OSError
        If `root` is a file, or a folder that is not empty and not a suite (`FileExistsError`), or cannot be written.
    RuntimeError
        If this machine produces other rows or pixels than recorded.
    """
    root = default_root(group) if root is None else Path(root).expanduser().absolute()
    make_once(
        root,
        version_of(group),
        "the mini suite",
        lambda building: _build(building, group),
        force,
        ours=root.name == _name(group),
    )
    return root


def _build(folder: Path, group: str) -> None:
    from tqdm import tqdm

    recorded = _recorded(group)
    for task in tqdm(tasks_of(group), desc=f"building {_name(group)}", unit="benchmark", disable=None):
        tables, data = BUILDERS[TASKS[task].name](), DATA[task]
        for table in tables:
            name = f"{data.folder}/{table.config}/{table.split}"
            found = table_hash(table.rows)
            if found != recorded[name]["sha256"]:
                raise RuntimeError(f"{name}: the rows made here have the hash {found}, not {recorded[name]['sha256']}")
        _write_tables(folder / data.folder, tables, version_of(group))


def table_hash(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of rows in order: of every value, and for an image of its mode, size and pixels."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps(row, sort_keys=True, default=_image_hash, ensure_ascii=False).encode() + b"\n")
    return whole.hexdigest()


def _image_hash(value: object) -> str:
    if not isinstance(value, Image.Image):
        raise TypeError(f"a row may hold images, text, numbers, lists and dicts, not {type(value).__name__}")
    pixels = hashlib.sha256(value.tobytes()).hexdigest()
    return f"{value.mode} {value.width}x{value.height} {pixels}"


def _write_tables(folder: Path, tables: list[Table], version: str = VERSION) -> None:
    """One parquet file per table, and a README whose ``configs`` name them for ``load_dataset``."""
    try:
        from datasets import Dataset, Features
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("building the mini suite needs the package datasets: pip install 'llava[train]'") from error

    lines = ["---", "configs:"]
    for table in tables:
        file = folder / table.config / f"{table.split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        features = Features({name: _feature(kind) for name, kind in table.columns.items()})
        pngs: dict[int, bytes] = {}
        columns = {name: [_stored(row[name], pngs) for row in table.rows] for name in table.columns}
        parquet.write_table(Dataset.from_dict(columns, features=features).data.table, file)
        lines += [f"- config_name: {table.config}", "  data_files:"]
        lines += [f"  - split: {table.split}", f"    path: {table.config}/{table.split}.parquet"]
    text = (
        f"Part of the mini suite {version}: drawn images and made-up questions in the columns of the real data set "
        "of this name. It is not that data set, and scores on it are not comparable."
    )
    (folder / "README.md").write_text("\n".join([*lines, "---", "", text, ""]))


def _feature(kind: Any) -> Any:
    from datasets import Image as ImageFeature
    from datasets import Value

    if isinstance(kind, dict):
        return {name: _feature(inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [_feature(kind[0])]
    return ImageFeature() if kind == "image" else Value(kind)


def _stored(value: Any, pngs: dict[int, bytes]) -> Any:
    """The value as parquet holds it: images as PNG bytes, each encoded once however often it occurs."""
    if isinstance(value, list):
        return [_stored(item, pngs) for item in value]
    if not isinstance(value, Image.Image):
        return value
    if id(value) not in pngs:
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        pngs[id(value)] = buffer.getvalue()
    return {"bytes": pngs[id(value)], "path": None}


def _record() -> None:
    """Record the hashes of what the builders make now, after an intended change of the world or a benchmark."""
    for group, file in RECORD_FILES.items():
        made = {name: build() for name, build in BUILDERS.items() if TASKS[f"mini_{name}"].group == group}
        tables = {
            f"{DATA[f'mini_{name}'].folder}/{table.config}/{table.split}": {
                "rows": len(table.rows),
                "sha256": table_hash(table.rows),
            }
            for name, several in made.items()  # the suite's version is a digest of the tables in this order
            for table in several
        }
        write_json(file, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: build the suite and print its folder."""
    parser = Parser("llava.mini.suite", __doc__)
    parser.add_argument("--output", metavar="DIR", help="the suite's folder (default: in the user's cache folder)")
    parser.add_argument("--force", action="store_true", help="rebuild the suite")
    parser.add_argument("--record", action="store_true", help="record new content hashes in the package, build nothing")
    about = "whose data sets: of the paper's eleven benchmarks, or of those to read (default: %(default)s)"
    parser.add_argument("--group", choices=tuple(RECORD_FILES), default=PAPER, help=about)
    return parser.run(_make, argv)


def _make(arguments: argparse.Namespace) -> None:
    if arguments.record:
        _record()
        print(*RECORD_FILES.values(), sep="\n")
    else:
        print(prepare(arguments.output, arguments.force, arguments.group))


if __name__ == "__main__":
    raise SystemExit(main())
