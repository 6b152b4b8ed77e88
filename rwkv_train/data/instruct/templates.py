"""How a conversation becomes text: a Jinja template, as Hugging Face's chat templates are, cut at its messages.

The template is rendered for each beginning of the conversation: its first message, its first two, and so on, and once
more before each assistant message with ``add_generation_prompt``. Each of these texts must be the beginning of the
next one. So the text of a message is known exactly, and what is learned of an answer is what follows the prompt that
inference gives for it. A template for which that does not hold is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkv_train.data.instruct.conversation import Message
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import encode_utf8

G1 = "g1"
"""Name of the template of RWKV's chat models."""

G1_SOURCE = """\
{%- for message in messages -%}
{%- if message.role == "tool" -%}
{{- raise_exception("it has no form for the role 'tool'; map it to user with roles: {tool: user}") -}}
{%- endif -%}
{{- message.role.capitalize() + ":" -}}
{%- set content = (message.content.replace("\\r\\n", "\\n").split("\\n") | select | join("\\n")).strip() -%}
{{- " " + content + "\\n\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "Assistant:" -}}
{%- endif -%}
"""
"""User: ..., blank line, Assistant: ..., blank line; System: ... before them where there is one.

A blank line ends a turn, so there is none within one: line ends in a row become one, as the models were trained.

Source:
    BlinkDL/RWKV-LM, ``RWKV-v7/RWKV7-G1x-templates.txt``.
"""


class Piece(NamedTuple):
    """A part of a conversation's text."""

    text: str
    message: int
    """Number of the message that it belongs to, from 0."""
    is_answer: bool
    """Whether the model writes it, given what comes before: an assistant message without its heading."""


class ChatTemplate:
    """A template that was checked as far as it can be without a conversation.

    Args:
        name: ``"g1"``, or the path of a Jinja file, which sees ``messages`` (each with ``role`` and ``content``),
            ``add_generation_prompt``, ``raise_exception(text)``, a filter ``tojson`` that escapes nothing for HTML, and
            empty strings as ``bos_token`` and ``eos_token`` (tokens that have no text are put at the ends of a
            conversation, not in the template). It may ask whether a name is defined, but not write one that is not.

    Raises:
        DataError: the file cannot be read, or is no template.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._writes_each_alone = name == G1
        source = G1_SOURCE if name == G1 else _read(name)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            undefined=_NeverWritten,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.globals.update(raise_exception=_raise, bos_token="", eos_token="")
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            hint = (
                ": remove the generation tags, what is learned is found without them"
                if "generation" in str(error.message)
                else ""
            )
            raise DataError(f"the template {name}, line {error.lineno}: {error.message}{hint}") from error
        except (SyntaxError, RecursionError) as error:  # of the Python code that it becomes
            raise DataError(f"the template {name} is nested too deeply: {error}; write it flatter") from error

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the text of a conversation, cut at its messages and before each answer.

        Raises:
            DataError: the template fails, or its text for a beginning of the conversation is not the beginning of its
                text for more of it.
        """
        pieces: list[Piece] = []
        before = ""
        for number, message in enumerate(messages):
            earlier = messages[:number]
            if self._writes_each_alone:  # what stands before a message need not be written again
                earlier, before = (), ""
            text = self._render([*earlier, message])
            if message.role == "assistant":
                prompt = self._render(earlier, add_generation_prompt=True)
                pieces.append(self._piece(before, prompt, number, is_answer=False))
                before = prompt
            pieces.append(self._piece(before, text, number, is_answer=message.role == "assistant"))
            before = text
        return [piece for piece in pieces if piece.text]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model answers.

        Raises:
            DataError: the template fails.
        """
        return self._render(messages, add_generation_prompt=True)

    def turn_end(self) -> str:
        """Return what the template writes after an answer; it may be nothing.

        Raises:
            DataError: the template fails, or it does not write an answer as it stands.
        """
        content = "answer"
        question = Message("user", "question")
        _, found, end = self._render([question, Message("assistant", content)]).rpartition(content)
        if not found:
            raise DataError(
                f"the template {self.name} does not write the answer {content!r} as it stands; correct it"
            )
        return end

    def _piece(self, before: str, text: str, number: int, *, is_answer: bool) -> Piece:
        if not text.startswith(before):
            at = next((at for at, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
            part = "the prompt for an answer" if is_answer else "the messages before"
            raise DataError(
                f"the template {self.name} does not write message {number + 1} after {part}: {before[at : at + 20]!r} "
                f"becomes {text[at : at + 20]!r} at character {at}; what is learned would not be what inference sees. "
                "Write each message alone, and its heading also with add_generation_prompt"
            )
        return Piece(text[len(before) :], number, is_answer)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        seen = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=seen, add_generation_prompt=add_generation_prompt)
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
        ) as error:
            raise DataError(f"the template {self.name} fails: {error}") from error
        encode_utf8(text)
        return text


class _NeverWritten(Undefined):
    """What has no value: it can be asked for as in Hugging Face's templates, but a misspelt name writes no text."""

    __str__ = Undefined._fail_with_undefined_error


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Write JSON as Hugging Face's templates expect it; Jinja's own filter escapes <, >, & and quotes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the template {name} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # the home of nobody; a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"cannot read the template {name}: {reason}; wanted {G1!r} or the path of a Jinja file"
        ) from error
