"""Lines for the person who watches a command; stdout stays for results.

Whatever the stream, a character that it cannot encode is written in ASCII. On a terminal, control characters of data,
file names, messages and generated text are shown, never obeyed.
"""

import codecs
import contextlib
import json
import math
import os
import re
import sys

from tqdm import tqdm

from lowrank_jax.machine import processes

ABANDONED = "abandoned"  # name prefix of the threads that a process does not wait for when it ends
IN_ASCII = {"≤": "<=", "≥": ">=", "×": "x", "…": "...", "–": "-", "—": "-", "→": "->", "±": "+-", "·": "."}
# C0 without tab and newline, DEL, C1, characters that turn the direction of text, and halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def prepare_streams() -> None:
    """Let no stream fail for a character that it cannot encode or decode."""
    codecs.register_error("in_ascii", _in_ascii)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "in_ascii"), (sys.stderr, "in_ascii")):
        with contextlib.suppress(AttributeError):  # a stream of its own kind, as in a notebook
            stream.reconfigure(errors=errors)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    characters = error.object[error.start : error.end]
    escape = lambda c: c.encode("ascii", "backslashreplace").decode()
    return "".join(IN_ASCII.get(c) or escape(c) for c in characters), error.end


def visible(text: str) -> str:
    r"""Return the text with its control characters as escapes, such as \x1b; tabs and newlines stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def say(line: str, everyone: bool = False) -> None:
    """Write a line to stderr, above the progress bar.

    In a multi-process run only the first process writes, or with `everyone` each process, with its name in front.
    """
    if everyone or processes.is_first():
        with contextlib.suppress(OSError):  # nobody reads stderr any more: no reason to stop
            tqdm.write(visible(processes.name() + line if everyone else line), file=sys.stderr)


def show(text: str, end: str = "\n", needed: bool = True) -> None:
    """Write a result to stdout at once: raw into a file or pipe, with visible control characters on a terminal.

    What a command does not exist for is not `needed`: where nobody can read it, it and all later lines are dropped.
    """
    try:
        print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)
    except OSError as e:
        if needed:
            raise OSError(e.errno, e.strerror, "stdout") from None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json(value, **options) -> str:
    """Return JSON in ASCII; null stands for NaN and infinity, which JSON does not have."""
    try:
        text = json.dumps(value, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, **options)
    return text.replace("\x7f", "\\u007f")


def finite(value):
    """Return a value of JSON with None for NaN and infinity."""
    if isinstance(value, dict):
        return {finite(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
