"""Sources of Parquet, Hugging Face `datasets` and TFDS, which are imported late: they take seconds and are optional."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence

from lowrank_jax.config import UsageError
from lowrank_jax.data import blocks, encodings, files, records
from lowrank_jax.data.blocks import BadRecord, Document, InFiles, Source, may_pass, one_line
from lowrank_jax.machine.console import say

RUN = 64  # records of TFDS in a block, and rows of Parquet that are decoded together
PARQUET_BUFFER = 1 << 20  # bytes of a column that are read at once, instead of a whole row group of it
FOOTERS = 16  # footers that are kept
FEW_SHARDS = 256  # a dataset with fewer Hugging Face shards is split further: that costs a request for each


class Parquet(InFiles):
    """Parquet files; a block is a row group, of which only the columns that matter are read."""

    def __init__(self, paths: Sequence[str], text_key: str, messages_key: str, chats: bool):
        self._keys, self._columns = (text_key, messages_key, chats), records.roots(text_key, messages_key)
        facts = files.at_once(lambda path: _parquet_facts(path, self._columns), paths)
        self.number_blocks(paths, [groups for _, _, groups, _ in facts])
        self._watch = files.Watch({path: digest for path, (digest, *_) in zip(paths, facts)})
        self.bytes = sum(files.unpacked(".parquet", n) for _, n, *_ in facts)
        self.fingerprint = blocks.fingerprint_of_files([digest for digest, *_ in facts], "Parquet")
        self.old_fingerprint = blocks.fingerprint([(os.path.basename(p), *f) for p, (_, *f) in zip(paths, facts)])
        self._footer = functools.lru_cache(FOOTERS)(_parquet_footer)

    def document(self, row: tuple) -> Document:
        path, group, number, batch, i = row
        where = self.place(row)
        try:
            record = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
        except Exception as e:  # a string may hold any bytes, and a date any year
            reason = "not UTF-8 text" if isinstance(e, UnicodeDecodeError) else "not readable"
            raise BadRecord(where, f"{reason}: {one_line(e)}") from None
        return records.document(record, *self._keys, where, self._footer(path).schema.to_arrow_schema().names)

    def place(self, row: tuple) -> str:
        path, group, number, *_ = row
        return f"{path}, row group {group}, row {number}"

    def rows(self, block: int, start: int = 0) -> Iterator[tuple]:
        import pyarrow.parquet

        (path, group), first = self.locate(block), 0
        self._watch.look(path)
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
        except Exception as e:  # damage may raise anything
            if may_pass(e):
                raise
            raise BadRecord(f"{path}, row group {group} from row {first}", f"damaged: {one_line(e)}") from None


def _parquet_footer(path: str):
    import pyarrow.parquet

    with files.open_file(path) as f:
        return pyarrow.parquet.read_metadata(f)


def _parquet_facts(path: str, columns: Container[str]) -> tuple[str, int, int, int]:
    """Return a file's digest, its size in bytes, and its numbers of row groups and rows."""
    n, digest = files.sample(path)
    try:
        footer = _parquet_footer(path)
        names = [name for name in footer.schema.to_arrow_schema().names if name in columns]
    except Exception as e:  # damage may raise anything
        if may_pass(e):
            raise
        raise UsageError(f"{path} is not a Parquet file, or damaged: {one_line(e)}") from None
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path} has more than one column {doubles[0]!r}; rename all but one")
    return digest, n, footer.num_row_groups, footer.num_rows


FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json"}  # builders of `datasets`
FORMATS |= {".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
# Of files beside the data. All others of a folder are named if they are left out.
NO_DATA = {"", ".md", ".rst", ".py", ".yaml", ".yml", ".cff", ".bib", ".pdf", ".png", ".jpg", ".svg", ".crc", ".lock"}
CARDS = ("README.md", ".huggingface.yaml")  # files in a folder that `datasets` reads as YAML
# As in huggingface_hub, whose import is slow
FRONT_MATTER = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")
LARGEST_CARD, LARGEST_YAML, DEEPEST_YAML = 1 << 20, 256 << 10, 50
METADATA = {"dataset_infos.json", "dataset_info.json", "state.json"}
SHOWN = 3  # names in a message
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

    def __init__(self, name: str, config: str, split: str, text_key: str, messages_key: str, chats: bool, builder=None):
        self._name, self._keys = name, (text_key, messages_key, chats)
        self._local = os.path.exists(os.path.expanduser(name))
        builder = builder or _hf_builder(name, config)
        with _opening(f"hf:{name}"):
            if hasattr(builder.config, "batch_size"):
                builder.config.batch_size = RUN  # otherwise Parquet keeps a whole row group in memory
            splits = builder.as_streaming_dataset()
            _check_split(name, split, splits)
            data = splits[split]
            if data.num_shards < FEW_SHARDS:
                data = data.reshard()
            self._names = data.column_names
            columns = [n for n in self._names or () if n in records.roots(text_key, messages_key)]
            self._data = data.select_columns(columns) if columns else data  # images in the others are not decoded
            paths = _hf_files(builder).get(split, [])
            if self._local:
                _check_encodings(paths, _hf_format(builder))
            samples = files.at_once(files.sample, paths)
        self.blocks = self._data.num_shards
        self.bytes = sum(files.unpacked(path, n) for path, (n, _) in zip(paths, samples))
        names_facts = blocks.fingerprint([(os.path.basename(path), n) for path, (n, _) in zip(paths, samples)])
        self.old_fingerprint = blocks.fingerprint([config, split, self.blocks, names_facts if paths else builder.hash])
        facts = (_hf_format(builder), config, split, self.blocks)
        self.fingerprint = blocks.fingerprint_of_files([digest for _, digest in samples] or [builder.hash], *facts)

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
    keys, builder = (text_key, messages_key, chats), _hf_builder(name, config)
    direct = {"json": files.JsonFiles, "parquet": Parquet}.get(_hf_format(builder))
    if direct is None or not (paths := _hf_files(builder)):
        return HuggingFace(name, config, split, *keys, builder)
    _check_split(name, split, paths)
    return direct(paths[split], *keys)


def _hf_builder(name: str, config: str):
    """Return the builder of `datasets` for a name on the hub, a folder or one file; raises UsageError."""
    path = os.path.expanduser(name)
    if os.path.lexists(path) and (kind := files.kind_of(path)) not in ("a file", "a folder"):
        raise UsageError(f"source hf:{name}: it is {kind}")
    if path.startswith((".", "/")) and not os.path.lexists(path):
        raise UsageError(f"source hf:{name}: no such file or folder")
    for card in CARDS:
        _check_card(os.path.join(path, card))
    datasets = blocks.import_package("datasets", "datasets")
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    with _opening(f"hf:{name}"):
        if os.path.isfile(path):
            if (suffix := _suffix(path)) not in FORMATS:
                raise UsageError(f"source hf:{name}: {suffix or 'no suffix'} is not one of {', '.join(FORMATS)}")
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            return datasets.load_dataset_builder(FORMATS[suffix], data_files={"train": path}, **options)
        if not os.path.isdir(path):
            return datasets.load_dataset_builder(name, config or None)
        builder = datasets.load_dataset_builder(path, config or None)
        _tell_left_out(path, builder)
        return builder


def _hf_format(builder) -> str:
    return type(builder).__module__.rsplit(".", 1)[-1]


def _hf_files(builder) -> dict[str, list[str]]:
    return {split: list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}


def _check_split(name: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise UsageError(f"source hf:{name}: there is no split {split!r} in it; it has {', '.join(splits)}")


def _check_card(path: str) -> None:
    """Raise UsageError for a dataset's card whose YAML is too large, or grows when it is read, as aliases can."""
    import yaml

    if not os.path.lexists(path):
        return
    if (kind := files.kind_of(path)) != "a file":
        raise UsageError(f"{path} is {kind}, and not a dataset's card")
    with open(path, encoding="utf-8", errors="replace") as f:
        text = f.read(LARGEST_CARD)
    block, match = text, FRONT_MATTER.search(text)
    if path.endswith(".md") and (match or len(text) < LARGEST_CARD):
        block = match[2] if match else ""
    depth = 0
    try:
        for event in yaml.parse(block[: LARGEST_YAML + 1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST_YAML or len(block) > LARGEST_YAML:
                limits = f"{LARGEST_YAML >> 10} KiB, {DEEPEST_YAML} levels and no aliases"
                raise UsageError(f"{path}: its YAML may have {limits}; name the data files instead of their folder")
    except yaml.YAMLError as e:
        raise UsageError(f"{path} has YAML that cannot be read: {one_line(e)}") from None


def _check_encodings(paths: Sequence[str], kind: str) -> None:
    """Raise UsageError for a local file that `datasets` would read as text in UTF-8 although it is not."""
    for path in paths if kind in ("csv", "text") else ():
        with contextlib.suppress(BadRecord):  # damage, which reading reports
            if (encoding := files.encoding(path)) != "utf-8":
                remedy = encodings.remedy(encoding.upper(), path)
                raise UsageError(f"{path} is in {encoding}, and {kind} files must be in utf-8; convert it, {remedy}")


@functools.cache
def _say_once(line: str) -> None:
    say(line)


def _tell_left_out(folder: str, builder) -> None:
    """Say which data files of a folder belong to no split: those of another format, or without a split's name."""
    known = {os.path.realpath(path) for paths in _hf_files(builder).values() for path in paths}
    below = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names if name not in METADATA)
    unused = sorted(path for path in below if _is_data(path, folder) and os.path.realpath(path) not in known)
    if unused:
        shown = ", ".join(os.path.relpath(path, folder) for path in unused[:SHOWN])
        more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        what = f"{len(known)} files are read, as {_hf_format(builder)}; left out: {shown}{more}"
        _say_once(blocks.printable(f"source hf:{folder}: {what}; name those as sources of their own to read them"))


def _is_data(path: str, folder: str) -> bool:
    is_hidden = "/." in f"/{os.path.relpath(path, folder)}"
    return _suffix(path) in FORMATS or not (is_hidden or _suffix(path).lower() in NO_DATA)


def _suffix(path: str) -> str:
    """Return a file's suffix, without that of a compression."""
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1] if suffix in files.COMPRESSED else suffix


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
        self.bytes = int(info.dataset_size)
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
