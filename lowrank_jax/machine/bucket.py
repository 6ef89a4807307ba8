"""Objects of a bucket, through fsspec: read, replaced and created whole. They have neither renames nor appends.

Every failure is an OSError with the object's address and one line of its cause.
"""

import contextlib
import datetime
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from lowrank_jax.config import UsageError
from lowrank_jax.machine import storage

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
# Of the exceptions of network libraries, which are no OSErrors: by their class, as there are too many libraries.
MAY_PASS = re.compile("connect|timeout|timedout|unavailable|slowdown|toomany|clienterror|oserror", re.IGNORECASE)
T = TypeVar("T")


def is_remote(path: str) -> bool:
    return "://" in path


class Bucket:
    """The objects below an address such as s3://bucket/runs/1, by their names below it."""

    def __init__(self, url: str, flag: str = "--workdir"):
        import fsspec  # a run in a local folder does not need it

        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        # A listing must show what other hosts have written since the last one.
        fresh = {"use_listings_cache": False, "skip_instance_cache": True}
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, **fresh)
        except ImportError:
            package = PACKAGES.get(scheme, scheme)
            raise UsageError(f"{flag}={url} needs the package {package}: pip install {package}") from None
        except Exception as e:  # of whatever library speaks with the bucket
            raise UsageError(f"{flag}={url} cannot be opened: {_line(e)}") from None

    def names(self, below: str = "") -> dict[str, int]:
        """Return the size of every object, by its name, or of those below a folder."""
        with self._naming(below, "be listed"):
            sizes = self._system.find(self._path(below), detail=True)
        return {path.removeprefix(self._root).lstrip("/"): facts["size"] for path, facts in sizes.items()}

    def create(self, name: str, text: str) -> None:
        """Create an object; raises FileExistsError where there is one, also of another process at the same time."""
        with self._naming(name, "be created"):
            self._system.pipe_file(self._path(name), text.encode(), mode="create")

    def read(self, name: str) -> str:
        with self._naming(name, "be read"):
            return self._system.cat_file(self._path(name)).decode()

    def replace(self, name: str, content: str | bytes) -> None:
        with self._naming(name, "be written"):
            self._system.pipe_file(self._path(name), content.encode() if isinstance(content, str) else content)

    touch = replace  # the bucket's clock sets the time of a new object

    def remove(self, name: str) -> None:
        with self._naming(name, "be removed"):
            self._system.rm_file(self._path(name))

    def modified(self, name: str) -> float:
        with self._naming(name, "be read"):
            time = self._system.modified(self._path(name))
        return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()

    def send(self, file: str, name: str) -> None:
        """Copy a file into the bucket, in parts where it is large."""
        with self._naming(name, "be written"):
            self._system.put_file(file, self._path(name))

    def fetch(self, name: str, file: str) -> None:
        """Copy an object into a file, which has its name when it is whole."""
        os.makedirs(os.path.dirname(file), exist_ok=True)
        unfinished = f"{file}.fetched.tmp"
        with self._naming(name, "be read"):
            self._system.get_file(self._path(name), unfinished)
            os.replace(unfinished, file)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _naming(self, name: str, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # a network and its libraries may raise anything
            number, kind = getattr(e, "errno", None), OSError
            if isinstance(e, FileNotFoundError | FileExistsError | PermissionError):
                kind = type(e)
            elif MAY_PASS.search(type(e).__name__) and not isinstance(e, OSError):
                number = errno.ETIMEDOUT
            named = kind(f"{self.url}/{name} cannot {action}: {_line(e)}")
            named.errno = number
            raise named from None


def patiently(action: Callable[[], T]) -> T:
    """Return `action()`, which is tried again after a failure that may pass, but not where access is refused."""
    refused = PermissionError, BlockingIOError
    return storage.again(action, lambda e: storage.is_transient(e) and not isinstance(e, refused))


def _line(e: Exception) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
