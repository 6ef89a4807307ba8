"""Sources that a library knows how to read: Parquet, Hugging Face `datasets`, TFDS, and pre-tokenised ArrayRecord.

Each is a `sources.Source`. The libraries are imported where they are used, because they take seconds and are optional.
"""

import bisect
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data import files, records
from lowrank_jax.data.files import Resumed
from lowrank_jax.data.records import BadRecord, Document

RUN = 64  # records of TFDS or ArrayRecord in a block, and rows of Parquet that are decoded together
PARQUET_BUFFER = 1 << 20  # bytes of a column that are read at a time, instead of a whole row group of it
OPENERS = 16  # threads that read the footers of many files
FEW_SHARDS = 256  # fewer Hugging Face shards than this are split further: it costs a request for each
META, FORMAT, SUFFIX = "meta.json", 1, ".array_record"
WRITER_OPTIONS = f"group_size:{RUN},uncompressed"  # records are read a block at a time; ids hardly compress


# ------------------------------------------------------------------------------------------------------------ Parquet


class Parquet(Resumed):
    """Parquet files, here or in a bucket; a block is a row group, of which only the columns that matter are read."""

    def __init__(self, paths: Sequence[str], text_key: str, messages_key: str, chats: bool):
        super().__init__()
        with ThreadPoolExecutor(OPENERS) as pool:
            facts = list(pool.map(_parquet_facts, paths))
        self._paths, self._keys = list(paths), (text_key, messages_key, chats)
        self._columns = records.roots(text_key, messages_key)
        self._firsts = [0, *itertools.accumulate(groups for _, groups, _ in facts)]
        self.blocks = self._firsts[-1]
        self.fingerprint = _fingerprint([(os.path.basename(p), *f) for p, f in zip(paths, facts)])
        self._footer = functools.lru_cache(OPENERS)(_parquet_footer)

    def document(self, row: tuple) -> Document:
        path, block, at, batch, i = row
        where = f"{path}, {_group(block - self._firsts[bisect.bisect_right(self._firsts, block) - 1])}, row {at}"
        try:
            record = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
        except ValueError as e:  # a string column may hold any bytes
            raise BadRecord(where, f"not UTF-8 text: {e}") from None
        return records.document(record, *self._keys, where, self._footer(path).schema.to_arrow_schema().names)

    def _read(self, block: int, start: int) -> Iterator[tuple]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = bisect.bisect_right(self._firsts, block) - 1
        path, group, at = self._paths[file], block - self._firsts[file], 0
        try:
            footer = self._footer(path)
            wanted = [name for name in footer.schema.to_arrow_schema().names if name in self._columns]
            with files.open_file(path) as f:
                options = {"buffer_size": PARQUET_BUFFER, "pre_buffer": False, "page_checksum_verification": True}
                table = pq.ParquetFile(f, metadata=footer, **options)
                for batch in table.iter_batches(RUN, [group], wanted, use_threads=False):
                    for i in range(max(0, start - at), batch.num_rows):
                        yield path, block, at + i, batch, i
                    at += batch.num_rows
        except (pa.ArrowException, OSError) as e:
            if _is_io_error(e):
                raise
            raise BadRecord(f"{path}, {_group(group)} from row {at}", f"damaged: {_line(e)}") from None


def _group(group: int) -> str:
    return f"row group {group}"


def _parquet_footer(path: str):
    import pyarrow.parquet as pq

    with files.open_file(path) as f:
        return pq.read_metadata(f)


def _parquet_facts(path: str) -> tuple[int, int, int]:
    """Size in bytes, row groups, rows."""
    import pyarrow as pa

    try:
        with files.open_file(path) as f:
            size = f.seek(0, io.SEEK_END)
        footer = _parquet_footer(path)
        return size, footer.num_row_groups, footer.num_rows
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; name its files, as in {path.rstrip('/')}/*.parquet") from None
    except (pa.ArrowException, OSError) as e:
        if _is_io_error(e):
            raise
        raise UsageError(f"{path} is not a Parquet file, or damaged: {_line(e)}") from None


def _is_io_error(e: Exception) -> bool:
    """Whether reading may work another time: Arrow calls damaged data an OSError too, but one without a number."""
    return isinstance(e, OSError) and not (type(e) is OSError and e.errno is None)


# ------------------------------------------------------------------------------------------------------- Hugging Face

FORMATS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
    ".arrow": ("arrow", {}),
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub", "fsspec"}


class HuggingFace(Resumed):
    """What the `datasets` library streams: a hub name, a folder, or one file; a block is a shard.

    Its own saved states are exact to a table only, so that a read begins afresh and skips to its row.
    """

    def __init__(self, name: str, config: str, split: str, text_key: str, messages_key: str, chats: bool):
        super().__init__()
        datasets = _import("datasets", "datasets")
        import huggingface_hub

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
        self._name, self._keys = name, (text_key, messages_key, chats)
        path = os.path.expanduser(name)
        self._local = os.path.exists(path)
        try:
            builder = _hf_builder(datasets, path if self._local else name, config)
            if hasattr(builder.config, "batch_size"):
                builder.config.batch_size = RUN  # Parquet: otherwise a whole row group is held in memory
            splits = builder.as_streaming_dataset()
            if split not in splits:
                raise UsageError(f"source hf:{name}: there is no split {split!r} in it; it has {', '.join(splits)}")
            data = splits[split]
            if data.num_shards < FEW_SHARDS and hasattr(data, "reshard"):
                data = data.reshard()
            self._names = data.column_names
            wanted = [n for n in self._names or () if n in records.roots(text_key, messages_key)]
            self._data = data.select_columns(wanted) if wanted else data  # images in the others are not decoded
            self.format = type(builder).__module__.rsplit(".", 1)[-1]
            self.paths = list(map(str, (builder.config.data_files or {}).get(split, [])))
            facts = files.fingerprint(self.paths) if self.paths else builder.hash
        except UsageError:
            raise
        except Exception as e:  # whatever a library and a network can come up with
            raise UsageError(f"source hf:{name}: cannot be opened: {_line(e)}") from None
        self.blocks = self._data.num_shards
        self.fingerprint = _fingerprint([config, split, self.blocks, facts])

    def document(self, row: tuple[int, int, dict]) -> Document:
        block, at, record = row
        return records.document(record, *self._keys, f"hf:{self._name}, shard {block}, row {at}", self._names)

    def _read(self, block: int, start: int) -> Iterator[tuple[int, int, dict]]:
        at = start
        try:
            shard = self._data.shard(self.blocks, block)
            for record in shard.skip(start) if start else shard:
                yield block, at, record
                at += 1
        except Exception as e:
            if self._local and not _is_io_error(e) or not self._local and not _is_network_error(e):
                raise BadRecord(f"hf:{self._name}, shard {block} from row {at}", f"damaged: {_line(e)}") from None
            if isinstance(e, OSError):
                raise
            raise OSError(f"hf:{self._name}: {_line(e)}") from e


def hugging_face(name: str, config: str, split: str, text_key: str, messages_key: str, chats: bool):
    """The split of a dataset; where its files can be read from the middle, through a reader that does.

    `datasets` reads a shard from its start: 4 GB into a file of JSON lines that takes as long as reading 4 GB.
    """
    keys = (text_key, messages_key, chats)
    found = HuggingFace(name, config, split, *keys)
    readers = {"json": files.JsonFiles, "parquet": Parquet}
    return readers[found.format](found.paths, *keys) if found.format in readers and found.paths else found


def _hf_builder(datasets, path: str, config: str):
    if os.path.isfile(path):
        stem = path.removesuffix(next((s for s in PACKED if path.endswith(s)), ""))
        suffix = os.path.splitext(stem)[1]
        if suffix not in FORMATS:
            raise UsageError(f"source hf:{path}: {suffix or 'no suffix'} is not one of {', '.join(FORMATS)}")
        module, options = FORMATS[suffix]
        return datasets.load_dataset_builder(module, data_files={"train": path}, **options)
    if "://" not in path and path.startswith((".", "/")) and not os.path.isdir(path):
        raise UsageError(f"source hf:{path}: no such file or folder")
    return datasets.load_dataset_builder(path, config or None)


def _is_network_error(e: Exception) -> bool:
    return isinstance(e, OSError) or any(kind.__module__.split(".")[0] in NETWORK for kind in type(e).__mro__)


# --------------------------------------------------------------------------------------------------------------- TFDS


class TFDS:
    """A TensorFlow dataset, read without TensorFlow; it is prepared (downloaded) once, as ArrayRecord files."""

    def __init__(self, name: str, split: str, text_key: str, messages_key: str, chats: bool):
        tfds = _import("tensorflow_datasets", "tensorflow-datasets array-record")
        self._name, self._keys = name, (text_key, messages_key, chats)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                tfds.disable_progress_bar()
                builder = tfds.builder(name, file_format="array_record")
                builder.download_and_prepare()  # returns at once where that was done before
            if re.match(r"[^\[+]*", split)[0] not in [*builder.info.splits, "all"]:
                splits = ", ".join(builder.info.splits)
                raise UsageError(f"source tfds:{name}: there is no split {split!r} in it; it has {splits}")
            self._data = builder.as_data_source(split)
        except UsageError:
            raise
        except Exception as e:
            raise UsageError(f"source tfds:{name}: cannot be opened: {_line(e)}") from None
        self._count = len(self._data)
        self.blocks = -(-self._count // RUN)
        self.fingerprint = _fingerprint([builder.info.full_name, split, self._count, int(builder.info.dataset_size)])

    def rows(self, block: int, start: int = 0) -> Iterator[int]:
        return iter(range(min(block * RUN + start, self._count), min((block + 1) * RUN, self._count)))

    def document(self, row: int) -> Document:
        where = f"tfds:{self._name}, record {row}"
        try:
            record = self._data[row]
        except OSError:
            raise
        except Exception as e:
            raise BadRecord(where, f"damaged: {_line(e)}") from None
        return records.document(record, *self._keys, where)


# -------------------------------------------------------------------------------------------------------- ArrayRecord


def encode_record(ids: np.ndarray, said: np.ndarray) -> bytes:
    """A document from BOS to EOS as bytes: ids as little-endian uint16 (or uint32 where one needs it), one bit for
    each token that carries weight unless all but BOS do, and a last byte that says which of these it is."""
    wide, masked = bool(ids.max(initial=0) > 0xFFFF), not _is_plain(said)
    mask = np.packbits(said, bitorder="little").tobytes() if masked else b""
    return ids.astype("<u4" if wide else "<u2").tobytes() + mask + bytes([wide | masked << 1])


def decode_record(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, said bool) of what `encode_record` gave; raises ValueError for anything else."""
    if not raw or raw[-1] > 3:
        raise ValueError("not a record of tokens")
    wide, masked, size = raw[-1] & 1, raw[-1] >> 1, len(raw) - 1
    width = 4 if wide else 2
    n = 8 * size // (8 * width + 1) if masked else size // width  # n ids and as many bits, rounded up to bytes
    if size != n * width + (-(-n // 8) if masked else 0):
        raise ValueError("a record of tokens is cut short")
    ids = np.frombuffer(raw, "<u4" if wide else "<u2", n).astype(np.int32)
    if masked:
        bits = np.frombuffer(raw, np.uint8, size - n * width, n * width)
        return ids, np.unpackbits(bits, count=n, bitorder="little").view(bool)
    said = np.ones(n, bool)
    said[:1] = False
    return ids, said


def _is_plain(said: np.ndarray) -> bool:
    return not said[:1].any() and bool(said[1:].all())


class ArrayRecord:
    """Documents that scripts/tokenize.py wrote: a folder of them, or a glob of shards; a block is 64 records.

    Whoever opens it checks that `tokenizer_sha256` and `chats` are those of the run.
    """

    def __init__(self, location: str):
        self._module = _import("array_record.python.array_record_module", "array-record")
        location = os.path.expanduser(location)
        pattern = os.path.join(glob.escape(location), "*" + SUFFIX) if os.path.isdir(location) else location
        self._paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not self._paths:
            raise UsageError(f"source arrayrecord:{location}: no such file; write it with scripts/tokenize.py")
        metas = {folder: _read_meta(folder) for folder in dict.fromkeys(map(os.path.dirname, self._paths))}
        kinds = {(m["tokenizer_sha256"], m["chats"]) for m in metas.values()}
        if len(kinds) > 1:
            raise UsageError(f"source arrayrecord:{location}: its folders differ in their tokenizer or --chats")
        ((self.tokenizer_sha256, self.chats),) = kinds
        if os.path.isdir(location) and len(self._paths) != metas[os.path.dirname(self._paths[0])]["shards"]:
            raise UsageError(f"source arrayrecord:{location}: shards are missing; write it again")
        self._reader = functools.lru_cache(RUN)(self._open)  # each holds a file open
        self._counts = [self._count(path, metas[os.path.dirname(path)]) for path in self._paths]
        self._firsts = [0, *itertools.accumulate(-(-n // RUN) for n in self._counts)]
        self.blocks = self._firsts[-1]
        facts = [(os.path.basename(p), os.path.getsize(p), n) for p, n in zip(self._paths, self._counts)]
        self.fingerprint = _fingerprint([self.tokenizer_sha256, self.chats, *facts])

    def rows(self, block: int, start: int = 0) -> Iterator[tuple[str, int, bytes]]:
        file = bisect.bisect_right(self._firsts, block) - 1
        path, first = self._paths[file], (block - self._firsts[file]) * RUN
        a, b = first + start, min(first + RUN, self._counts[file])
        if a >= b:
            return
        try:
            found = self._reader(path).read(a, b)
        except (RuntimeError, ValueError, IndexError) as e:
            raise BadRecord(f"{path}, record {a} to {b - 1}", f"damaged: {_line(e)}") from None
        yield from ((path, i, raw) for i, raw in enumerate(found, a))

    def document(self, row: tuple[str, int, bytes]) -> Document:
        path, i, raw = row
        try:
            ids, said = decode_record(raw)
        except ValueError as e:
            raise BadRecord(f"{path}, record {i}", str(e)) from None
        return {"ids": ids, "said": said}

    def _open(self, path: str):
        return self._module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")

    def _count(self, path: str, meta: dict) -> int:
        expected = meta["records"].get(os.path.basename(path))
        try:
            found = self._reader(path).num_records()
        except (RuntimeError, ValueError) as e:
            found = _line(e)
        if found != expected:
            raise UsageError(f"{path} is damaged, or was not written with its {META}; use scripts/tokenize.py again")
        return found


def _read_meta(folder: str) -> dict:
    path = os.path.join(folder, META)
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        wanted = {"tokenizer_sha256": str, "chats": bool, "shards": int, "records": dict}
        if meta["format"] == FORMAT and all(isinstance(meta[key], kind) for key, kind in wanted.items()):
            return meta
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; shards are written with scripts/tokenize.py") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{path} is not from this version of scripts/tokenize.py; write the shards with it")


# ------------------------------------------------------------------------------------------------------------- shared


def _import(module: str, packages: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as e:
        raise UsageError(f"this source needs a package ({e}): pip install {packages}") from None


def _fingerprint(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _line(e: BaseException) -> str:
    """The reason in one line, not too long."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 200 else text[:200] + "..."
