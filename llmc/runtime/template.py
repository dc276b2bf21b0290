"""Chat templates: messages to prompt text, by the template that came with the model.

A template is code from an untrusted source, so it runs in jinja2's immutable sandbox and sees plain data only (dictionaries,
lists, strings, numbers). The environment is the one that models' templates are written for (transformers'): ``trim_blocks``,
``lstrip_blocks``, loop controls, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now`` and the
``{% generation %}`` tag, which marks the assistant's words for training and prints them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from llmc.errors import ArtifactError, RequestError

Message = Mapping[str, Any]


class _GenerationTag(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain(value: Any, where: str) -> Any:
    """A copy of ``value`` made of plain types only, so that no method of a caller's object can be reached."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}: a chat template takes text, numbers, lists and dictionaries only")


def check_messages(messages: Sequence[Message]) -> None:
    """Raise RequestError, naming the message, unless ``messages`` is a list of ``{"role": ..., "content": ...}``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError('messages must be a list such as [{"role": "user", "content": "Hello"}], with at least one message')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f'messages[{i}] is a {type(message).__name__}: it must be a dictionary with "role" and "content"')
        if not isinstance(message.get("role"), str):
            raise RequestError(f'messages[{i}] has no "role": it must be a string such as "user"')
        if not isinstance(message.get("content"), str | list | None):
            raise RequestError(f'messages[{i}]["content"] is a {type(message["content"]).__name__}: it must be a string')
        if message.get("content") is None and not message.get("tool_calls"):
            raise RequestError(f'messages[{i}] has no "content": it must be a string')


class ChatTemplate:
    """A compiled chat template. Raises ArtifactError if ``source`` is not valid jinja2."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(f"the model's chat template is damaged (line {error.lineno}: {error.message})") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text. ``variables`` reach the template by name (``enable_thinking=False``).

        Raises RequestError if the messages are malformed or the template refuses them.
        """
        check_messages(messages)
        try:
            return self._template.render(
                messages=_plain(list(messages), "messages"),
                tools=None if tools is None else _plain(list(tools), "tools"),
                documents=None if documents is None else _plain(list(documents), "documents"),
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
                **_plain(variables, "the template's variables"),
            )
        except jinja2.sandbox.SecurityError as error:
            raise RequestError(f"the model's chat template tried something that the sandbox forbids: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, AttributeError, IndexError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
