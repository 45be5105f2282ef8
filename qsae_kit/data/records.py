"""One record of somebody's data, in whichever form it comes -> a chat or a text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from qsae_kit.io.jsonfiles import parse_json
from qsae_kit.lm.hooked import Message

Document: TypeAlias = str | list[Message]

SHOWN = 200
"""Characters of a record in a message."""
CHATS = ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns", "data")
"""Fields that hold the turns of a chat."""
QUESTIONS = ("question", "prompt", "instruction", "query", "problem")
ADDITIONS = ("input", "context")
"""What an instruction is about: it follows the instruction, after an empty line."""
ANSWERS = ("answer", "response", "completion", "output", "chosen", "solution")
SYSTEMS = ("system", "system_prompt")
SPEAKERS = ("role", "from", "speaker")
SAID = ("content", "value", "text")
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What data sets call a speaker -> the role of a chat template."""
TEXT_PARTS = ("text", "input_text", "output_text")
AS_JSON = re.compile(r"\s*\[\s*\{")
"""How turns begin that are a table's cell."""
HALF = re.compile("[\ud800-\udfff]")
FORMS = "messages (a list), text, or question and answer"


def parse_record(record: Any, where: str, column: str = "") -> Document | None:
    """One record -> the turns of a chat, or a text; None where it is empty.

    A text; the turns of a chat, by themselves or in a field of `CHATS`, as `role` and `content`,
    as ShareGPT's `from` and `value`, or as texts of user and assistant in turn; a question of
    `QUESTIONS`, with or without an answer of `ANSWERS` (texts, or turns both); `text`. column: the
    field that holds a text or turns, whatever its name. Raises ValueError, beginning with `where`,
    for what is none of these.
    """
    if column:
        record = _cell(record, where, column)
    document = _parsed(record, where, column)
    texts = [document] if isinstance(document, str) else [m["content"] for m in document or ()]
    if any(HALF.search(text) for text in texts):
        raise ValueError(
            f"{where} holds half a character (a lone surrogate, \\ud800 to \\udfff), which no"
            " tokenizer reads; mend it."
        )
    return document


def _parsed(record: Any, where: str, column: str) -> Document | None:
    if isinstance(record, str):
        return record if record.strip() else None
    if isinstance(record, list):
        return _turns(record, where)
    if record is None and column:
        return None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{where}: expected an object with messages or text, found {kind}.")
    chat = next((record[name] for name in CHATS if _is_chat(record.get(name))), None)
    if chat is not None:
        return _with_system(_turns(_unpacked(chat, where), where, spoken=True), record)
    question = next((name for name in QUESTIONS if _is_said(record.get(name))), None)
    if question is not None:
        return _asked(record, question, where)
    if isinstance(record.get("text"), str):
        return record["text"] if record["text"].strip() else None
    given = [name for name in ("text", *CHATS, *QUESTIONS) if name in record]
    said = [name for name in (*ADDITIONS, *ANSWERS) if _is_said(record.get(name))]
    if given and not said and all(record[name] in (None, "", []) for name in given):
        return None
    if given and said:
        raise ValueError(
            f"{where}: {said[0]} is given, but {given[0]} is empty; leave the row out."
        )
    found = _fields(record) or "nothing"
    raise ValueError(
        f"{where}: expected {FORMS}; found {found}; rename a field, or name the one that holds the"
        " texts or chats: DATA,column=NAME."
    )


def _cell(record: Any, where: str, column: str) -> Any:
    if not isinstance(record, dict) or column not in record:
        found = _fields(record) if isinstance(record, dict) else "no fields"
        raise ValueError(f"{where} has no field {column!r}; it has {found}.")
    value = record[column]
    return _unpacked(value, where) if isinstance(value, str) and AS_JSON.match(value) else value


def _fields(record: Mapping[Any, Any]) -> str:
    """The names of a record's fields."""
    return _line(", ".join(map(str, record)))


def _line(value: Any) -> str:
    """A value in a message: in one line, cut where it is long."""
    return " ".join(str(value).split())[:SHOWN]


def _is_chat(value: Any) -> bool:
    """Whether a field holds turns, or a table's cell with turns as JSON."""
    return (isinstance(value, list) and bool(value)) or (
        isinstance(value, str) and AS_JSON.match(value) is not None
    )


def _unpacked(value: Any, where: str) -> Any:
    return parse_json(value, where) if isinstance(value, str) else value


def _is_said(value: Any) -> bool:
    return isinstance(value, list) if not isinstance(value, str) else bool(value.strip())


def _asked(record: Mapping[str, Any], name: str, where: str) -> Document:
    """A question and, where there is one, its answer."""
    answer = next((record[own] for own in ANSWERS if _is_said(record.get(own))), None)
    question = record[name]
    if isinstance(question, list):
        turns = _turns(question, where)
        more = _turns(answer, where) if isinstance(answer, list) else []
        if isinstance(answer, str):
            more = [{"role": "assistant", "content": answer}]
        repeated = more[: len(turns)] == turns  # a chosen answer may hold the whole chat
        return more if repeated else turns + more
    if isinstance(answer, list):
        turns = _turns(answer, where)
        whole = any(turn["role"] == "user" for turn in turns)
        asked: list[Message] = [] if whole else [{"role": "user", "content": question}]
        return _with_system(asked + turns, record)
    about = next((record[own] for own in ADDITIONS if _is_said(record.get(own))), None)
    text = question if not isinstance(about, str) else f"{question}\n\n{about}"
    chat: list[Message] = [{"role": "user", "content": text}]
    if answer is not None:
        chat.append({"role": "assistant", "content": answer})
    return _with_system(chat, record)


def _with_system(chat: list[Message], record: Mapping[str, Any]) -> list[Message]:
    """A chat with the system prompt that stands beside it, where it has none of its own."""
    told = [record[name] for name in SYSTEMS if isinstance(record.get(name), str)]
    if not told or not told[0].strip() or not chat or chat[0]["role"] == "system":
        return chat
    return [{"role": "system", "content": told[0]}, *chat]


def _turns(turns: Any, where: str, spoken: bool = False) -> list[Message]:
    """The messages of a list. spoken: whether texts are user and assistant in turn."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: expected {FORMS}; found {_line(turns) or 'nothing'}.")
    if spoken and all(isinstance(turn, str) for turn in turns):
        speakers = ("user", "assistant")
        return [{"role": speakers[n % 2], "content": text} for n, text in enumerate(turns)]
    return [_message(turn, f"{where}: message {n}") for n, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    speaker = _first(turn, SPEAKERS) if isinstance(turn, dict) else None
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        allowed = ", ".join(dict.fromkeys(ROLES.values()))
        raise ValueError(f"{where} needs a role ({allowed}) and a content that is text.")
    calls = turn.get("tool_calls") or None
    content = _content(_first(turn, SAID), where, bool(calls))
    message: Message = {"role": role, "content": content}
    if isinstance(calls, list):
        message["tool_calls"] = [_call(call, where) for call in calls]
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        message["reasoning_content"] = reasoning
    return message


def _first(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _content(content: Any, where: str, calls: bool) -> str:
    """A message's text: as it is, or in parts; a message that calls a tool may have none."""
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if isinstance(content, list) and content:
        return "".join(_parts(content, where))
    raise ValueError(
        f"{where} needs a content that is text, found {type(content).__name__}; leave it out or"
        " write its text."
    )


def _parts(parts: Sequence[Any], where: str) -> Iterator[str]:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise ValueError(
                f"{where} holds a part of the type {str(kind)[:SHOWN]!r}; a language model reads"
                " text alone: leave the chat out."
            )
        yield text


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool as chat templates read it: `function` with `name` and `arguments`."""
    told = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        raise ValueError(f"{where} calls a tool without a name; give function.name and arguments.")
    function = {"name": told["name"], "arguments": told.get("arguments", {})}
    return {"type": "function", "function": function}
