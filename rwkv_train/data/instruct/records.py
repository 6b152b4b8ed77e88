"""From a record of one of the chat formats to a conversation."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

from rwkv_train.config.instruct import DEFAULT_FIELDS, DEFAULT_ROLES, InstructDataset, RecordFormat, Role
from rwkv_train.data.instruct.conversation import Conversation, Message
from rwkv_train.data.sources.base import Record
from rwkv_train.data.sources.values import show_names, text_of
from rwkv_train.errors import DataError

_SAID_BESIDE = ("tool_calls", "function_call", "reasoning_content")
"""Fields of a message in which other programs keep a part of what the assistant says."""

_OTHER_MARKS = ("weight", "loss", "train", "training")
"""What other programs call the mark of a message, where it is false or 0."""

_MAY_BE_MISSING = ("input", "system", "learn")
"""Parts that a record need not have."""


def to_conversation(record: Record, dataset: InstructDataset) -> Conversation:
    """Return what a record holds.

    Args:
        record: as its source gives it.
        dataset: its format (any but "preference") and the names of its fields and roles.

    Raises:
        DataError: a field is missing or of another type, a role is not known, or there are no messages. The message
            does not name the record's place.
    """
    names = {**DEFAULT_FIELDS[dataset.format], **dataset.fields}
    fields = Fields(record.fields, names)
    return _FORMATS[dataset.format](record.where, fields, {**DEFAULT_ROLES, **dataset.roles})


def named_parts(dataset: InstructDataset) -> set[str]:
    """Return the parts that a record may lack and that ``fields`` names: one record at least is to have each."""
    return dataset.fields.keys() & set(_MAY_BE_MISSING)


def parts_in(record: Record, dataset: InstructDataset, parts: set[str]) -> set[str]:
    """Return those of ``parts``, all of :func:`named_parts`, whose fields a record has."""
    names = {**DEFAULT_FIELDS[dataset.format], **dataset.fields}
    found = {part for part in parts - {"learn"} if names[part] in record.fields}
    turns = record.fields.get(names["messages"]) if "learn" in parts else None
    if isinstance(turns, list) and any(isinstance(turn, dict) and names["learn"] in turn for turn in turns):
        found.add("learn")
    return found


class Fields(NamedTuple):
    """An object of a record, asked by the parts of its format."""

    values: Mapping[str, object]
    names: Mapping[str, str]

    def get(self, part: str) -> object:
        """Return a value that must be there."""
        name = self.names[part]
        if name not in self.values:
            raise DataError(
                f"there is no field {name!r}, only {show_names(list(self.values)) or 'none'}; name the one that holds "
                f"it with fields: {{{part}: NAME}}"
            )
        return self.values[name]

    def text(self, part: str) -> str:
        """Return a text that must be there."""
        return text_of(self.get(part), self.names[part])

    def text_if_any(self, part: str) -> str:
        """Return a text that may be missing, null or empty."""
        value = self.values.get(self.names[part])
        return "" if value is None else text_of(value, self.names[part])


def messages_of(
    record: Fields, part: str, roles: Mapping[str, Role], *, wanted: str = "a list of messages"
) -> list[Message]:
    """Return the messages that a field lists, with marks where the format has them.

    Raises:
        DataError: it is no list or an empty one; or one of them is no object, lacks a part, has a part of another type
            or an unknown role.
    """
    turns, name = record.get(part), record.names[part]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else "null" if turns is None else type(turns).__name__
        raise DataError(f"{name!r} must be {wanted}, found {found}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn, record.names, roles))
        except DataError as error:
            raise DataError(f"message {number} of {name!r}: {error}") from error
    return messages


def _turns(where: str, record: Fields, roles: Mapping[str, Role]) -> Conversation:
    messages = system_of(record) if "system" in record.names else []
    return Conversation(where, (*messages, *messages_of(record, "messages", roles)))


def _message(turn: object, names: Mapping[str, str], roles: Mapping[str, Role]) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"wanted an object with {names['role']!r} and {names['content']!r}, found {type(turn).__name__}"
        )
    fields = Fields(turn, names)
    role = fields.text("role")
    if role not in roles:
        raise DataError(
            f"the role {role!r} is not known; there are {', '.join(roles)}: say which of {', '.join(get_args(Role))} "
            f"it is with roles: {{{role!r}: ROLE}}"
        )
    for beside in _SAID_BESIDE:
        if turn.get(beside) and beside not in names.values():
            raise DataError(
                f"it has {beside!r}, which the model would not see; write it into {names['content']!r}, or leave the "
                "record out with data.bad_records: drop"
            )
    mark = None
    if "learn" in names:
        mark = _own_mark(turn.get(names["learn"]), names["learn"])
        for other in _OTHER_MARKS:
            if other not in names.values() and isinstance(turn.get(other), int | float) and not turn[other]:
                raise DataError(
                    f"it has {other!r}: {turn[other]!r}, which says that it is not to be learned; name the mark with "
                    f"fields: {{learn: {other}}}, or remove it"
                )
    return Message(roles[role], _content(fields), mark)


def _content(message: Fields) -> str:
    value, name = message.get("content"), message.names["content"]
    if isinstance(value, list):
        raise DataError(f"{name!r} is a list of parts; write it as one text")
    if value is None:
        raise DataError(
            f"{name!r} is null; write a text, or leave the record out with data.bad_records: drop"
        )
    return text_of(value, name)


def _own_mark(value: object, name: str) -> bool | None:
    """Read a mark; OpenAI's "weight" is 0 or 1."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise DataError(f"{name!r} must be true or false (or 1 or 0), found {value!r}")


def _alpaca(where: str, record: Fields, roles: Mapping[str, Role]) -> Conversation:
    question, more = record.text("instruction"), record.text_if_any("input")
    asked = Message("user", f"{question}\n{more}" if more else question)
    return Conversation(where, (*system_of(record), asked, Message("assistant", record.text("output"))))


def _prompt_completion(where: str, record: Fields, roles: Mapping[str, Role]) -> Conversation:
    asked = Message("user", record.text("prompt"))
    return Conversation(where, (*system_of(record), asked, Message("assistant", record.text("completion"))))


def _text(where: str, record: Fields, roles: Mapping[str, Role]) -> Conversation:
    text = record.text("text")
    if not text:
        raise DataError(f"{record.names['text']!r} is empty: there is nothing to learn")
    return Conversation(where, (), text)


def system_of(record: Fields) -> list[Message]:
    """Return the message of a field that may be missing, null or empty."""
    system = record.text_if_any("system")
    return [Message("system", system)] if system else []


_FORMATS: dict[RecordFormat, Callable[[str, Fields, Mapping[str, Role]], Conversation]] = {
    "messages": _turns,
    "sharegpt": _turns,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
