"""The shared part of all commands: flags and configs in, one-line errors and exit statuses out.

Exit status: 0 done; 2 a usage, config or data error; 1 any other failure; 128 + signal after SIGTERM, SIGINT or SIGHUP.
`--config=FILE.py[:ARG]` and `--config.a.b=value` are ml_collections config flags. Only this file imports them; it hands
on a frozen RunConfig. FILE may be the name of a shipped config, such as quickstart or preset:base.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import operator
import os
import pathlib
import platform
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterable

from absl import flags
from ml_collections import config_flags

from lowrank_jax import configs, keys
from lowrank_jax.config import RunConfig, RunFailure, UsageError, local_path
from lowrank_jax.machine import console, processes, startup

LONGEST_ERROR = 2000  # characters of a message


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one `error: ...` line; adds `--json`."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def add_path(self, flag: str, **options):
        """Add a flag that takes a local path, with its `~` expanded; --config takes a shipped config's name as well."""
        self.add_argument(
            flag, type=config_path if flag == "--config" else lambda text: local_path(text, flag), **options
        )

    def parse_known_args(self, args=None, namespace=None):
        """Parse what is known, with `-` or `_` between the words of a flag."""
        same = {name.replace("_", "-"): name for name in self._option_string_actions}
        split = [arg.partition("=") for arg in (sys.argv[1:] if args is None else args)]
        spelled = [same.get(name.replace("_", "-"), name) + "".join(value) for name, *value in split]
        return super().parse_known_args(spelled, namespace)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{_meant(rest[0], self._option_string_actions, {})}")
        return values

    def add_run(self):
        """Add the flags that name a run and one of its checkpoints."""
        self.add_path("--workdir", required=True, help="the run")
        self.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")
        self.add_argument("--phase", default="", help="use the last checkpoint of this phase: pretrain or sft")

    def parse_with_config(self, argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
        """Return the command's own flags, and the config of `--config` and `--config.key=value`."""
        self.add_path("--config", metavar="FILE", help=f"a file, or a shipped config: {', '.join(shipped_configs())}")
        keys_advice = "`python -m lowrank_jax config` lists them"
        self.epilog = f"any key of the config can be set with --config.group.key=value; {keys_advice}"
        args, rest = self.parse_known_args(argv)
        if args.config is None:
            raise UsageError("--config=FILE is missing, such as --config=quickstart")
        return args, read_config([f"--config={args.config}", *rest], own_flags=self._option_string_actions)


def shipped_configs() -> list[str]:
    """Return the names of the configs of the package, which --config takes in place of a path."""
    files = pathlib.Path(configs.__path__[0]).glob("[a-z]*.py")
    return sorted(file.stem for file in files)


def config_path(text: str) -> str:
    """Return the path of a config, with its argument: `quickstart` and `preset:base` are shipped, unless a file is."""
    name, colon, argument = text.partition(":")
    if re.fullmatch(r"[a-z]\w*", name) and name in shipped_configs() and not os.path.isfile(name):
        return os.path.join(configs.__path__[0], f"{name}.py") + colon + argument
    return local_path(text, "--config")


def read_config(config_args: list[str], changes: dict | None = None, own_flags: Iterable[str] = ()) -> RunConfig:
    """Return the checked config of `--config=FILE --config.a.b=v ...` and `changes`; raises UsageError in one line.

    `own_flags` are those of the command, for the answer to a flag that is unknown.
    """
    path = config_path(config_args[0].removeprefix("--config="))
    name, colon, argument = path.partition(":")
    if not os.path.isfile(name):
        near = difflib.get_close_matches(pathlib.Path(name).stem, shipped_configs(), 1)
        advice = (
            f"did you mean --config={near[0]}{colon}{argument}?" if near else f"shipped: {', '.join(shipped_configs())}"
        )
        raise UsageError(f"--config={path}: no such file; {advice}")
    root = keys.tree(RunConfig)
    overrides = _overrides(config_args[1:], root)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    # config_flags looks for overrides in sys.argv.
    argv, sys.argv = sys.argv, ["lowrank_jax", f"--config={path}", *overrides]
    try:
        with _imports_of_configs():
            unused = values(sys.argv)[1:]
        config = values["config"].value.to_dict()
    except UsageError:
        raise
    except flags.UnrecognizedFlagError as e:
        raise UsageError(f"unknown argument --{e.flagname}{_meant(e.flagname, own_flags, root)}") from None
    except Exception as e:  # a config is a program: it may raise anything
        raise UsageError(f"--config: {' '.join(_reason(e).split())}") from None
    finally:
        sys.argv = argv
    if unused:
        raise UsageError(f"unknown argument {unused[0]}")
    config = changed(config, changes or {})
    checked = RunConfig.from_dict(config)
    if checked.pretrain.steps == -1 and config["pretrain"]["steps"] in (0, "0"):
        console.say("config.pretrain.steps=0 without config.init_from means -1: from config.pretrain.tokens_per_param")
    return checked


@contextlib.contextmanager
def _imports_of_configs():
    """Let a config import its neighbours, as under `python -m`, and `configs`, as those of older versions do."""
    sys.path.append("")
    if is_new := not importlib.util.find_spec("configs"):
        sys.modules["configs"] = configs
    try:
        yield
    finally:
        if "" in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index("")]
        if is_new:
            sys.modules.pop("configs", None)


def _overrides(args: list[str], root: dict) -> list[str]:
    """Return `--config.key=value` flags with every whole number, such as 1e3, written out; raises UsageError."""
    written, rest = [], iter(args)
    for arg in rest:
        key, has_value, value = arg.partition("=")
        match = re.fullmatch(r"--?(?:no)?config\.(.+)", key)
        kind, problem = keys.lookup(match[1], root) if match else (None, "")
        if problem:
            raise UsageError(problem)
        if kind is int:  # config_flags would refuse 1e3
            value = value if has_value else next(rest, "")
            try:
                arg = f"{key}={keys.whole(value)}"
            except ValueError:
                raise UsageError(f"config.{match[1]}={value!r:.200} must be a whole number") from None
        written.append(arg)
    return written


def _meant(flag: str, own_flags: Iterable[str], root: dict) -> str:
    """Return a suffix for the error of an unknown flag: a flag like it, or the config's key of that name."""
    name = flag.split("=")[0].lstrip("-")
    near = difflib.get_close_matches(f"--{name}", own_flags, 1, 0.8)
    if not near and root:
        is_path = "." in name and not keys.lookup(name, root)[1]
        key = name if is_path else keys.meant(name.split(".")[-1], "config", root, root).removeprefix("config.")
        near = [f"--config.{key}"] if key else []
    return f"; did you mean {near[0]}?" if near else ""


def list_keys(argv: list[str]) -> dict:
    """List the keys of a config with their defaults and meanings: all, or those with WORD in their path.

    python -m lowrank_jax config warmup
    """
    from lowrank_jax.configs import default

    parser = Parser(list_keys.__doc__)
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="such as lr, sft.lr or mesh")
    word = parser.parse_args(argv).word.removeprefix("config.")
    root, meanings = keys.tree(RunConfig), keys.meanings(pathlib.Path(default.__file__).read_text(encoding="utf-8"))
    values, first_paths, rows = default.get_config().to_dict(), {}, []
    for path in (path for path in keys.paths(root) if word in path):
        group, _, key = path.rpartition(".")
        if group and not any(row["key"].startswith(f"{group}.") for row in rows):
            console.show("\n".join(["", *textwrap.wrap(f"{group}: {meanings[group]}".rstrip(": "), 100)]))
        value, text = functools.reduce(operator.getitem, path.split("."), values), meanings[path]
        written = ",".join(map(str, value)) if isinstance(value, tuple) else value
        original = first_paths.setdefault((key, text), path)
        lines = textwrap.wrap(text if original == path else f"as config.{original}", 94)
        console.show("\n      ".join([f"  --config.{path}={written}", *lines]))
        rows.append({"key": path, "default": value, "meaning": text})
    if not rows:
        raise UsageError(keys.lookup(word, root)[1] or f"no key of the config has {word} in its path")
    return {"keys": rows}


def changed(config: dict, changes: dict) -> dict:
    """Return a copy of nested groups with the values of dotted keys, such as {"pretrain.steps": 200}."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = config
        for name in groups:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                raise UsageError(f"unknown config key config.{key}: {name} is no group of keys")
        group[last] = value
    return config


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, unless JAX_COMPILATION_CACHE_DIR names a folder, or none by being empty."""
    home = startup.cache_folder()  # also where other caches have their place
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # A folder for each kind of CPU: a program for one with more instructions dies of a signal on another.
    cpu = hashlib.sha256(startup.cpu_features().encode()).hexdigest()[:8]
    folder = os.path.join(home, f"xla-{platform.machine()}-{cpu}")
    for name, value in {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.1}.items():
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
        else:  # JAX reads the environment when it is imported, which --help need not wait for
            os.environ[name.upper()] = str(value)


def main(command, argv: list[str] | None = None) -> None:
    """Run `command(argv) -> dict | None`, print the dict with `--json`, and exit with the status of the contract.

    As the main program (without `argv`), it ends at once where threads named console.ABANDONED may be running, or where
    one of several processes has failed. Nothing can stop such threads, and they would delay the exit for minutes.
    """
    startup.open_streams()
    console.prepare_streams()
    leave = _leave if argv is None else sys.exit
    argv = sys.argv[1:] if argv is None else argv
    try:
        use_compilation_cache()
        result = command(argv)
        if result is not None and "--json" in argv and processes.is_first():
            console.show(console.to_json(result))
        processes.leave(0)
    except BrokenPipeError:  # the reader of our output is gone: there is nobody to report to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except (UsageError, RunFailure, OSError) as e:
        _print_error(str(e) if isinstance(e, UsageError) else processes.lost() or str(e))
        leave(2 if isinstance(e, UsageError) else 1)
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except SystemExit as e:
        leave(e.code)
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            _print_error(f"out of memory: {str(e).splitlines()[0][:300]}")
        elif lost := processes.lost(2, also_ended=True):  # the devices notice it first, each in its own words
            _print_error(lost)
        elif problem := _unusable_platforms(e):
            _print_error(problem)
            leave(2)
        elif processes.count() > 1 or leave is _leave:
            console.say(traceback.format_exc().rstrip(), everyone=True)
        else:
            raise
        leave(1)


def _print_error(error: str) -> None:
    line = " ".join(error[: 2 * LONGEST_ERROR].split())  # a text of others in it may have gigabytes
    line = line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}..."
    console.say(f"error: {line}", everyone=True)


def _unusable_platforms(error: Exception) -> str:
    """Return what is wrong with JAX_PLATFORMS where JAX finds no device for it, or an empty text.

    JAX's error for a missing plugin is an assertion without text, so any error asks for the devices again.
    """
    jax = sys.modules.get("jax")
    if not (jax and jax.config.jax_platforms):
        return ""
    if "Unable to initialize backend" not in str(error):
        try:
            jax.devices()
            return ""
        except Exception as e:
            error = e
    reason = str(error).split(" (set ")[0].rstrip(".") or "its plugin for JAX is not installed"
    return f"JAX_PLATFORMS={jax.config.jax_platforms} cannot be used ({reason}); set JAX_PLATFORMS=cpu, or unset it"


def _leave(status: int | None) -> None:
    with contextlib.suppress(RunFailure, UsageError):
        processes.leave(status or 0)
    is_abandoned = any(thread.name.startswith(console.ABANDONED) for thread in threading.enumerate())
    if not is_abandoned and (not status or processes.count() == 1):  # a failing process does not wait for the others
        sys.exit(status)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status or 0)


def _reason(e: Exception) -> str:
    """Return an error's message. A KeyError's text is the repr of its message; config_flags hides a failed load."""
    is_missing = isinstance(e, (AttributeError, KeyError))
    text = str(e.args[0]) if is_missing and e.args else str(e)
    if "Traceback" in text:
        text = text.strip().splitlines()[-1]
    if is_missing and text.startswith(("'", '"')):  # ml_collections gives only the key, quoted twice
        text = "unknown config key " + text.replace("\\n", ". ").translate(str.maketrans("", "", "\\'\""))
    return text or type(e).__name__
