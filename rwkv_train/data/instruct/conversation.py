"""What a conversation is, and which of its messages are learned."""

from typing import Literal, NamedTuple

from rwkv_train.config.instruct import LearnConfig, Role
from rwkv_train.errors import DataError


class Message(NamedTuple):
    """One turn."""

    role: Role
    content: str
    learn: bool | None = None
    """What the record itself says of it; ``None``: nothing, so the settings decide."""


class Conversation(NamedTuple):
    """What one record holds."""

    where: str
    """File and line, or dataset and row."""
    messages: tuple[Message, ...]
    """At least one; a plain text has none."""
    text: str | None = None
    """A plain text, which is learned whole and goes through no template."""


def learned_messages(
    conversation: Conversation, learn: Literal["assistant", "all"] | LearnConfig
) -> list[bool]:
    """Say of each message whether it is learned.

    What a record says of a message itself goes before the rule.

    Raises:
        DataError: none is, or they are empty, so there is nothing to learn from; or one of them is an empty answer.
    """
    messages = conversation.messages
    if learn == "all":
        ruled = [True] * len(messages)
    else:
        rule = LearnConfig() if learn == "assistant" else learn
        ruled = [message.role in rule.roles for message in messages]
        places = [place for place, is_learned in enumerate(ruled) if is_learned]
        if places and rule.turns != "all":
            only = places[0 if rule.turns == "first" else -1]
            ruled = [place == only for place in range(len(messages))]
    learned = [
        by_rule if message.learn is None else message.learn
        for message, by_rule in zip(messages, ruled, strict=True)
    ]
    if not any(learned):
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        marked = " and its own marks take them out" if any(ruled) else ""
        raise DataError(
            f"there is nothing to learn: it has messages of the role {roles}{marked}; correct the record, set "
            "data.learn, or leave it out with data.bad_records: drop"
        )
    if not any(
        message.content.strip() for message, is_learned in zip(messages, learned, strict=True) if is_learned
    ):
        raise DataError(
            "there is nothing to learn: what is to be learned is empty; correct the record, or leave it out with "
            "data.bad_records: drop"
        )
    for number, (message, is_learned) in enumerate(zip(messages, learned, strict=True), start=1):
        if is_learned and message.role == "assistant" and not message.content.strip():
            raise DataError(
                f"message {number} is an empty answer, which would be learned; correct the record, mark the message "
                "with learn: false, or leave the record out with data.bad_records: drop"
            )
    return learned
