"""Templates are programs of strangers: whatever they compute ends soon, and ordinary ones give what they gave."""

import concurrent.futures
import time

import pytest

from lowrank_jax.config import UsageError
from lowrank_jax.data import template
from lowrank_jax.data.tokenizer import CHATML

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
GROW = "{% set ns = namespace(x='a', l=['a'], n=9) %}{% for i in range(99) %}BODY{% endfor %}{{ ns.x }}{{ ns.l }}"
MANY = "{% set l = range(99999) | list %}{% set s = 'a' * 1000000 %}{% for i in range(99999) %}BODY{% endfor %}"
HANG = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}x{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [[1] * 50] * 50 recursive %}{{ loop([a] * 50) if a != 1 }}{% endfor %}",
    "macro": "{% macro f(n) %}{{ (f(n - 1) ~ f(n - 2)) if n > 1 else 'x' }}{% endmacro %}{{ f(99) }}",
    "macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "caller": "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% for i in range(99999) %}x{% endfor %}{% endcall %}",
    "sum": GROW.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
    "concatenation": GROW.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
    "block": GROW.replace("BODY", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "list": GROW.replace("BODY", "{% set ns.l = ns.l + ns.l %}"),
    "nested list": GROW.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}"),
    "nested object": GROW.replace("BODY", "{% set ns.l = {'a': ns.l, 'b': ns.l} %}"),
    "nested call": GROW.replace("BODY", "{% set ns.l = dict(a=ns.l, b=ns.l) %}"),
    "safe text": GROW.replace("BODY", "{% set ns.x = (ns.x | safe) + ns.x %}"),
    "number": GROW.replace("BODY", "{% set ns.n = ns.n * ns.n %}"),
    "negative number": GROW.replace("range(99)", "range(99999)").replace("BODY", "{% set ns.n = ns.n - (0 - ns.n) %}"),
    "times": "{{ 'a' * 10**10 }}",
    "times a list": "{{ 10**10 * [0] }}",
    "power": "{{ 10**(10**8) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "padding": "{{ 'a'.rjust(width=10**9) }}",
    "tabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "percent": "{{ '%1000000000s' % 'a' }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%1000000000s' | format('a') }}",
    "percent with a key": "{{ '%(a(b)c)1000000000s' % {'a(b)c': 1} }}",
    "format in brackets": "{{ '{0[}]:1000000000}'.format({'}': 1}) }}",
    "format": "{{ '{:>1000000000}'.format('a') }}",
    "nested format": "{{ '{:>{w}}'.format('a', w=10**9) }}",
    "many fields": "{% set b = 'x' * 1000000 %}{{ ('{0}' * 100000).format(b) }}",
    "join": "{% set b = 'x' * 1000000 %}{{ range(99999) | join(b) }}",
    "join attributes": "{{ ([{'a': 'x' * 900000}] * 99999) | join(attribute='a') }}",
    "replace": "{% set b = 'x' * 1000000 %}{{ b.replace('', b) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000, true, true) }}",
    "json": "{{ ([[1]] * 100000) | tojson(indent=100000) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "fill": "{{ [1] | batch(10**9, 1) | list }}",
    "lists in a list": "{{ ([[1]] * 90000) | sum(start=[]) }}",
    "filters": MANY.replace("BODY", "{{ l | select('none') | list | length }}"),
    "lazy filters": MANY.replace("BODY", "{{ l | map('abs') | map('abs') | list | length }}"),
    "sorting": MANY.replace("BODY", "{{ l | sort | first }}"),
    "searching": MANY.replace("BODY", "{% if 'b' in s or 'b' in l %}x{% endif %}"),
    "comparing": MANY.replace("BODY", "{% if l[1:] == l[:-1] %}x{% endif %}"),
    "slicing": MANY.replace("BODY", "{% set t = s[1:] %}"),
    "methods": MANY.replace("BODY", "{% set t = s.count('a') %}"),
    "trimming": MANY.replace("BODY", "{% set t = s | trim %}"),
    "output": MANY.replace("BODY", "{{ s }}"),
    "arguments": "{% macro f() %}{% endmacro %}" + MANY.replace("BODY", "{{ f(*l) }}"),
    "a long template": "{{ 1 }}" * 100_000,
    "a deep template": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
}


@pytest.mark.parametrize("program", HANG.values(), ids=HANG)
def test_a_template_that_would_not_end_is_stopped_in_one_line(program):
    started = time.process_time()
    with pytest.raises(UsageError, match="^the chat template ") as e:
        template.render(program, CHAT, {"tools": None})
    assert time.process_time() - started < 5 and len(str(e.value)) < 300 and "\n" not in str(e.value)


def test_the_line_names_the_template():
    with pytest.raises(
        UsageError, match=r"the chat template \"\{\{ 'a' \* 10\*\*10 \}\}\.*\"?\.\.\. is stopped: it builds"
    ):
        template.render("{{ 'a' * 10**10 }}", CHAT, {})


def test_templates_in_many_threads_are_stopped_each_for_itself():
    """A server renders in threads, where no signal arrives."""

    def run(program: str) -> str:
        try:
            return template.render(program, CHAT, {"tools": None})
        except UsageError as e:
            return str(e)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(run, [HANG["loops"], "{{ messages[0].content }}"] * 6))
    assert answers[1::2] == ["Hi"] * 6 and all("is stopped: it takes more steps" in answer for answer in answers[::2])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # another thread uses up its work during this template
        other = lambda: pool.submit(run, HANG["loops"]).result()
        program = "{{ other()[:0] }}{% for i in range(9) %}x{% endfor %}"
        assert template.render(program, CHAT, {"other": other}) == "x" * 9


def test_a_long_conversation_is_no_reason_to_stop():
    long = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * 20} for i in range(1000)]
    assert template.render(CHATML, long, {"tools": None}).count("turn 999 ") == 20
    earlier = (
        "{% for m in messages %}{{ messages[:loop.index] | selectattr('role', 'equalto', 'user') | list | length }}"
    )
    assert template.render(earlier + "{% endfor %}", long[:300], {}).endswith("149150150")
    huge = [{"role": "user", "content": "x " * 2_000_000}]
    passes = "{{ messages[0].content | trim | replace('a', 'b') }}{{ messages[0].content.split('</think>')[-1] }}"
    assert len(template.render(passes, huge, {})) == 8_000_000 - 1


VALUES = {
    "{{ 2 + 3 * 4 - 1 }} {{ 7 // 2 }} {{ 7 % 2 }} {{ 2**10 }} {{ 'ab' * 2 }}": "13 3 1 1024 abab",
    "{{ 'a' ~ 1 ~ none ~ [1, 'x'] }}": "a1None[1, 'x']",
    "{% for x in [3, 1] if x > 1 %}{{ loop.index }}{{ loop.last }}{{ x }}{% else %}none{% endfor %}": "1True3",
    "{% for x in range(2) | map('string') %}{{ loop.length }}{{ x }}{% endfor %}": "2021",
    "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{% call f(3) %}c{% endcall %}": "<1><3c>",
    "{{ '%s-%03d' % ('a', 7) }} {{ '{:>4}|{}'.format('a', 1) }}": "a-007    a|1",
    "{{ 'Date: July 2024, 100%% (%(a)s) **b**' % {'a': 1} }}": "Date: July 2024, 100% (1) **b**",
    "{{ 'Date: 12345 {}'.format(1) }} {{ '%s: 2024' | format('a') }}": "Date: 12345 1 a: 2024",
    "{{ messages[-1].content[::-1] }} {{ 'H' in messages[0].content }} {{ 1 not in (1, 2) }}": "oH True False",
    "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}": "3",
    "{{ messages | map(attribute='content') | join(',') }}": "Hi,Ho",
    "{{ {'b': '\u00e9'} | tojson }} {{ {'b': 1}.items() | list }}": '{"b": "\u00e9"} [(\'b\', 1)]',
    "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}": (
        "02"
    ),
    "{{ [1, 2] + [3] }} {{ (1, 2) == (1, 2) }} {{ 'a' 'b' }} {{ not 'x' is defined }}": "[1, 2, 3] True ab False",
}


@pytest.mark.parametrize("program", VALUES)
def test_counting_changes_no_value(program):
    assert template.render(program, CHAT, {}) == VALUES[program]
