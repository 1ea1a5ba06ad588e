"""Opacity: templates that only print contents are known as such, and every way of looking is noticed."""

import pytest
from throwaway import TEMPLATES

from omnidata.text.chat_template import ChatTemplate

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
PRINTS = {
    "concatenation": LOOP % "{{ '<|' ~ m.role ~ '|>' + m['content'] }}",
    "trim": LOOP % "{{ m.content | trim }}{{ m.content.strip() }}",
    "type tests": LOOP
    % "{% if m.content is string and 'tool_calls' not in m %}{{ m.get('content') }}{% endif %}",
    "slices": "{% for m in messages[1:] %}{{ m.content if loop.last else '' }}{% endfor %}",
    "positions": LOOP % "{% if messages[loop.index0 - 1].role == 'user' %}{{ m.content }}{% endif %}",
    "length": "{% if messages | length > 1 %}{{ messages[0].content }}{% endif %}",
}
LOOKS = {
    "truth": LOOP % "{% if m.content %}x{% endif %}",
    "choice": "{{ 'x' if messages[0].content else 'y' }}",
    "filter": LOOP % "{{ m.content | upper }}",
    "default": LOOP % "{{ m.content | default('x') }}",
    "membership": LOOP % "{% if 'x' in m.content %}{% endif %}",
    "comparison": LOOP % "{% if m.content == 'x' %}{% endif %}",
    "method": LOOP % "{{ m.content.split('x')[-1] }}",
    "subscript": LOOP % "{{ m.content[0] }}",
    "repetition": LOOP % "{{ m.content * 2 }}",
    "formatting": LOOP % "{{ '%s' % m.content }}",
    "trim of a joined text": LOOP % "{% set c = 'a ' + m.content %}{{ c | trim }}",
    "comparison of a joined text": LOOP % "{% set c = 'a' ~ m.content %}{% if c == 'ab' %}{% endif %}",
    "a copy": "{% set a = messages[0].content %}{% set b = a %}{{ b == 'x' }}",
    "a list": "{% set a = [messages[0].content] %}{{ a[0] }}",
    "a namespace": LOOP % "{% set ns = namespace(a=m.content) %}{{ ns.a | lower }}",
    "a macro": "{% macro f(x) %}{{ x | upper }}{% endmacro %}" + LOOP % "{{ f(m.content) }}",
    "a block": "{% filter upper %}" + LOOP % "{{ m.content }}" + "{% endfilter %}",
    "an assigned block": "{% set x %}" + LOOP % "{{ m.content }}" + "{% endset %}{{ x | length }}",
    "the whole message": "{{ messages | tojson }}",
    "items": LOOP % "{% for k, v in m.items() %}{{ v }}{% endfor %}",
    "a computed key": LOOP % "{% if m['con' + 'tent'] %}x{% endif %}",
    "a neighbour": LOOP % "{% if loop.previtem.content == 'x' %}{% endif %}",
    "selection": "{% for m in messages | selectattr('content', 'eq', 'x') %}{{ m.role }}{% endfor %}",
    "a loop's condition": "{% for m in messages if m.content == 'x' %}{{ m.role }}{% endfor %}",
}


@pytest.mark.parametrize("name", PRINTS)
def test_printing_is_opaque(name):
    assert ChatTemplate(PRINTS[name], {}).is_opaque


@pytest.mark.parametrize("name", LOOKS)
def test_looking_is_noticed(name):
    assert not ChatTemplate(LOOKS[name], {}).is_opaque


def test_the_usual_templates_are_opaque():
    opaque = {name for name, text in TEMPLATES.items() if ChatTemplate(text, {}).is_opaque}
    assert opaque == set(TEMPLATES) - {"thinking"}
