"""Chat templates, which are programs of strangers: compiled once, and run with a limit on their work and their sizes.

Jinja's sandbox forbids Python's internals, but not `'a' * 10**10` or nested loops. Here each turn of a loop and each
call of a macro costs as many units as its body has nodes, and each text or list costs its size. The count does not
depend on the machine's speed, so a run and its resume refuse the same conversations. (`minijinja` counts steps too, but
lacks a limit on sizes, and the methods of Python's types that templates call.)
"""

import datetime
import functools
import itertools
import json
import re
import string
import threading
from collections.abc import Collection, Iterable, Mapping, Sized

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lowrank_jax.config import UsageError
from lowrank_jax.data.blocks import one_line

# Unicode noncharacters are reserved for a program's own use; they are removed from message text.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
TODAY = datetime.datetime(2024, 7, 26)  # for templates: with the real date a resume would change the data
LONGEST_TEMPLATE = 100_000  # characters; the longest of the well-known ones has 20,000
WORK, WORK_PER_CHARACTER = 3_000_000, 32  # units of about 0.3 us for a conversation, and more for a long one
LOOP, CALL, ELEMENT = 5, 20, 8  # units of an iteration and a macro's call beside their bodies', and of a list's element
LARGEST = 4_000_000  # characters or elements of one value, and 4 times the conversation's
PARTS = 32  # of a template's output that are joined before they are counted
SMALL = 1024  # characters of a text that costs nothing of its own
LARGEST_NUMBER, MOST_BITS = 100_000, 4096  # of a number as an argument, and of a number as a result
WIDE_PERCENT, WIDE_FIELD = re.compile(r"%([^%a-zA-Z]*(\*|\d{4})|\()"), re.compile(r"\{|\d{4}")

# Filters and methods whose time is constant, or grows with the value or its square. That of all others grows at most
# with the product of the value's size and the largest argument's.
INSTANT = set("abs attr d default first get items keys last length safe values".split())
LINEAR = set(
    """capitalize count endswith find index list lower lstrip map partition reject rejectattr removeprefix
    removesuffix reverse rfind rindex rpartition rsplit rstrip select selectattr split splitlines startswith string
    strip title trim upper""".split()
)
QUADRATIC = set("striptags sum urlize wordwrap xmlattr".split())
COMPARING = "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper".split()


class LimitError(Exception):
    """A template did more work, or built a larger value, than its conversation can need."""


class _Work(threading.local):
    """The work left to the template that this thread runs, and the sizes of the lists and objects that it uses."""

    left, largest = WORK, LARGEST

    def __init__(self):
        self.sizes = {}  # by id: (size, the value, so that the id stays its own)

    def start(self, characters: int) -> None:
        self.left, self.largest = WORK + WORK_PER_CHARACTER * characters, LARGEST + 4 * characters
        self.sizes.clear()

    def charge(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise LimitError("it takes more steps than a conversation of this length can need")

    def check(self, size: int) -> None:
        if size > self.largest:
            raise LimitError("it builds a value larger than a conversation of this length can need")


_work = _Work()


def render(template: str, messages: list[dict], variables: dict) -> str:
    """Return what a template makes of messages; raises UsageError if it fails, or needs more work than is allowed."""
    _work.start(sum(len(m["content"]) for m in messages))
    try:
        program = compiled(template)
        if isinstance(program, Exception):
            raise program
        return program.render(messages=messages, **variables)
    except LimitError as e:
        raise UsageError(f"the chat template {ascii(' '.join(template[:40].split()))}... is stopped: {e}") from None
    except Exception as e:  # a template is a program, which may raise anything
        raise UsageError(f"the chat template refuses a conversation: {one_line(e)}") from None
    finally:
        _work.sizes.clear()


@functools.lru_cache
def compiled(template: str) -> jinja2.Template | Exception:
    """Return the program of a template, or the reason why it has none: to find it may take a second."""
    if len(template) > LONGEST_TEMPLATE:
        return LimitError(f"it has {len(template):,} characters, and at most {LONGEST_TEMPLATE:,} are allowed")
    try:
        return _environment().from_string(template)
    except Exception as e:
        return e.with_traceback(None)


@functools.lru_cache
def words(template: str) -> frozenset[str]:
    """Return the names of variables, attributes and keys in a template, and OPEN if it marks text."""
    _work.start(0)
    try:
        tree = _environment().parse(template[:LONGEST_TEMPLATE])
        names = {node.name for node in tree.find_all(nodes.Name)} | {n.attr for n in tree.find_all(nodes.Getattr)}
        names |= {OPEN} if any(n.data == OPEN for n in tree.find_all(nodes.TemplateData)) else set()
        return frozenset(names | {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)})
    except Exception:  # `render` reports it
        return frozenset()


@functools.cache
def _environment() -> "_Environment":
    env = _Environment(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _to_json
    del env.filters["random"], env.globals["lipsum"]  # a resume would change the data
    env.filters = {name: _limited(name, f) for name, f in env.filters.items()}
    env.filters |= {"_tick": _tick, "_weigh": _weigh, "_compared": _compared, "_concat": _concat}
    env.tests |= {name: _limited_test(env.tests[name]) for name in COMPARING}
    env.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime, "namespace": _Namespace}
    return env


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"-", "*", "/", "//", "%", "**"})  # `_Limits` wraps +

    def _parse(self, source, name, filename):
        tree = _Limits().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def concat(self, parts: Iterable[str]) -> str:
        """Join a template's output, a few parts at a time, to count it while it grows."""
        parts, texts, more = iter(parts), [], True
        while more:
            text = "".join(some := list(itertools.islice(parts, PARTS)))
            _work.charge(len(text) >> 2)
            texts.append(text)
            more = len(some) == PARTS
        return "".join(texts)

    def call_binop(self, context, operator, left, right):
        kinds = isinstance(left, int), isinstance(right, int)
        if operator == "*" and all(kinds):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*" and any(kinds):
            count, value = (left, right) if kinds[0] else (right, left)
            _work.check(max(0, count) * _size(value))
        elif operator == "**" and all(kinds):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str | bytes):
            _before("%", left, (right,))
        return _weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value):
        wrapper = super().wrap_str_format(value)
        if wrapper is not None:
            wrapper.__dict__["__self__"] = value.__self__  # for `call`
        return wrapper

    def call(__self, __context, __obj, *args, **kwargs):  # the names cannot be those of keyword arguments
        _work.charge(len(args))
        owner = getattr(__obj, "__self__", None)
        if owner is not None:
            name = getattr(__obj, "__name__", "")
            name = f"str.{name}" if name in ("format", "format_map") else name  # the filter of that name is Python's %
            _before(name, owner, (*args, *kwargs.values()))
        return _weigh(super().call(__context, __obj, *args, **kwargs))


class _Limits(NodeTransformer):
    """Puts the counting into a parsed template."""

    def visit_For(self, node):
        self._count_runs(node, LOOP)
        if node.test is not None:  # it runs for elements that the body does not get
            units = nodes.Const(LOOP + _count([node.test]))
            node.test = nodes.And(_filter(units, "_tick"), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node):
        return self._count_runs(node, CALL)

    def _count_runs(self, node, units: int):
        """Let each run of a body charge its nodes, and `units` more."""
        units += _count(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(units), "_tick"), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Add(self, node, depth: int = 1):
        """Weigh a sum, and of a sum of many parts every eighth, so that no sum grows far before it is weighed."""
        left = node.left
        node.left = self.visit_Add(left, depth + 1) if isinstance(left, nodes.Add) else self.visit(left)
        node.right = self.visit(node.right)
        return _filter(node, "_weigh") if depth % 8 == 1 else node

    def visit_Compare(self, node):
        self.generic_visit(node)
        for operand in node.ops:  # a comparison ends with the shorter value, a search with the container
            is_short = operand.op not in ("in", "notin") and _is_constant(node.expr)
            if not (is_short or _is_constant(operand.expr)):
                operand.expr = _filter(operand.expr, "_compared")
        return node

    def visit_List(self, node):
        self.generic_visit(node)
        return node if _is_constant(node) or getattr(node, "ctx", "load") != "load" else _filter(node, "_weigh")

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return _filter(node, "_weigh") if isinstance(node.arg, nodes.Slice) else node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


def _count(parts: list[nodes.Node]) -> int:
    """Return the number of nodes, without the bodies of inner loops and macros, which count for themselves."""
    own = lambda node: [] if isinstance(node, nodes.For | nodes.Macro) else node.iter_child_nodes()
    return sum(1 + _count(list(own(node))) for node in parts)


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


def _tick(units: int) -> bool:
    _work.left = left = _work.left - units
    return left >= 0 or _work.charge(0)


def _weigh(value):
    """Return a new value, after its size is counted."""
    if isinstance(value, str | bytes):
        if len(value) > SMALL:
            _work.charge(len(value) >> 2)
    elif isinstance(value, int):
        _check_bits(value.bit_length())
    elif isinstance(value, list | tuple | dict | set | frozenset):
        _work.charge(len(value))
        _work.check(_size(value))
    elif hasattr(value, "__next__"):
        return _ticking(value)
    return value


def _ticking(values):
    for value in values:
        _work.charge(ELEMENT + (_length(value) >> 2))
        yield value


def _compared(value):
    """Return a value, after the time that a comparison with it takes is counted."""
    if isinstance(value, str | list | tuple):
        _work.charge(_size(value) >> 4)
    return value


def _concat(parts: list) -> str:
    texts = [_weigh(str(part)) for part in parts]
    _work.charge(sum(map(len, texts)) >> 2)
    return "".join(texts)


def _before(name: str, value, arguments: tuple) -> None:
    """Count what a filter or method may take and build, before it does."""
    if name in INSTANT:
        return
    if name in ("%", "format", "str.format", "str.format_map") and isinstance(value, str | bytes):
        _check_fields(name, value if isinstance(value, str) else value.decode("latin-1"))
    largest, length = 0, _length(value)
    _work.charge(len(arguments) + (length >> 1 if isinstance(value, str | bytes) else ELEMENT * length))
    for argument in arguments:
        number = abs(argument) if isinstance(argument, int) else 0
        if number > LARGEST_NUMBER:
            raise LimitError(f"it gives a number above {LARGEST_NUMBER:,} to {name}")
        largest = max(largest, number, 0 if name in LINEAR else _size(argument))
    if name not in LINEAR:
        size = _size(value)
        size *= 1 + max(largest, size if name in QUADRATIC else 0)
        _work.check(size)
        _work.charge(size >> 3)


def _check_fields(name: str, text: str) -> None:
    """Raise LimitError if a text asks for a field of 1,000 characters or more, or of a computed width."""
    if name.startswith("str."):
        is_wide = any(WIDE_FIELD.search(spec or "") for _, _, spec, _ in string.Formatter().parse(text))
    else:
        text = text.replace("%%", "")
        for _ in range(4):  # keys, which may have parentheses of their own
            text = re.sub(r"\([^()]*\)", "", text)
        is_wide = WIDE_PERCENT.search(text)
    if is_wide:
        raise LimitError("it formats a text with a field of 1,000 characters or more")


def _limited(name: str, function):
    """Return a filter that counts its work."""
    if name in INSTANT:
        return function
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def limited(*args, **kwargs):
        if len(args) == 1 and not kwargs and type(args[0]) is str and len(args[0]) < SMALL:
            return function(args[0])
        _before(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return _weigh(function(*args, **kwargs))

    return limited


def _limited_test(function):
    @functools.wraps(function)
    def limited(*values):
        for value in values:
            _compared(value)
        return function(*values)

    return limited


def _length(value) -> int:
    return len(value) if isinstance(value, Sized) else 1


def _size(value) -> int:
    """Return the characters and elements of a value when it is written out, where a list may contain another twice."""
    if isinstance(value, str | bytes):
        return len(value) + 1
    if not isinstance(value, Collection) or isinstance(value, range):
        return 1 + _length(value)
    if known := _work.sizes.get(id(value)):
        return known[0]
    _work.charge(4 * len(value))
    parts = [*value, *value.values()] if isinstance(value, Mapping) else value
    size = 1 + sum(map(_size, parts))
    _work.sizes[id(value)] = size, value
    return size


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise LimitError("it computes a number of more than a thousand digits")


class _Namespace(Namespace):
    def __repr__(self) -> str:  # of namespaces in namespaces it would double each time
        return "<Namespace>"


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
        return [mark(OPEN), *parser.parse_statements(("name:endgeneration",), drop_needle=True), mark(CLOSE)]


def _to_json(value, **options) -> str:
    """Return plain JSON, not escaped for HTML."""
    text = json.dumps(value, **({"ensure_ascii": False} | options))
    return text.replace(ascii(BREAK)[1:-1], BREAK)  # also with ensure_ascii


def _refuse(reason: str):
    raise jinja2.TemplateError(str(reason))
