"""Sources of Parquet, Hugging Face `datasets` and TFDS, which are imported late: they take seconds and are optional."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from lowrank_jax.config import UsageError
from lowrank_jax.data import blocks, files, records
from lowrank_jax.data.blocks import BadRecord, Document, InFiles, Source, may_pass, one_line

RUN = 64  # records of TFDS in a block, and rows of Parquet that are decoded together
PARQUET_BUFFER = 1 << 20  # bytes of a column that are read at once, instead of a whole row group of it
OPENERS = 16  # threads that read the footers of many files
FEW_SHARDS = 256  # a dataset with fewer Hugging Face shards is split further: that costs a request for each


class Parquet(InFiles):
    """Parquet files; a block is a row group, of which only the columns that matter are read."""

    def __init__(self, paths: Sequence[str], text_key: str, messages_key: str, chats: bool):
        with ThreadPoolExecutor(OPENERS) as pool:
            facts = list(pool.map(_parquet_facts, paths))
        self._keys, self._columns = (text_key, messages_key, chats), records.roots(text_key, messages_key)
        self.number_blocks(paths, [groups for _, groups, _ in facts])
        self.fingerprint = blocks.fingerprint([(os.path.basename(p), *f) for p, f in zip(paths, facts)])
        self._footer = functools.lru_cache(OPENERS)(_parquet_footer)

    def document(self, row: tuple) -> Document:
        path, group, number, batch, i = row
        where = self.place(row)
        try:
            record = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
        except ValueError as e:  # a string column may hold any bytes
            raise BadRecord(where, f"not UTF-8 text: {e}") from None
        return records.document(record, *self._keys, where, self._footer(path).schema.to_arrow_schema().names)

    def place(self, row: tuple) -> str:
        path, group, number, *_ = row
        return f"{path}, row group {group}, row {number}"

    def rows(self, block: int, start: int = 0) -> Iterator[tuple]:
        import pyarrow.parquet

        (path, group), first = self.locate(block), 0
        try:
            footer = self._footer(path)
            columns = [name for name in footer.schema.to_arrow_schema().names if name in self._columns]
            with files.open_file(path) as f:
                options = {"buffer_size": PARQUET_BUFFER, "pre_buffer": False, "page_checksum_verification": True}
                table = pyarrow.parquet.ParquetFile(f, metadata=footer, **options)
                for batch in table.iter_batches(RUN, [group], columns, use_threads=False):
                    for i in range(max(0, start - first), batch.num_rows):
                        yield path, group, first + i, batch, i
                    first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as e:
            if may_pass(e):
                raise
            raise BadRecord(f"{path}, row group {group} from row {first}", f"damaged: {one_line(e)}") from None


def _parquet_footer(path: str):
    import pyarrow.parquet

    with files.open_file(path) as f:
        return pyarrow.parquet.read_metadata(f)


def _parquet_facts(path: str) -> tuple[int, int, int]:
    """Return a file's size in bytes, and its numbers of row groups and rows."""
    import pyarrow

    try:
        footer = _parquet_footer(path)
        return files.size(path), footer.num_row_groups, footer.num_rows
    except (pyarrow.ArrowException, OSError) as e:
        if may_pass(e):
            raise
        raise UsageError(f"{path} is not a Parquet file, or damaged: {one_line(e)}") from None


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}  # builders of `datasets`
FORMATS |= {".parquet": "parquet", ".arrow": "arrow"}
NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub", "fsspec"}


@contextlib.contextmanager
def _opening(spec: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as e:  # a library and a network may raise anything
        raise UsageError(f"source {spec}: cannot be opened: {one_line(e)}") from None


class HuggingFace:
    """A dataset that the `datasets` library streams: a hub name, a folder, or one file; a block is a shard.

    The library's saved states are exact to a table only, so every read starts at the shard and skips to its row.
    """

    def __init__(self, name: str, config: str, split: str, text_key: str, messages_key: str, chats: bool):
        datasets = blocks.import_package("datasets", "datasets")
        import huggingface_hub

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
        self._name, self._keys = name, (text_key, messages_key, chats)
        path = os.path.expanduser(name)
        self._local = os.path.exists(path)
        with _opening(f"hf:{name}"):
            builder = _hf_builder(datasets, path if self._local else name, config)
            if hasattr(builder.config, "batch_size"):
                builder.config.batch_size = RUN  # otherwise Parquet keeps a whole row group in memory
            splits = builder.as_streaming_dataset()
            if split not in splits:
                raise UsageError(f"source hf:{name}: there is no split {split!r} in it; it has {', '.join(splits)}")
            data = splits[split]
            if data.num_shards < FEW_SHARDS:
                data = data.reshard()
            self._names = data.column_names
            columns = [n for n in self._names or () if n in records.roots(text_key, messages_key)]
            self._data = data.select_columns(columns) if columns else data  # images in the others are not decoded
            self.format = type(builder).__module__.rsplit(".", 1)[-1]
            self.paths = list(map(str, (builder.config.data_files or {}).get(split, [])))
            facts = files.fingerprint(self.paths) if self.paths else builder.hash
        self.blocks = self._data.num_shards
        self.fingerprint = blocks.fingerprint([config, split, self.blocks, facts])

    def document(self, row: tuple[int, int, dict]) -> Document:
        return records.document(row[2], *self._keys, self.place(row), self._names)

    def place(self, row: tuple[int, int, dict]) -> str:
        block, number, _ = row
        return f"hf:{self._name}, shard {block}, row {number}"

    def rows(self, block: int, start: int = 0) -> Iterator[tuple[int, int, dict]]:
        number = start
        try:
            shard = self._data.shard(self.blocks, block)
            for record in shard.skip(start) if start else shard:
                yield block, number, record
                number += 1
        except Exception as e:
            if not (may_pass(e) if self._local else _is_network_error(e)):
                where = f"hf:{self._name}, shard {block} from row {number}"
                raise BadRecord(where, f"damaged: {one_line(e)}") from None
            if isinstance(e, OSError):
                raise
            raise OSError(f"hf:{self._name}: {one_line(e)}") from e


def hugging_face(name: str, config: str, split: str, text_key: str, messages_key: str, chats: bool) -> Source:
    """Open a dataset's split, by our own reader if its files can be read from the middle.

    `datasets` reads a shard from its start: row 1 behind 4 GB of JSON lines takes as long as reading 4 GB.
    """
    keys = (text_key, messages_key, chats)
    streamed = HuggingFace(name, config, split, *keys)
    direct = {"json": files.JsonFiles, "parquet": Parquet}.get(streamed.format)
    return direct(streamed.paths, *keys) if direct and streamed.paths else streamed


def _hf_builder(datasets, path: str, config: str):
    if os.path.isfile(path):
        stem, suffix = os.path.splitext(path)
        suffix = os.path.splitext(stem)[1] if suffix in files.COMPRESSED else suffix
        if suffix not in FORMATS:
            raise UsageError(f"source hf:{path}: {suffix or 'no suffix'} is not one of {', '.join(FORMATS)}")
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        return datasets.load_dataset_builder(FORMATS[suffix], data_files={"train": path}, **options)
    if "://" not in path and path.startswith((".", "/")) and not os.path.isdir(path):
        raise UsageError(f"source hf:{path}: no such file or folder")
    return datasets.load_dataset_builder(path, config or None)


def _is_network_error(e: Exception) -> bool:
    return isinstance(e, OSError) or any(kind.__module__.split(".")[0] in NETWORK for kind in type(e).__mro__)


class TFDS:
    """A TensorFlow dataset, read without TensorFlow; it is prepared (downloaded) once, as ArrayRecord files."""

    def __init__(self, name: str, split: str, text_key: str, messages_key: str, chats: bool):
        tfds = blocks.import_package("tensorflow_datasets", "tensorflow-datasets array-record")
        self._name, self._keys = name, (text_key, messages_key, chats)
        with _opening(f"tfds:{name}"):
            with contextlib.redirect_stdout(io.StringIO()):
                tfds.disable_progress_bar()
                builder = tfds.builder(name, file_format="array_record")
                builder.download_and_prepare()  # returns at once if it was done before
            if re.match(r"[^\[+]*", split)[0] not in [*builder.info.splits, "all"]:
                splits = ", ".join(builder.info.splits)
                raise UsageError(f"source tfds:{name}: there is no split {split!r} in it; it has {splits}")
            self._data = builder.as_data_source(split)
        self._count = len(self._data)
        self.blocks = -(-self._count // RUN)
        info = builder.info
        self.fingerprint = blocks.fingerprint([info.full_name, split, self._count, int(info.dataset_size)])

    def rows(self, block: int, start: int = 0) -> Iterator[int]:
        return iter(range(min(block * RUN + start, self._count), min((block + 1) * RUN, self._count)))

    def place(self, row: int) -> str:
        return f"tfds:{self._name}, record {row}"

    def document(self, row: int) -> Document:
        where = self.place(row)
        try:
            record = self._data[row]
        except OSError:
            raise
        except Exception as e:
            raise BadRecord(where, f"damaged: {one_line(e)}") from None
        return records.document(record, *self._keys, where)
