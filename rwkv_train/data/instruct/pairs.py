"""Pairs of answers to one prompt, of which one is preferred: from a record to tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rwkv_train.config.instruct import DEFAULT_FIELDS, DEFAULT_ROLES, InstructDataset, Role
from rwkv_train.data.instruct.conversation import Conversation, Message
from rwkv_train.data.instruct.records import Fields, messages_of, system_of
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.sources.base import Record
from rwkv_train.data.sources.values import text_of
from rwkv_train.errors import DataError


class PreferencePair(NamedTuple):
    """Two conversations that begin with the same tokens, the prompt; only the answers are learned."""

    where: str
    """File and line, or dataset and row."""
    chosen: TokenizedConversation
    rejected: TokenizedConversation

    @property
    def n_inputs(self) -> int:
        """Positions that the model reads of both."""
        return self.chosen.n_inputs + self.rejected.n_inputs

    @property
    def n_learned(self) -> int:
        """Tokens of both answers."""
        return self.chosen.n_learned + self.rejected.n_learned


def to_two_conversations(record: Record, dataset: InstructDataset) -> tuple[Conversation, Conversation]:
    """Return the conversation with the chosen answer and that with the rejected one.

    The prompt is a text, which the user says, or a list of messages. An answer is a text or a list of messages: what
    follows the prompt, or the prompt's messages and what follows them. Of the messages after the prompt those of the
    assistant are marked as learned.

    Args:
        record: as its source gives it.
        dataset: of the format ``"preference"``, with the names of its fields and roles.

    Raises:
        DataError: a field is missing or of another type, a role is not known, the prompt asks nothing, or an answer is
            none. The message does not name the record's place.
    """
    names = {**DEFAULT_FIELDS[dataset.format], **dataset.fields}
    roles = {**DEFAULT_ROLES, **dataset.roles}
    fields = Fields(record.fields, names)
    asked = _messages(fields, "prompt", "user", roles)
    prompt = [*system_of(fields), *asked]
    if not any(message.role == "user" and message.content.strip() for message in prompt):
        raise DataError(
            f"{names['prompt']!r} has no message of the user, or an empty one; correct the record"
        )
    if prompt[-1].role == "assistant":
        raise DataError(
            f"{names['prompt']!r} ends with a message of the assistant; it must end with what is answered"
        )
    read = tuple(message._replace(learn=False) for message in prompt)
    chosen, rejected = (
        (*read, *_answer(fields, part, [prompt, asked], roles)) for part in ("chosen", "rejected")
    )
    return Conversation(record.where, chosen), Conversation(record.where, rejected)


def check_pair(pair: PreferencePair) -> None:
    """Refuse two answers that are one, or that answer different prompts.

    Raises:
        DataError: the tokens of both are the same, or those before the answers are not. The message does not name the
            pair's place.
    """
    if np.array_equal(pair.chosen.tokens, pair.rejected.tokens):
        raise DataError("the chosen answer and the rejected one are the same, so there is nothing to prefer")
    chosen, rejected = (side.tokens[: side.is_learned.argmax()] for side in (pair.chosen, pair.rejected))
    if not np.array_equal(chosen, rejected):
        raise DataError(
            "the template does not write the same prompt before both answers: one of them begins with a message for "
            "which it writes nothing"
        )


def _answer(
    fields: Fields, part: str, prompts: Sequence[list[Message]], roles: Mapping[str, Role]
) -> list[Message]:
    """Return the messages after the prompt, which may stand before them (with the field's system message or not)."""
    name = fields.names[part]
    messages = _messages(fields, part, "assistant", roles)
    for prompt in prompts:
        if messages[: len(prompt)] == prompt:
            messages = messages[len(prompt) :]
            break
    if not messages:
        raise DataError(f"{name!r} has no answer after the prompt")
    if messages[0].role != "assistant":
        raise DataError(
            f"{name!r} begins with a message of the role {messages[0].role}, and not as "
            f"{fields.names['prompt']!r} does; it must begin with the prompt's messages or with the answer"
        )
    if messages[-1].role != "assistant":
        raise DataError(
            f"{name!r} ends with a message of the role {messages[-1].role}; it must end with an answer"
        )
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise DataError(f"{name!r} is an empty answer; correct the record")
    return [message._replace(learn=message.role == "assistant") for message in messages]


def _messages(fields: Fields, part: str, role: Role, roles: Mapping[str, Role]) -> list[Message]:
    """Return the messages of a field; a text is one of ``role``."""
    value = fields.get(part)
    if isinstance(value, str | bytes):
        return [Message(role, text_of(value, fields.names[part]))]
    return messages_of(fields, part, roles, wanted="a text or a list of messages")
