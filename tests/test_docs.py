"""Every command in a fenced block of the pages is checked, every Python block runs, and every link leads somewhere.

| block | check |
|---|---|
| a command of the package | its own parser accepts the flags and reads the config; nothing is trained |
| `plan` without a topology | runs |
| a script | its file exists and names each flag |
| Python | runs on a small trained run |
| JSON | each line is JSON |
| text, diff, mermaid | none: nobody types it |

`<!-- needs: gpu -->` on the line before a block says that this machine cannot run it. The package's own commands in it
are parsed all the same, also inside `gcloud ... --command="..."`; other programs and Python in it are not run.
"""

import ast
import importlib
import json
import pathlib
import re
import shlex
import tomllib
from typing import NamedTuple

import pytest
import yaml

from lowrank_jax import cli
from lowrank_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(p for folder in (ROOT, ROOT / "docs") for p in folder.glob("*.md"))
FENCE = re.compile(r"(?:^<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<language>[\w-]*)\n(?P<text>.*?)^```$", re.S | re.M)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SHELL = ("", "bash", "sh")
# The flags that pages use of other programs, from the programs' own documentation in November 2026.
DOCUMENTED = {
    "gcloud filestore instances create": "zone tier file-share network",
    "gcloud filestore instances describe": "zone",
    "gcloud compute tpus queued-resources create": "node-id zone spot accelerator-type runtime-version",
    "gcloud compute tpus queued-resources describe": "zone",
    "gcloud compute tpus queued-resources delete": "zone force",
    "gcloud compute tpus tpu-vm scp": "zone worker",
    "gcloud compute tpus tpu-vm ssh": "zone worker command",
    "gcloud auth configure-docker": "",
    "xpk cluster create": "cluster tpu-type num-slices spot enable-gcpfilestore-csi-driver project zone",
    "xpk storage create": "type auto-mount mount-point readonly size tier access-mode vol cluster project zone",
    "xpk workload create": "cluster workload tpu-type num-slices docker-image storage max-restarts "
    "restart-on-exit-codes termination-grace-period-seconds project zone command",
    "xpk workload delete": "cluster workload project zone",
    "kubectl logs": "follow selector",
    "docker build": "build-arg tag",
    "docker run": "gpus volume",
    "docker push": "",
    "git archive": "prefix output",
    "sbatch": "dependency job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal output",
    "srun": "cpus-per-task",
}
UNKNOWN = "is neither checked nor marked with needs:"
ENDS = set(";&|<>\n")  # characters of the tokens that end a command's words


class Block(NamedTuple):
    page: str
    line: int
    needs: str
    language: str
    text: str


def blocks_of(page: str, text: str) -> list[Block]:
    """Return the fenced blocks of a page, with what each needs."""
    return [
        Block(page, text[: m.start("text")].count("\n"), m["needs"] or "", m["language"], m["text"])
        for m in re.finditer(FENCE, text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page.name, page.read_text(encoding="utf-8"))]


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a shell text, without comments, variables set for it, and redirections."""
    text = re.sub(r"(^|\s)#.*", r"\1", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="".join(ENDS))
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    lines: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= ENDS:
            lines.append([])
        elif lines[-1] or not re.match(r"\w+=", token):
            lines[-1].append(token)
    return [line for line in lines if line]


def own(words: list[str]) -> tuple[str, str, list[str]] | None:
    """Return (module, function, arguments) of the package's command among the words, which may follow a launcher."""
    for i, word in enumerate(words):
        if word.rsplit("/", 1)[-1] == "lowrank" and (i == 0 or words[i + 1 : i + 2] and words[i + 1] in COMMANDS):
            name, *arguments = words[i + 1 :] or ["--help"]  # also in a container: docker run IMAGE train
        elif words[i - 1 : i] == ["-m"] and word == "lowrank_jax":
            name, *arguments = words[i + 1 :] or ["--help"]
        elif words[i - 1 : i] == ["-m"] and word.startswith("lowrank_jax."):
            module = word.removeprefix("lowrank_jax.")
            name = next((n for n, (m, _) in COMMANDS.items() if m.removesuffix(".__main__") == module), module)
            arguments = words[i + 1 :]
        else:
            continue
        name = name.replace("_", "-")  # as the program reads it
        return (*COMMANDS[name], arguments) if name in COMMANDS else None if name == "--help" else (name, "", arguments)
    return None


class Parsed(Exception):
    """A command has read its flags."""


@pytest.fixture
def parse(monkeypatch):
    """A function that lets a command of the package read its flags, and stops it then."""
    monkeypatch.chdir(ROOT)
    running: list[str] = []

    def stop_after(name: str):
        method = getattr(cli.Parser, name)

        def stopping(self, *args):
            running.append(name)
            try:
                result = method(self, *args)
            finally:
                running.pop()
            if not running:  # the outermost call, which the command made
                raise Parsed(result)
            return result

        monkeypatch.setattr(cli.Parser, name, stopping)

    for name in ("parse_args", "parse_known_args", "parse_with_config"):
        stop_after(name)

    def parse(module: str, function: str, arguments: list[str]) -> None:
        assert function, f"there is no command {module!r}"
        try:
            getattr(importlib.import_module(f"lowrank_jax.{module}"), function)(arguments)
        except Parsed as parsed:
            result = parsed.args[0]
        except SystemExit as stop:  # --help
            assert not stop.code
            return
        args, rest = result if isinstance(result, tuple) else (result, [])
        if isinstance(rest, list) and rest:  # of parse_known_args: settings of a config
            cli.read_config([f"--config={args.config}", *rest])
        if function == "command" and hasattr(args, "args"):  # launch_local passes them to train
            parse(*COMMANDS["train"], args.args)

    return parse


def undocumented(words: list[str]) -> str | None:
    """Return the flags of another program that its documentation does not have, or None for a program not listed."""
    names = [name for name in DOCUMENTED if words[: name.count(" ") + 1] == name.split()]
    used = {word[2:].split("=")[0] for word in words if word.startswith("--")}
    return ", ".join(sorted(used - set(DOCUMENTED[names[0]].split()))) if names else None


def fault(words: list[str]) -> str:
    """Return what is wrong with a command of another program, or an empty text."""
    program = words[0].rsplit("/", 1)[-1]
    scripts = [word for word in words if re.match(r"scripts/.*\.(py|sh)$", word)]
    if program in ("python", "bash") and scripts:
        path = ROOT / scripts[0]
        if not path.is_file():
            return f"{scripts[0]} does not exist"
        flags = [w.split("=")[0] for w in words if w.startswith("--") and not w.startswith("--config")]
        unknown = [flag for flag in flags if not re.search(rf"{flag}\b", path.read_text())]
        return f"{scripts[0]} does not know {unknown}" if unknown else ""
    if (flags := undocumented(words)) is not None:
        return f"{words[0]}: does its documentation have {flags}? Then add it" if flags else f"{words[0]} {UNKNOWN}"
    if words[1:3] == ["-m", "pytest"]:
        return "" if (ROOT / words[3].split("::")[0]).is_file() else f"{words[3]} does not exist"
    if program == "pip" and words[1:2] == ["install"]:
        extras = [extra for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)) if ".[" in " ".join(words)]
        unknown = {name for extra in extras for name in extra.split(",")} - set(EXTRAS)
        return f"pyproject.toml has no extra {unknown}" if unknown else ""
    if program == "ls":
        return "" if (ROOT / words[1]).exists() else f"{words[1]} does not exist"
    return "" if words == ["source", ".venv/bin/activate"] else f"{words[0]} {UNKNOWN}"


def check(text: str, needs: str, parse) -> int:
    """Check each command of a shell text; return how many there are."""
    lines = commands(f"lowrank train --config=configs/quickstart.py --workdir=x {text}" if text[:2] == "--" else text)
    directives = re.findall(r"^#SBATCH (--\S+)", text, flags=re.M)
    for words in [["sbatch", *directives]] * bool(directives) + lines:
        inner = [w for w in words if " " in w and re.search(r"\blowrank(_jax)?\b.* --", w)]  # --command="..."
        for word in inner:
            check(word.partition("=")[2], needs, parse)
        if command := own(words):
            parse(*command)
            assert not undocumented(words[: len(words) - len(command[2])]), words  # of a launcher, such as srun
        elif (why := fault(words)) and not (needs and UNKNOWN in why or "--help" in words):
            raise AssertionError(why)
    return len(lines)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL], ids=lambda b: f"{b.page}:{b.line}")
def test_every_command_of_a_page_is_accepted(block, parse):
    assert check(block.text, block.needs, parse)


def test_a_plan_of_a_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = [own(words) for b in BLOCKS if b.language in SHELL for words in commands(b.text)]
    plans = {" ".join(line[2]): line for line in lines if line and line[:2] == COMMANDS["plan"]}
    plans = [line for text, line in plans.items() if "--topology" not in text]
    assert plans
    for module, function, arguments in plans:
        assert getattr(importlib.import_module(f"lowrank_jax.{module}"), function)(arguments)


PYTHON = [b for b in BLOCKS if b.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: f"{b.page}:{b.line}")
def test_every_python_block_of_a_page_runs(block, reference, tmp_path, monkeypatch):
    code = compile(block.text.replace("runs/quickstart", str(reference)), f"{block.page}:{block.line}", "exec")
    monkeypatch.chdir(tmp_path)
    if not block.needs:
        exec(code, {})


def test_blocks_in_other_languages():
    for block in BLOCKS:
        where = f"{block.page}:{block.line}"
        assert block.language in (*SHELL, "python", "json", "text", "diff", "mermaid"), f"{where}: {block.language}"
        if block.language == "json":
            assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines()), where


@pytest.mark.parametrize(
    "text, why",
    [
        ("lowrank train --config=configs/quickstart.py --workdir=x --wat=3", "wat"),
        (
            "python -m lowrank_jax.main --config=configs/quickstart.py --workdir=x --config.model.dd=3",
            "unknown config key",
        ),
        ("python -m lowrank_jax train --config=configs/none.py --workdir=x", "no such file"),
        ("srun python -m lowrank_jax launch_local -- --config=configs/quickstart.py", "workdir"),
        ("gcloud x --command='lowrank plan --config=configs/quickstart.py --topolgy=cpu'", "topolgy"),
        ("lowrank trian --workdir=x", "trian"),
        ("python scripts/none.py", "does not exist"),
        ("python scripts/bench/storm.py --hours=3", "--hours"),
        ('.venv/bin/pip install ".[gpus]"', "gpus"),
        ("#SBATCH --node=2\nls docs", "does its documentation have node?"),
        ("srun --cpus=2 lowrank train --config=configs/quickstart.py --workdir=x", "srun"),
        ("nvidia-smi", "neither checked nor marked"),
        ("ls nothing", "does not exist"),
    ],
)
def test_a_wrong_command_is_noticed(text, why, parse):
    with pytest.raises((AssertionError, cli.UsageError), match=re.escape(why)):
        check(text, "", parse)


def test_marks_and_words_of_a_page():
    page = 'a\n<!-- needs: gpu -->\n```bash\nA=1 b --c="d e" \\\n  f  # g\nh > i &\n```\n\n```\nj\n```\n'
    first, second = blocks_of("page.md", page)
    assert (first.line, first.needs, first.language, second.needs, second.line) == (3, "gpu", "bash", "", 9)
    assert commands(first.text) == [["b", "--c=d e", "f"], ["h"], ["i"]] and commands(second.text) == [["j"]]


def test_the_files_that_only_other_tools_read():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1] == version
    for file in (ROOT / ".github").rglob("*.yml"):
        assert "on" in (facts := yaml.safe_load(file.read_text())) or True in facts or "body" in facts, file
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    for copied in re.findall(r"^COPY (.*) \S+$", dockerfile, flags=re.M):
        assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied.split())
    assert set(re.findall(r"EXTRA=(\w+)", dockerfile)) <= set(EXTRAS)
    nav = re.findall(r": (docs/\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert {*nav} - {"docs/api.md"} == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}  # api: docs.sh


def anchors(page: pathlib.Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if ":" not in file:
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target} does not exist"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target} is no heading"


def test_the_messages_of_troubleshooting_are_those_of_the_package():
    """`…` stands for what a message computes. The text between is in the package."""
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "lowrank_jax").rglob("*.py")]
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    texts = "\0".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [m for m in re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)]
    assert len(messages) > 20
    for message in messages:
        unknown = [part for part in map(str.strip, message.split("…")) if part not in texts]
        assert not unknown, f"troubleshooting.md: {message}: no message has {unknown}"
