"""A run's folder in a bucket: a local copy is trained in, and sent to the bucket at each save and every half minute.

A bucket has no renames, appends or file locks, which a run's folder relies on. So every command works in a local copy,
as it would in any folder, and this file alone knows of buckets. The objects have the names of the run's files, so that
a copy of the bucket is a run's folder again. Beside them:

mirror.json    the checkpoints that are whole, with size and SHA-256 of each file; written after all that it names
.lock-owner    who trains: created only where it does not exist, renewed every 10 s, free 120 s after its last renewal

An upload has this order: new checkpoints, then all other files that have changed, config.json last, then mirror.json,
and then the deletion of checkpoints that the run has deleted. A kill between any two leaves a run that resumes: its
newest checkpoint is that of mirror.json, and its metrics reach at least as far.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import startup, storage
from lowrank_jax.machine.bucket import Bucket, is_remote, patiently
from lowrank_jax.machine.console import say
from lowrank_jax.training import run_folder

VARIABLE = "LOWRANK_MIRROR"  # a folder for the local copies
SHARE = f"the processes of a run in a bucket share its local copy: set {VARIABLE} to a folder that all hosts see"
MANIFEST, LOCK, BASE, STAGE = "mirror.json", ".lock-owner", ".mirror", ".mirror-sending"
LOOK_SECONDS = 2  # between two looks at the folder for a new checkpoint
SEND_SECONDS = 30  # between two uploads of metrics and the like; longer where they take more than a 20th of the time
LISTINGS = 5  # of a reader beside a training that deletes what is being read
STEP = re.compile(r"checkpoints/(0|[1-9][0-9]{0,17})/")
LOCAL = re.compile(rf"(\.lock|{re.escape(BASE)}|\.shared|{MANIFEST}$)|.*\.tmp$|checkpoints/[^/]*\.orbax-checkpoint-tmp")
READ = re.compile(r"config\.json$|tokenizer/|[^/]*\.jsonl$|checkpoints/")  # what commands read of a run


def place(url: str) -> str:
    """Return the local folder of a run: the folder itself, or that of the copy of a run in a bucket."""
    if not is_remote(url):
        return url
    home = os.environ.get(VARIABLE) or os.path.join(startup.cache_folder(), "runs")
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return os.path.join(os.path.abspath(home), f"{os.path.basename(url.rstrip('/'))}-{digest}")


@contextlib.contextmanager
def trained(url: str, flag: str = "--workdir") -> Iterator[None]:
    """Bring the locked local copy of a run up to date, and send what changes in it until the end.

    Raises UsageError where another process trains the run, and RunFailure where the last upload fails: the local copy
    is whole then, and the next start on this host sends it. Does nothing for a run in a local folder.
    """
    if not is_remote(url):
        yield
        return
    folder, remote = place(url), Bucket(url, flag)
    with contextlib.ExitStack() as stack:
        try:
            is_ours = stack.enter_context(storage.owned(LOCK, remote))  # fsspec tries each request several times
            base = _fetch(remote, folder)
        except BlockingIOError:
            raise UsageError(f"another process is training in {url}, or did {storage.STALE_SECONDS} s ago") from None
        except OSError as e:
            raise UsageError(f"{flag}={url} cannot be used: {e}") from None
        say(f"{url} is trained in {folder} and sent from there")
        with _Sender(remote, folder, base, is_ours), _in_terms_of(url, folder):
            yield


@contextlib.contextmanager
def opened(url: str, flag: str = "--workdir", writes: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a local folder with the run and its newest whole checkpoint; send the files `writes` at the end."""
    if not is_remote(url):
        yield url
        return
    remote, folder = Bucket(url, flag), f"{place(url)}.read"
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(storage.lock(os.path.join(folder, ".lock")))
        except BlockingIOError:  # another command reads the run
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="read-", dir=os.path.dirname(folder)))
        stack.enter_context(_in_terms_of(url, folder))
        try:
            for attempt in range(LISTINGS):
                is_last = attempt == LISTINGS - 1
                with contextlib.nullcontext() if is_last else contextlib.suppress(FileNotFoundError):
                    _fetch(remote, folder, newest=True)
                    break
        except OSError as e:
            raise UsageError(f"{flag}={url} cannot be read: {e}") from None
        yield folder
        for name in writes:
            remote.send(os.path.join(folder, name), name)


@contextlib.contextmanager
def _in_terms_of(url: str, folder: str) -> Iterator[None]:
    """Name the bucket, and not the local copy, in the errors of the body."""
    try:
        yield
    except (UsageError, RunFailure) as e:
        raise type(e)(str(e).replace(folder, url)) from None


def _fetch(remote: Bucket, folder: str, newest: bool = False) -> dict:
    """Make the local folder a copy of the bucket and return its manifest.

    With `newest`, only what commands read: the newest checkpoint whose files are those that were sent. A folder that
    the bucket was last sent from, or fetched into, stays as it is: it holds the same or later steps.
    """
    sizes = {name: size for name, size in remote.names().items() if _is_below(name)}
    manifest = _parse(remote, remote.read(MANIFEST) if MANIFEST in sizes else "")
    is_copied = not manifest["id"] and any(not LOCAL.match(name) for name in sizes)  # by another program
    if not newest and not is_copied and manifest["id"] in _read_base(folder):
        return manifest
    names = [name for name in sizes if not LOCAL.match(name) and not STEP.match(name)]
    names = [name for name in names if not newest or READ.match(name)]
    copied = {step: files for step, files in _listed(sizes).items() if step not in manifest["leftovers"]}
    steps = copied | manifest["checkpoints"]  # nothing is known of files that another program copied
    _write_base(folder, None)  # until all is there
    _clear(folder, {*names, *(f"checkpoints/{step}/{name}" for step, files in steps.items() for name in files)})
    for step in sorted(steps, key=int, reverse=True):
        is_whole = _fetch_step(remote, folder, step, steps[step])
        if not is_whole:
            say(f"warning: {remote.url}/checkpoints/{step} is not what was sent there")
            manifest["checkpoints"].pop(step, None)  # if the local copy can be used all the same, it is sent again
        elif newest and step in manifest["checkpoints"]:
            break
    for name in names:
        remote.fetch(name, os.path.join(folder, name))
    _write_base(folder, [manifest["id"]])
    return manifest


def _is_below(name: str) -> bool:
    return ".." not in name.split("/") and not name.startswith("/")


def _clear(folder: str, kept: set[str]) -> None:
    """Remove all files but those, and checkpoints without files: a folder alone would look like one."""
    for name in _walk(folder):
        if name not in kept:
            os.remove(os.path.join(folder, name))
    for step in run_folder.checkpoint_steps(folder):
        if not any(name.startswith(f"checkpoints/{step}/") for name in kept):
            shutil.rmtree(os.path.join(folder, "checkpoints", str(step)))


def _fetch_step(remote: Bucket, folder: str, step: str, files: dict) -> bool:
    """Fetch a checkpoint; return whether its files are those that were sent."""
    is_whole = True
    for name, facts in files.items():
        path = os.path.join(folder, "checkpoints", step, name)
        if not (facts and _facts(path) == facts):
            try:
                remote.fetch(f"checkpoints/{step}/{name}", path)
            except FileNotFoundError:
                is_whole = False
                continue
            is_whole &= not facts or _facts(path) == facts
    return is_whole


def _parse(remote: Bucket, text: str) -> dict:
    try:
        manifest = json.loads(text) if text else {"id": "", "checkpoints": {}}
        steps = {str(int(step)): {**files} for step, files in manifest["checkpoints"].items()}
        steps = {step: files for step, files in steps.items() if all(map(_is_below, files))}
        leftovers = [str(int(step)) for step in manifest.get("leftovers", [])]
        return {"id": str(manifest["id"]), "checkpoints": steps, "leftovers": leftovers}
    except (ValueError, TypeError, AttributeError, LookupError):
        raise UsageError(f"{remote.url}/{MANIFEST} is damaged; delete it to use the checkpoints as they are") from None


def _listed(sizes: dict) -> dict:
    """Return the checkpoints of a bucket that no run has sent, with nothing known of their files."""
    steps = {}
    for name in sizes:
        if match := STEP.match(name):
            steps.setdefault(match[1], {})[name[match.end() :]] = None
    return steps


def _facts(path: str) -> list | None:
    """Return a file's size and SHA-256, or None where it cannot be read."""
    try:
        with open(path, "rb") as f:
            return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]
    except OSError:
        return None


def _walk(folder: str) -> list[str]:
    """Return the names, below the folder, of its files without those that stay on this machine."""
    paths = (os.path.join(home, name) for home, _, names in os.walk(folder) for name in names)
    names = (os.path.relpath(path, folder).replace(os.sep, "/") for path in paths)
    return [name for name in names if not LOCAL.match(name)]


def _read_base(folder: str) -> list[str]:
    """Return the ids that the bucket's manifest may have where this folder is its origin or copy; "" for none yet."""
    try:
        return list(json.loads(storage.read(os.path.join(folder, BASE))))
    except (FileNotFoundError, ValueError, TypeError):
        return []


def _write_base(folder: str, ids: list[str] | None) -> None:
    os.makedirs(folder, exist_ok=True)
    if ids is not None:
        storage.replace(os.path.join(folder, BASE), json.dumps(ids))
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, BASE))


class _Sender:
    """Sends what changes in a run's local copy; only its thread, and then `finish`, use it."""

    def __init__(self, remote: Bucket, folder: str, manifest: dict, is_ours: Callable[[], bool]):
        self.remote, self.folder, self._is_ours, self._is_over = remote, folder, is_ours, threading.Event()
        self._manifest, self._sent, self._next, self._failed = manifest, {}, 0.0, ""
        self._thread = threading.Thread(target=self._watch, name="mirror", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind, failure, _) -> None:
        """Send the rest; raises RunFailure where that fails, unless the run has failed before."""
        self._is_over.set()
        self._thread.join()
        try:
            if run_folder.holds_run(self.folder):
                patiently(self.send)
            else:  # the run failed before it wrote anything
                _write_base(self.folder, None)
        except OSError as e:
            line = f"{e}; the run is whole in {self.folder}: the same command on this host sends it and goes on"
            if isinstance(failure, Exception):
                say(f"warning: {line}")
            else:
                raise RunFailure(line) from None
        finally:
            shutil.rmtree(os.path.join(self.folder, STAGE), ignore_errors=True)

    def _watch(self) -> None:
        """Send until the end, also after failures; each kind of them is told once."""
        while not self._is_over.wait(LOOK_SECONDS):
            try:
                if self._new_steps() or time.monotonic() >= self._next:
                    began = time.monotonic()
                    self.send()
                    self._next = time.monotonic() + max(SEND_SECONDS, 20 * (time.monotonic() - began))
                    self._failed = ""
            except FileNotFoundError:  # the run has just deleted it
                pass
            except OSError as e:
                if str(e) != self._failed:
                    say(f"warning: {e}; trying again while training goes on")
                self._failed, self._next = str(e), time.monotonic() + SEND_SECONDS

    def _new_steps(self) -> list[str]:
        return [s for s in map(str, run_folder.checkpoint_steps(self.folder)) if s not in self._manifest["checkpoints"]]

    def send(self) -> None:
        """Bring the bucket up to date, in the order that the head of this file gives."""
        steps, leftovers = dict(self._manifest["checkpoints"]), self._manifest["leftovers"]
        if new := self._new_steps():
            self._declare(steps, sorted({*leftovers, *new}))
        for step in reversed(new):
            with contextlib.suppress(FileNotFoundError):  # the run has deleted it before it was staged
                steps[step] = self._send_step(step)
        changed = self._send_files()
        newest = max(steps, key=int, default="")  # stays where the run deletes faster than we send
        local = set(map(str, run_folder.checkpoint_steps(self.folder))) & steps.keys() or {newest}
        steps = {step: files for step, files in steps.items() if step in local}
        gone = sorted({*self._manifest["checkpoints"], *self._manifest["leftovers"]} - steps.keys())
        if changed or new or steps != self._manifest["checkpoints"]:
            self._declare(steps, gone)
        for step in gone:
            for name in self.remote.names(f"checkpoints/{step}"):
                with contextlib.suppress(FileNotFoundError):
                    self.remote.remove(name)
        self._manifest["leftovers"] = []

    def _declare(self, steps: dict, leftovers: list[str]) -> None:
        """Replace the manifest; `leftovers` are checkpoints that have objects and do not count."""
        if not self._is_ours():
            raise TimeoutError(f"{self.remote.url} may belong to another process: its lock cannot be read")
        manifest = {"id": secrets.token_hex(8), "checkpoints": steps, "leftovers": leftovers}
        _write_base(self.folder, [self._manifest["id"], manifest["id"]])  # a kill may come before or after
        self.remote.replace(MANIFEST, json.dumps(manifest, indent=1))
        self._manifest = manifest
        _write_base(self.folder, [manifest["id"]])

    def _send_step(self, step: str) -> dict:
        """Send a checkpoint; return the facts of its files. Links keep it, as the run may delete it any time."""
        home, stage = os.path.join(self.folder, "checkpoints", step), os.path.join(self.folder, STAGE, step)
        shutil.rmtree(stage, ignore_errors=True)
        try:
            shutil.copytree(home, stage, copy_function=_link)
            names = _walk(stage)
            for name in names:
                self.remote.send(os.path.join(stage, name), f"checkpoints/{step}/{name}")
            return {name: _facts(os.path.join(stage, name)) for name in names}
        except shutil.Error as e:
            raise FileNotFoundError(str(e)) from None
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _send_files(self) -> bool:
        """Send every other file that has changed; return whether there was one."""
        names = [name for name in _walk(self.folder) if not STEP.match(name)]
        is_changed = False
        for name in sorted(names, key=lambda name: (name == "config.json", name)):
            path = os.path.join(self.folder, name)
            with contextlib.suppress(FileNotFoundError):
                facts = os.stat(path)
                identity = facts.st_size, facts.st_mtime_ns, facts.st_ino
                if self._sent.get(name) != identity:
                    self.remote.send(path, name)
                    self._sent[name], is_changed = identity, True
        return is_changed


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
