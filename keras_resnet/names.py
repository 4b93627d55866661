"""Names that are not in a table, and those that were probably meant."""

import difflib
from collections.abc import Iterable


def hint(name: str, known: Iterable[str], count: int = 1) -> str:
    """The names of a table that are near another one, as part of a message.

    Args:
        name: What is not in the table.
        known: The names that are.
        count: How many to give at most. One stands in quotes, several do not.

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


def unknown(
    what: str,
    name: str,
    known: Iterable[str],
    allowed: str | None = None,
    count: int = 1,
) -> str:
    """The message about a name that is not in a table.

    Args:
        what: What the table has.
        name: What is not in it.
        known: The names that are.
        allowed: What may be given, where that is not the names alone.
        count: As in `hint`.

    >>> unknown("recipe", "digit", ["digits", "nin"])
    "unknown recipe 'digit' (did you mean 'digits'?): allowed are digits, nin"
    """
    known = list(known)
    return (
        f"unknown {what} {name!r}{hint(name, known, count)}: allowed are "
        f"{allowed or ', '.join(known)}"
    )
