"""Chat templates that mean harm: 150 ways to take time or memory, to get out of the sandbox, or to end the process.

`python tests/hostile_templates.py [NAME…]` renders all, or those of these names, within the limits that users have, and
prints what each takes and the most.
"""

from __future__ import annotations

import resource
import sys
import time

from elm_mlx.errors import ElmError
from elm_mlx.text import jinja

_LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "BODY" + "{% endfor %}" * 3
_GROW = (
    "{% set ns = namespace(s=START) %}{% for i in range(99999) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s | length }}"
)


def _grow(start: str, step: str) -> str:
    return _GROW.replace("START", start).replace("STEP", step)


TEMPLATES = {
    # strings that are repeated, doubled, padded
    "repeated": "{{ 'x' * 10 ** 9 }}",
    "repeated more": "{{ 'x' * 10 ** 18 }}",
    "repeated beyond all": "{{ 'x' * 10 ** 30 }}",
    "repeated silently": "{% set x = 'x' * 10 ** 9 %}",
    "repeated in a test": "{% if 'x' * 10 ** 9 == 'y' %}y{% endif %}",
    "repeated for its length": "{{ ('x' * 10 ** 9) | length }}",
    "list repeated": "{{ ([0] * 10 ** 9) | length }}",
    "tuple repeated": "{{ ((0, 1) * 10 ** 9) | length }}",
    "doubled": _grow("'x'", "ns.s ~ ns.s"),
    "doubled by +": _grow("'x'", "ns.s + ns.s"),
    "list doubled": _grow("[0]", "ns.s + ns.s"),
    "grown by a character": _grow("'x' * 10 ** 6", "ns.s ~ 'x'"),
    "replaced": _grow("'x'", "ns.s.replace('x', 'xx')"),
    "replaced by a filter": _grow("'x'", "ns.s | replace('x', 'xxxxxxxx')"),
    "replaced at every place": "{{ ('x' * 10 ** 6).replace('', 'y' * 10 ** 6) | length }}",
    "joined": "{{ ('x' * 10 ** 5) | join('y' * 10 ** 5) | length }}",
    "joined by a method": "{{ ('y' * 10 ** 5).join('x' * 10 ** 5) | length }}",
    "joined ranges": "{{ range(99999) | join('y' * 10 ** 6) | length }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "center by a method": "{{ 'x'.center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "rjust": "{{ 'x'.rjust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "expandtabs": "{{ ('\t' * 10 ** 4).expandtabs(10 ** 8) }}",
    "indent": "{{ ('x\n' * 10 ** 5) | indent(10 ** 5) }}",
    "indent once": "{{ 'x' | indent(10 ** 10, first=true) }}",
    "indent by a text": "{{ ('x\n' * 10 ** 5) | indent('y' * 10 ** 5) | length }}",
    "wordwrap": "{{ ('x ' * 10 ** 7) | wordwrap(1) | length }}",
    "wordwrap by a text": "{{ ('x ' * 10 ** 5) | wordwrap(1, wrapstring='y' * 10 ** 5) | length }}",
    "wordwrap of one word": "{{ ('x' * 10 ** 7) | wordwrap(1) | length }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format by a precision": "{{ '%.1000000000f' | format(1.0) }}",
    "format by a star": "{{ '%*d' | format(10 ** 9, 1) }}",
    "format by %": "{{ '%1000000000d' % 1 }}",
    "format by a method": "{{ '{:1000000000}'.format(1) }}",
    "format twice": "{{ ('{:{}}' * 100).format(*[1, 10 ** 8] * 100) }}",
    "translate": "{{ ('x' * 10 ** 5).translate({120: 'y' * 10 ** 5}) | length }}",
    "upper": "{{ ('ﬃ' * 10 ** 8) | upper | length }}",
    "casefold": _grow("'ΐ' * 10 ** 6", "ns.s.upper().lower() ~ ns.s"),
    "escaped": "{{ ('<' * 10 ** 8) | escape | length }}",
    "forceescaped": _grow("'&'", "ns.s | forceescape"),
    "urlencoded": _grow("'%'", "ns.s | urlencode"),
    "urlize": "{{ ('http://a.de ' * 10 ** 6) | urlize | length }}",
    "striptags": "{{ ('<' * 10 ** 6) | striptags | length }}",
    "striptags of comments": "{{ ('<!--' * 10 ** 5) | striptags | length }}",
    "xmlattr": "{{ {'a': 'x' * 10 ** 8, 'b': '<' * 10 ** 8} | xmlattr | length }}",
    "title": "{{ ('x ' * 10 ** 8) | title | length }}",
    "wordcount": "{{ ('x ' * 5 * 10 ** 7) | wordcount }}",
    "encoded": "{{ ('ä' * 10 ** 8).encode('unicode_escape') | length }}",
    "split": "{{ ('x ' * 5 * 10 ** 7).split() | length }}",
    "splitlines": "{{ ('\n' * 10 ** 8).splitlines() | length }}",
    "partitioned": "{% for i in range(99999) %}{% set x = ('x' * 10 ** 7).partition('y') %}{% endfor %}",
    "filesizeformat": "{{ (10 ** 300) | filesizeformat }}{{ (10 ** (10 ** 6)) | filesizeformat }}",
    "truncated": "{{ ('x ' * 10 ** 8) | truncate(10 ** 9, leeway=10 ** 9) | length }}",
    # values
    "tojson": "{{ range(99999) | list | tojson(indent=100000) }}",
    "tojson nested": _grow("[]", "[ns.s, ns.s]").replace("ns.s | length", "ns.s | tojson"),
    "tojson by a text": "{{ [1, 2] | tojson(indent='x' * 10 ** 9) }}",
    "tojson separators": "{{ range(99999) | list | tojson(separators=['y' * 10 ** 5, ':']) }}",
    "tojson of itself": "{% set x = {} %}{% set y = x.update({'x': x}) %}{{ x | tojson }}",
    "pprint": _grow("[]", "[ns.s, ns.s]").replace("ns.s | length", "ns.s | pprint"),
    "string of nested lists": _grow("[]", "[ns.s, ns.s]").replace("ns.s | length", "ns.s | string"),
    "deep list": _grow("[]", "[ns.s]").replace("ns.s | length", "ns.s"),
    "deep list compared": "{% set ns = namespace(a=[], b=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}"
    "{% set ns.b = [ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "deep list let go": _grow("[]", "[ns.s]").replace("{{ ns.s | length }}", "{% set ns.s = 0 %}"),
    "lipsum": "{{ lipsum(n=10 ** 6) }}",
    "lipsum of long ones": "{{ lipsum(n=1, min=10 ** 7, max=10 ** 7 + 1) }}",
    "range": "{{ range(10 ** 9) | list | length }}",
    "ranges": _grow("[]", "ns.s + [range(99999) | list]"),
    "sorted": "{{ (range(99999) | list * 100) | sort | length }}{{ ('x' * 10 ** 7) | sort | length }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9, 0) | list | length }}",
    "unique": "{{ (range(99999) | list * 1000) | unique | list | length }}",
    "grouped": "{{ (range(99999) | list * 50) | groupby('x') | list | length }}",
    "summed lists": "{{ ([[0]] * 10 ** 5) | sum(start=[]) | length }}",
    "dictionary": "{{ dict.fromkeys(range(10 ** 5) | list * 1000) | length }}"
    "{% set ns = namespace(d={}) %}{% for i in range(99999) %}{% for j in range(99) %}"
    "{% set ns.d = dict(ns.d, **{i ~ 'x' ~ j: i}) %}{% endfor %}{% endfor %}",
    "mapped": "{{ range(99999) | map('center', 10 ** 5) | list | length }}",
    "cycler": "{% set c = cycler(*range(99999)) %}" + _LOOPS.replace("BODY", "{% set x = c.next() %}"),
    "joiner": "{% set j = joiner('x' * 10 ** 8) %}{{ j() }}{% for i in range(99) %}{{ j() }}{% endfor %}",
    "namespace of itself": _grow("namespace()", "namespace(a=ns.s, b='x' * 10 ** 5)"),
    "slices of a text": "{% for i in range(99999) %}{% set x = ('x' * 10 ** 8)[::-1] %}{% endfor %}",
    "items of a text": "{{ ('x' * 10 ** 8) | list | length }}",
    "random": _LOOPS.replace("BODY", "{% set x = range(99999) | random %}"),
    # numbers
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a power": "{{ 2 ** (2 ** 40) }}",
    "squared": _grow("3", "ns.s * ns.s").replace("ns.s | length", "ns.s % 7"),
    "shifted by powers": "{% set x = 2 ** (10 ** 8) %}{{ x * x % 7 }}",
    "modulo": "{% set x = 7 ** (10 ** 5) %}{% for i in range(99999) %}{% set y = x % (x - i) %}{% endfor %}",
    "long number as text": "{{ (10 ** 4000) | string | length }}{{ (2 ** (10 ** 7)) | string }}",
    "number from a text": "{{ ('9' * 10 ** 7) | int }}",
    "number in another base": "{{ ('f' * 10 ** 8) | int(base=16) % 7 }}",
    "rounded": "{{ 1.5 | round(10 ** 9) }}{{ (10 ** (10 ** 6)) | round }}",
    # loops
    "loops": _LOOPS.replace("BODY", ""),
    "loops that write": _LOOPS.replace("BODY", "abcdefgh"),
    "loops that render": _LOOPS.replace("BODY", "{{ a }}"),
    "loops that raise": _LOOPS.replace("BODY", "{% if c > 10 ** 6 %}{{ raise_exception('x') }}{% endif %}"),
    "loop with a filter": "{% for a in range(99999) if 'x' * 10 ** 7 == 'y' %}{% endfor %}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "wide recursive loop": "{% for a in range(9) recursive %}{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro that calls twice": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
    "macros of each other": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro with a caller": "{% macro f() %}{{ caller() ~ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "macro with many arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*('x' * 10 ** 8)) }}",
    "macro that doubles": "{% macro f(s, n) %}{{ f(s ~ s, n - 1) if n else s }}{% endmacro %}{{ f('x', 60) }}",
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "filter block": "{% filter replace('x', 'y' * 10 ** 6) %}{% for i in range(9999) %}x{% endfor %}{% endfilter %}",
    "set block": "{% set x %}{% for i in range(99999) %}{{ 'x' * 10 ** 5 }}{% endfor %}{% endset %}",
    "autoescape": "{% autoescape true %}{{ '<' * 10 ** 8 }}{% endautoescape %}",
    "generation": "{% generation %}" + _LOOPS.replace("BODY", "x") + "{% endgeneration %}",
    "strftime": "{{ strftime_now('%c' * 10 ** 7) }}",
    "strftime padded": "{{ strftime_now('%1000000000Y') }}",
    # already when it is compiled
    "folded": "{{ 'x' * 10 ** 9 ~ 'y' }}{% if false %}{{ 'x' * 10 ** 9 }}{% endif %}",
    "folded power": "{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}",
    "folded filter": "{% if false %}{{ 'x' | center(10 ** 10) }}{% endif %}",
    "folded list": "{% if false %}{{ [0] * 10 ** 9 }}{% endif %}",
    "folded range": "{% if false %}{{ (('x' * 10 ** 8) | list) }}{% endif %}",
    "parentheses": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "brackets": "{{ " + "[" * 10_000 + "]" * 10_000 + " }}",
    "unclosed brackets": "{{ " + "[" * 100_000,
    "nots": "{{ " + "not " * 50_000 + "1 }}",
    "minuses": "{{ " + "- " * 50_000 + "1 }}",
    "sum": "{{ 1" + " + 1" * 50_000 + " }}",
    "concatenation": "{{ 'x'" + " ~ 'x'" * 50_000 + " }}",
    "comparison": "{{ 1" + " < 2" * 50_000 + " }}",
    "filters": "{{ 'x'" + " | upper" * 20_000 + " }}",
    "attributes": "{{ x" + ".y" * 20_000 + " }}",
    "calls": "{{ x" + "()" * 20_000 + " }}",
    "conditions": "{{ 1" + " if 1 else 1" * 20_000 + " }}",
    "nested conditions": "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
    "nested loops": "{% for i in [1, 2] %}" * 60 + "x" + "{% endfor %}" * 60,
    "many branches": "{% if 0 %}" + "{% elif 0 %}" * 20_000 + "{% endif %}",
    "many statements": "{% set x = 1 %}" * 60_000,
    "many expressions": "{{ x }}" * 100_000,
    "many macros": "".join(f"{{% macro f{i}() %}}{{% endmacro %}}" for i in range(20_000)),
    "many names": "".join(f"{{{{ a{i} }}}}" for i in range(60_000)),
    "literal": "{{ '" + "x" * 900_000 + "' * 10000 }}",
    "number": "{{ " + "9" * 900_000 + " }}",
    "list of numbers": "{{ [" + "1," * 400_000 + "] }}",
    "escapes": "{{ '" + "\\N{BULLET}" * 80_000 + "' }}",
    "opening braces": "{" * 900_000,
    "opening comments": "{#" * 450_000,
    "opening blocks": "{%" * 450_000,
    "raw": "{% raw %}" * 100_000,
    "blank": " " * 900_000 + "{% if 1 %}" + " " * 90_000,
    "lines": "\n" * 900_000 + "{%- if 1 -%}",
    # out of the sandbox
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attr": "{{ '' | attr('__class__') }}",
    "format attributes": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format attributes of a map": "{{ '{a.__init__.__globals__}'.format_map({'a': cycler}) }}",
    "format fetched by attr": "{{ ('{0.__class__}' | attr('format'))('') }}",
    "format mapped": "{{ ['{0.__class__.__base__}'] | map('format', '') | list }}",
    "frame": "{{ (messages | map('x')).gi_frame.f_globals }}",
    "changes what it is given": "{{ messages.append(1) }}{{ messages.clear() }}{{ messages[0].update({'role': 'x'}) }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.system('true') }}",
    "extends": "{% extends messages[0].content %}",
    "its own context": "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__ }}",
    # what it raises
    "raises a text": "{{ raise_exception('\x1b]0;title\x07' ~ 'x' * 10 ** 7) }}",
    "raises lines": "{{ raise_exception('a\nb\r\x1b[2J\u202e\u2028') }}",
    "raises a list": "{{ raise_exception([range(99999) | list] * 100) }}",
    "raises nothing": "{{ raise_exception('') }}{{ raise_exception(none) }}",
    "raises an undefined": "{{ raise_exception(nothing.at.all) }}",
    "an unknown filter of control characters": "{{ 'x' | \x1b[31m }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "NUL": "{{ '\0' * 100 }}\0",
}  # fmt: skip


def main() -> None:
    message = [{"role": "user", "content": "Hi"}]
    slowest = 0.0
    chosen = {name: TEMPLATES[name] for name in sys.argv[1:]} or TEMPLATES
    for name, source in chosen.items():
        jinja.render("", name, [], {})  # so that the start of a process is not counted
        begin = time.perf_counter()
        try:
            outcome = str(jinja.render(source, name, [(message, True)], {})[0])
        except ElmError as error:
            outcome = str(error)
        took = time.perf_counter() - begin
        slowest = max(slowest, took)
        print(f"{took:5.2f} s  {name}: {outcome.removeprefix(f'{name}: the chat template ')[:80]!a}")
    jinja.stop()
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(f"{len(chosen)} templates: {slowest:.2f} s and {most / 1e6:.0f} MB at most")


if __name__ == "__main__":
    main()
