"""Sources of text: the standard library, local files, the Hugging Face hub, files inside a wheel, a synthetic language.

Every source is an ordered stream of `Document`s with stable ids. Its `identity` shows, without reading it all, whether
it is unchanged since it was prepared.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import platform
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from train.data.sources import synthetic
from train.data.sources.archives import archive_in, unpacked
from train.data.sources.file_formats import format_of
from train.data.sources.readers import Reader, write_ahead_log
from train.data.sources.records import Document, Fields, Records, Rejects
from train.data.sources.source_config import (
    FilesSource,
    HubSource,
    SourceConfig,
    StdlibSource,
    SyntheticSource,
    WheelSource,
)
from train.data.sources.wheel import wheel_files
from train.remote import RemoteFile, find_files, is_remote
from train.text_files import is_compressed
from transformer.errors import UserError, first_line
from transformer.paths import expanded

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_GENERATED = ("config-", "_sysconfigdata")  # made when this Python was built: they hold paths of the build machine


class FileStart(NamedTuple):
    """Where a file of a source begins, so that reading can begin there too."""

    file: int = 0
    """The number of the file."""
    document: int = 0
    """The number of its first document in the source."""
    rejected: int = 0
    """How many documents of the files before were left out as unreadable."""
    first_rejected: str = ""


def documents(
    config: SourceConfig,
    rejects: Rejects | None = None,
    *,
    begin: FileStart | None = None,
    starts: deque[FileStart] | None = None,
) -> Iterator[Document]:
    """The source's documents, always in the same order, none of them empty.

    Args:
        rejects: counts what `on_error: skip` leaves out; those of the files before `begin` included.
        begin: where to begin, one of `starts`; None: at the first document.
        starts: gets the beginning of each file, when that is reached. A source without files has none.

    Raises:
        UserError: a document cannot be read; it names file and line.
    """
    if isinstance(config, SyntheticSource):
        return synthetic.documents(config.limit or 0, config.mismatched)
    rejects = Rejects(config.on_error) if rejects is None else rejects
    begin = FileStart() if begin is None else begin
    if begin.rejected:
        rejects.count, rejects.first = begin.rejected, begin.first_rejected
    if isinstance(config, HubSource):
        found = _hub_documents(config, rejects)
    else:
        found = _file_documents(config, rejects, begin, deque() if starts is None else starts)
    return itertools.islice(found, None if config.limit is None else config.limit - begin.document)


def identity(config: SourceConfig) -> dict[str, Any]:
    """What the prepared tokens of this source depend on, as JSON values: settings, and each file's size and time.

    The standard library is identified by its Python version and file sizes, a wheel by its SHA-256, a hub data set by its
    revision. The mixture weight is left out: it changes which examples are drawn, not the tokens.
    """
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("weight", "streaming")
    }
    if isinstance(config, HubSource | WheelSource):
        return settings
    if isinstance(config, SyntheticSource):
        return settings | {"language": synthetic.VERSION}
    files = source_files(config)
    if remote := [[name, file.size, file.version] for name, file in files if isinstance(file, RemoteFile)]:
        return settings | {"files": remote}
    local = [(name, path) for name, path in files if isinstance(path, Path)]
    logs = [(f"{name}-wal", log) for name, path in local if (log := write_ahead_log(path)) is not None]
    stats = [(name, path.stat()) for name, path in [*local, *logs]]
    if isinstance(config, StdlibSource):
        return settings | {"python": platform.python_version(), "files": [[name, s.st_size] for name, s in stats]}
    return settings | {"files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats]}


def text_size(config: SourceConfig) -> int | None:
    """Bytes of text to expect, for a progress bar; None where that is not known before reading."""
    if not isinstance(config, StdlibSource | FilesSource) or config.limit is not None:
        return None
    files = source_files(config)
    if any(is_compressed(Path(name)) or format_of(Path(name)) != "text" for name, _ in files):
        return None
    return sum(file.size if isinstance(file, RemoteFile) else file.stat().st_size for _, file in files)


def source_files(config: StdlibSource | FilesSource | WheelSource) -> Sequence[tuple[str, Path | RemoteFile]]:
    """The files of a source that has files, sorted by name; a name is the path below the source's own folder."""
    if isinstance(config, StdlibSource):
        return _library_files(config.include_tests)
    if isinstance(config, WheelSource):
        return wheel_files(config.package, config.sha256, config.path)
    return find_files(config.path) if is_remote(config.path) else _local_files(config.path)


def _file_documents(
    config: StdlibSource | FilesSource | WheelSource, rejects: Rejects, begin: FileStart, starts: deque[FileStart]
) -> Iterator[Document]:
    if isinstance(config, StdlibSource):
        reader = Reader(format="python", records=Records(fields=Fields("text"), rejects=rejects))
    else:
        reader = Reader(
            format=config.format, records=config.records(rejects), encoding=config.encoding, separator=config.separator,
            table=config.table, query=config.query,
        )  # fmt: skip
    number = begin.document
    for file, (name, path) in enumerate(source_files(config)[begin.file :], begin.file):
        file_path = path.fetch() if isinstance(path, RemoteFile) else path
        folder = PurePosixPath(path.address).parent if isinstance(path, RemoteFile) else path.absolute().parent
        if isinstance(config, FilesSource) and (archive := archive_in(expanded(config.path))) is not None:
            # Not where it was unpacked.
            folder = PurePosixPath(archive.name, name.removeprefix(f"{archive.name}/")).parent
        starts.append(FileStart(file, number, rejects.count, rejects.first))
        for document in reader.read(file_path, name, folder.name):
            number += 1
            yield document


def _library_files(include_tests: bool) -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = _NOT_LIBRARY if include_tests else _NOT_LIBRARY | _TEST_FOLDERS
    files: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root)
        # Pruned while walking: installed packages are inside and may be many times larger than the library.
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(_GENERATED)]
        modules = [name for name in names if name.endswith(".py") and not name.startswith(_GENERATED)]
        files.extend(((below / name).as_posix(), Path(folder, name)) for name in modules)
    if not files:
        raise UserError(f"{root}: this Python has no library as source code; choose kind: files")
    return sorted(files)


def _local_files(pattern: str, named: str = "") -> list[tuple[str, Path]]:
    """The files that a pattern matches, sorted by name; `named` is the pattern in messages, if it is another one."""
    place = expanded(pattern)
    if (archive := archive_in(place)) is not None:
        inside = place.relative_to(archive)
        folder = unpacked(archive)
        found = _local_files(str(folder / ("**/*" if inside == Path() else inside)), pattern)
        return [(f"{archive.name}/{name}", path) for name, path in found]
    # These two are False for a name that no disk takes, such as a long one.
    if os.path.isdir(place):
        shown_as = named or pattern
        raise UserError(f"{shown_as}: this is a folder; name its files, such as {shown_as.rstrip('/')}/**/*.txt")
    if os.path.isfile(place):  # before globbing: a name may hold brackets
        return [(place.name, place)]
    paths = [Path(path) for path in glob.glob(str(place), recursive=True)]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), place.parts))
    root = Path(*fixed)
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if os.path.isfile(path))
    if not files:
        raise UserError(f"{named or pattern}: no such file (looked in {Path.cwd()}); correct path")
    return files


def _class_names(features: Mapping[str, Any], field: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replaces class numbers by class names, in a row of a data set that has names for them."""
    feature = features.get(field)
    feature = getattr(feature, "feature", feature)  # of a list of classes
    names = getattr(feature, "names", None)
    if names is None:
        return lambda row: row

    def name(number: Any) -> Any:
        if isinstance(number, list):
            return [name(one) for one in number]
        # Rows of a test set often have class -1.
        return names[number] if isinstance(number, int) and 0 <= number < len(names) else None

    return lambda row: row | {field: name(row[field])}


def _hub_documents(config: HubSource, rejects: Rejects) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(
            config.path,
            config.name or None,
            split=config.split,
            revision=config.revision or None,
            streaming=config.streaming,
        )
        fields = list(rows.column_names or ())
        records = config.records(rejects)
        if fields:
            rows = rows.select_columns(records.columns(fields, config.path))
        named = _class_names(rows.features or {}, config.label_field)
        for number, row in enumerate(rows):
            name = f"{config.path}:{number}"
            if document := records.document(records.of_arrow(named(row)), name, name):
                yield document
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{config.path}: cannot be read from the hub ({first_line(error)}); check path, name and split, and the network"
        ) from error
