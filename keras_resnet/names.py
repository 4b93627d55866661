"""Names in error messages: suggestions for unknown ones, and escapes."""

import difflib
from collections.abc import Iterable


def hint(name: str, known: Iterable[str], count: int = 1) -> str:
    """Returns the known names that are near an unknown one, for a message.

    Args:
        name: The unknown name.
        known: The known names.
        count: Largest number of suggestions. A single one is quoted.

    >>> hint("orginal", ["original", "pre_activation"])
    " (did you mean 'original'?)"
    >>> hint("resnet21", ["resnet20", "resnet20v2", "nin"], 3)
    ' (did you mean resnet20 or resnet20v2?)'
    >>> hint("something else", ["original", "pre_activation"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), count)
    if not near:
        return ""
    meant = repr(near[0]) if count == 1 else " or ".join(near)
    return f" (did you mean {meant}?)"


def escaped(text: str) -> str:
    r"""Returns the text with its control characters written as escapes.

    Text of a file or a server may contain any character, also half of one.

    >>> escaped("caf\u00e9\x1b[2J\n\udce9") == "caf\u00e9" + r"\x1b[2J\n\udce9"
    True
    """
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def unknown(
    what: str,
    name: str,
    known: Iterable[str],
    allowed: str | None = None,
    count: int = 1,
) -> str:
    """Returns the message about an unknown name.

    Args:
        what: The kind of thing, such as "recipe".
        name: The unknown name.
        known: The known names.
        allowed: The allowed values, if they are not only the known names.
        count: Largest number of suggestions.

    >>> unknown("recipe", "digit", ["digits", "nin"])
    "unknown recipe 'digit' (did you mean 'digits'?): allowed are digits, nin"
    """
    known = list(known)
    return (
        f"unknown {what} {name!r}{hint(name, known, count)}: allowed are "
        f"{allowed or ', '.join(known)}"
    )
