"""Reads rows of data from a file, a folder or the hub; every mistake is one line that says where it is."""
import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit


class DataError(ValueError):
    """Data that cannot be used, in one line that names file, line and column."""


def read(path, config, split):
    """Yields (place, row) for each row, one at least; DataError where that fails.

    path: a .jsonl or .parquet file (whatever the split), a folder that holds {split}.jsonl or {split}.parquet, or else a hub
    id, with its configuration. place: file and line, for messages.
    """
    here, empty = Path(path).expanduser(), True
    try:
        if here.is_dir():
            here = file_of(here, split)
        if here.is_file():
            if here.suffix not in FORMATS:
                raise DataError(f"{here}: a data file must end in .jsonl or .parquet")
            rows = FORMATS[here.suffix](here)
        elif here.suffix in FORMATS or here.parent.exists() or not HUB_ID.fullmatch(path):
            raise DataError(f"{here}: no such file or folder")
        else:
            rows = hub_rows(path, config, split)
        for place, row in rows:
            yield place, row
            empty = False
        if empty:
            raise DataError(f"{here}: holds no rows")
    except OSError as error:
        raise DataError(f"{here}: cannot be read ({error.strerror or error})") from None


def file_of(folder, split):
    """The file of a split, which goes by the name of val or validation."""
    names = ("val", "validation") if split in ("val", "validation") else (split,)
    files = [folder / (name + suffix) for name in names for suffix in (".jsonl", ".parquet")]
    if found := next((file for file in files if file.is_file()), None):
        return found
    held = ", ".join(sorted(other.name for other in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder}: no {files[0].name} or {files[1].name} in this folder (it holds {held})")


def jsonl_rows(file):
    with open(file, "rb") as lines:
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {i}, column {error.colno}: broken JSON ({error.msg})") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {i}: cannot be read ({error})") from None
            yield f"{file}, line {i}", row


def parquet_rows(file):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file}: reading Parquet needs `pip install pyarrow`") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for i, row in enumerate((row for batch in parquet.iter_batches() for row in batch.to_pylist()), 1):
                yield f"{file}, row {i}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def hub_rows(path, config, split):
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise DataError(f"{path}: not a file or folder here; reading it from the hub needs `pip install datasets`") from None
    constants = huggingface_hub.constants
    was_offline = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable(constants.ENDPOINT):  # what is in the cache is still found, and half a minute of retries is spared
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(path, config, split={"val": "validation"}.get(split, split))
    except Exception as error:  # no network, no such set, no such split: the library has a dozen types for these
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a file or folder here, and the hub gives no split '{split}' of it ({reason})") from None
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = was_offline
    for i, row in enumerate(loaded, 1):
        yield f"{path}, row {i}", row


def reachable(endpoint):
    """Whether the hub's server takes a connection within 5 s; behind a proxy one cannot tell, and yes."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname, url.port or {"https": 443}.get(url.scheme, 80)), timeout=5).close()
        return True
    except (OSError, ValueError):  # ValueError: an address that is none
        return False


FORMATS = {".jsonl": jsonl_rows, ".parquet": parquet_rows}
HUB_ID = re.compile(r"(?!data/)\w[\w.-]*/[\w.-]+")  # OWNER/NAME; data/NAME is a folder that is not there


def fits(value, kind):
    """kind: a type, a list of one kind, or a dict of columns with theirs."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(name), of) for name, of in kind.items())
    return type(value) is kind


def check(row, columns, place):
    """DataError where a column is missing or of another kind."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with the columns {', '.join(columns)}")
    for column, kind in columns.items():
        if column not in row:
            raise DataError(f"{place}: column '{column}' is missing (needed are {', '.join(columns)})")
        if not fits(row[column], kind):
            wanted = json.dumps(kind, default=lambda kind: kind.__name__).replace('"', "")
            given = json.dumps(row[column], default=str)[:60]
            raise DataError(f"{place}: column '{column}' must be {wanted}, not {given}")
