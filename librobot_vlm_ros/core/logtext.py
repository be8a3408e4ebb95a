"""Foreign text made safe for a log line, a terminal or an error message.

Encodings, prompts, topic and file names come from outside. Written to a log as they are they could
forge lines (newline), hide others (carriage return, escape sequences, right-to-left overrides) or
fill the disk.
"""

from __future__ import annotations


def _escape_character(character: str) -> str:
    """One character as itself when printable, else as a Python escape such as ``\\n``."""
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def escape_for_log(text: object, limit: int = 200) -> str:
    """`text` on one printable line of at most about `limit` characters.

    Everything that is not printable (control and format characters, lone surrogates, line
    separators) becomes a backslash escape, a backslash becomes two, and what is beyond `limit`
    source characters is replaced by its count. Only the kept part is looked at, so the cost does
    not depend on the length of `text`.
    """
    string, limit = _string(text), max(limit, 0)
    head = string[:limit]
    if not (head.isprintable() and "\\" not in head):
        head = "".join(map(_escape_character, head))
    return head + _left_out(string, limit)


def shortened(text: object, limit: int = 200) -> str:
    """`text` cut as `escape_for_log` cuts it: for messages of a `VlmError`, which escapes them."""
    string, limit = _string(text), max(limit, 0)
    return string[:limit] + _left_out(string, limit)


def _string(text: object) -> str:
    return text if isinstance(text, str) else repr(text)


def _left_out(string: str, limit: int) -> str:
    return f"...(+{len(string) - limit} characters)" if len(string) > limit else ""
