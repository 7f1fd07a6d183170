"""A hostile chat template ends with an error, soon, whatever it tries."""

from __future__ import annotations

import time

import pytest

from oarsmith.errors import DataError
from oarsmith.text import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
GROWTH = "built a text longer than"
STEPS = "ran more than"
FORBIDDEN = "sandbox forbids"
HOSTILE = {
    "range": ("{% for i in range(10000000000) %}x{% endfor %}", "Range too big"),
    "nested": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", STEPS),
    "text_loop": ("{% for i in range(99999) %}{% for c in 'a' * 1000000 %}{% endfor %}{% endfor %}", STEPS),
    "filters": ("{% for i in range(99999) %}{% set x = range(9999) | map('string') | list %}{% endfor %}", STEPS),
    "contains": ("{% set t = 'a' * 30000000 %}{% for i in range(99999) %}{{ 'b' in t }}{% endfor %}", STEPS),
    "slices": ("{% set t = 'a' * 3000000 %}{% for i in range(99999) %}{% set x = t[1:] %}{% endfor %}", STEPS),
    "doubling": ("{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", GROWTH),
    "adding": ("{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", GROWTH),
    "output": ("{% for i in range(99999) %}{{ 'y' * 100000 }}{% endfor %}", GROWTH),
    "times": ("{{ 'x' * 10000000000 }}", GROWTH),
    "times_list": ("{{ [1] * 10000000000 }}", GROWTH),
    "power": ("{{ 10 ** (10 ** 10) }}", GROWTH),
    "center": ("{{ 'x' | center(10000000000) }}", GROWTH),
    "ljust": ("{{ 'x'.ljust(10000000000) }}", GROWTH),
    "indent": ("{{ messages | tojson(indent=10000000000) }}", GROWTH),
    "percent": ("{{ '%10000000000d' % 1 }}", GROWTH),
    "format": ("{{ '{:>10000000000}'.format('x') }}", GROWTH),
    "format_width": ("{{ '{:>{}}'.format('x', 10000000000) }}", GROWTH),
    "format_filter": ("{{ '%10000000000d' | format(1) }}", GROWTH),
    "replace": ("{% set t = 'a' * 10000000 %}{{ t.replace('a', t) }}", GROWTH),
    "join": ("{{ ('a' * 10000000).join(range(99999)) }}", GROWTH),
    "recursion": ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
    "classes": ("{{ ''.__class__.__mro__ }}", FORBIDDEN),
    "globals": ("{{ raise_exception.__globals__ }}", FORBIDDEN),
    "format_attributes": ("{{ '{0.__class__}'.format(1) }}", FORBIDDEN),
    "mutation": ("{{ messages.append(1) }}", FORBIDDEN),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped(name: str) -> None:
    source, message = HOSTILE[name]
    start = time.process_time()
    with pytest.raises(DataError, match=message):
        ChatTemplate.from_jinja(source).render(MESSAGES)
    # Measured: 3.5 s for the slowest; without limits these run for hours or take all memory.
    assert time.process_time() - start < 30


def test_messages_are_never_changed() -> None:
    messages = [{"role": "user", "content": "x", "calls": [1]}]
    with pytest.raises(DataError, match=FORBIDDEN):
        ChatTemplate.from_jinja("{{ messages[0].update({'role': 'y'}) }}").render(messages)
    assert messages == [{"role": "user", "content": "x", "calls": [1]}]


def test_long_conversations_stay_within_the_limits() -> None:
    # Every message looks at all of them: quadratic, as some released templates are.
    source = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 100}] * 2000
    assert len(ChatTemplate.from_jinja(source).render(messages)) == 2000 * 500


def test_dialect() -> None:
    def render(source: str, **variables: object) -> str:
        return ChatTemplate.from_jinja(source).render(MESSAGES, **variables)

    assert render("{{ value | tojson }}", value={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert render("{{ value | tojson(indent=2) }}", value=[1]) == "[\n  1\n]"
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{{ missing }}{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ '%s-%d' % ('a', 3) }}{{ '{}'.format(5) }}{{ 2 ** 5 }}{{ [1] + [2] }}") == "a-3532[1, 2]"
    source = "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.index }}{% endfor %}"
    assert render(source) == "TrueTrue11"


def test_generation_blocks_give_their_spans() -> None:
    source = "a{% generation %}bc{% endgeneration %}d{%- generation -%} e {%- endgeneration -%} f"
    rendering = ChatTemplate.from_jinja(source).render_with_spans(MESSAGES)
    assert rendering.text == "abcdef"
    assert [rendering.text[start:end] for start, end in rendering.generated] == ["bc", "e"]
