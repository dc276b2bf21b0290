"""Chat templates render as transformers renders them, and cannot reach out of their sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.errors import ArtifactError, RequestError
from llmc.runtime.template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "Yes.", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": "é<"}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "blocks": "{{ bos_token }}\n{% for m in messages %}\n  {% if loop.first %}\n<|{{ m.role }}|>\n  {% endif %}\n"
    "{{ m['content'] | trim }}\n{% endfor %}\n{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'a': 'é<>&'} | tojson }}",
    "controls": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{{ eos_token }}"
    "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ flag }}",
    "documents": "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}{{ tools is none }}{{ strftime_now('%Y')[:2] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_as_transformers_does(name: str, generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {
        "tools": None if name == "documents" else TOOLS,
        "documents": [{"title": "T", "text": "é"}],
        "add_generation_prompt": generation_prompt,
        "flag": True,
    }
    want = render_jinja_template(
        conversations=[MESSAGES], chat_template=TEMPLATES[name], bos_token="<s>", eos_token="</s>", **variables
    )
    assert ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>").render(MESSAGES, **variables) == want[0][0]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages | attr('__class__')) ~ (messages | attr('__class__')).__base__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': messages}) }}",
        "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(messages) }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% set _ = messages.clear() %}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
    ],
)
def test_escapes_are_refused(attack: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(attack).render(messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_objects_do_not_reach_the_template() -> None:
    class Loud(str):
        def shout(self) -> str:
            return "reached"

    text = ChatTemplate("{{ messages[0].content.shout is defined }}").render([{"role": "user", "content": Loud("x")}])
    assert text == "False"
    with pytest.raises(RequestError, match="messages holds a object"):
        ChatTemplate("x").render([{"role": "user", "content": [object()]}])


def test_a_templates_own_refusal_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        template.render([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match="refuses these messages"):
        ChatTemplate("{{ messages[0].content + 1 }}").render([{"role": "user", "content": "x"}])
    with pytest.raises(ArtifactError, match="line 2"):
        ChatTemplate("a\n{% if %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        (["hi"], r"messages\[0\] is a str"),
        ([{"content": "x"}], r'messages\[0\] has no "role"'),
        ([{"role": "user", "content": 3}], r'messages\[0\]\["content"\] is a int'),
        ([{"role": "user", "content": "x"}, {"role": "assistant"}], r'messages\[1\] has no "content"'),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate("x").render(messages)
