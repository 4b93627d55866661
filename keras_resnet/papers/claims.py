"""Claims of the papers' tables, and what our runs show about them.

A claim is a sentence and the comparisons of two rows that it makes. Our runs
are compared at the same number of steps and in the same dtype.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping
from collections.abc import Sequence

from keras_resnet.papers import experiments


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a table of the papers shows.

    Attributes:
        text: The claim in a sentence.
        pairs: Names of two rows: the one with the lower error, then the other.
    """

    text: str
    pairs: tuple[tuple[str, str], ...]


def _in_order(*names: str) -> tuple[tuple[str, str], ...]:
    """Returns all pairs of rows, which are given by rising error."""
    return tuple(itertools.combinations(names, 2))


def _lowest(name: str, table: str) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of a row and each other row of a table."""
    return tuple(
        (name, row.name)
        for row in experiments.EXPERIMENTS.values()
        if table in row.printed and row.name != name
    )


_OPTIONS = (
    "Options A, B and C differ slightly: C has the lowest error, then B [1, "
    "Sec. 4.1]."
)
_IDENTITY = (
    "The identity shortcut has the lowest error of all shortcuts [2, Sec. 3.1]."
)
_UNITS = "Full pre-activation has the lowest error of all orders [2, Table 2]."
_PLAIN = (
    "The deeper plain network has the higher error, the deeper residual "
    "network the lower one [1, Sec. 4.{}]."
)

#: The claim of each table, a key of `experiments.TABLES`.
CLAIMS: dict[str, Claim] = {
    "[1, Fig. 6]": Claim(
        _PLAIN.format(2),
        (
            ("plainnet20", "plainnet56"),
            ("resnet56", "resnet20"),
            ("resnet20", "plainnet20"),
            ("resnet56", "plainnet56"),
        ),
    ),
    "[1, Table 6]": Claim(
        "The error falls with the depth up to 110 layers, and is higher at "
        "1202 layers [1, Sec. 4.2].",
        (
            *_in_order(
                *("resnet110", "resnet56", "resnet44", "resnet32", "resnet20")
            ),
            ("resnet110", "resnet1202"),
        ),
    ),
    "[2, Table 1]": Claim(_IDENTITY, _lowest("resnet110", "[2, Table 1]")),
    "[2, Table 2]": Claim(
        _UNITS,
        tuple(
            (f"resnet{depth}v2", name)
            for depth in (110, 164)
            for name in (
                f"resnet{depth}",
                *(f"resnet{depth}_{unit}" for unit in experiments.UNITS),
            )
        ),
    ),
    "[2, Table 3]": Claim(
        "Pre-activation units have the lower error at each depth [2, Table 3].",
        tuple(
            (f"{name}v2{suffix}", f"{name}{suffix}")
            for suffix, names in (
                ("", ("resnet110", "resnet164", "resnet1001")),
                ("_cifar100", ("resnet164", "resnet1001")),
            )
            for name in names
        ),
    ),
    "[1, Table 3] at 20 layers": Claim(
        _OPTIONS,
        _in_order("resnet20_option_c", "resnet20_option_b", "resnet20"),
    ),
    "[2, Table 1] at 20 layers": Claim(
        _IDENTITY, _lowest("resnet20", "[2, Table 1] at 20 layers")
    ),
    "[2, Table 2] at 56 layers": Claim(
        _UNITS, _lowest("resnet56v2", "[2, Table 2] at 56 layers")
    ),
    "[1, Table 2]": Claim(
        _PLAIN.format(1),
        (
            ("plainnet18", "plainnet34"),
            ("resnet34_option_a", "resnet18_option_a"),
            ("resnet34_option_a", "plainnet34"),
        ),
    ),
    "[1, Table 3]": Claim(
        "The error falls with the depth. " + _OPTIONS,
        (
            *_in_order("resnet34_option_c", "resnet34", "resnet34_option_a"),
            *_in_order("resnet152", "resnet101", "resnet50", "resnet34"),
        ),
    ),
    "[2, Table 5]": Claim(
        "ResNet-200 with pre-activation units has a lower error than with "
        "original units [2, Table 5]. Only the former is a row here.",
        (),
    ),
}


def finding(claim: Claim, errors: Mapping[str, Sequence[float]]) -> str:
    """Returns what runs show about a claim, in a sentence.

    Two rows can be told apart if their means differ by more than twice the
    standard error of the difference, `2 sqrt(s_1^2 / n_1 + s_2^2 / n_2)`. A row
    with one run has the deviation of the other row. With one run of each row,
    the deviation is unknown, and so is whether they can be told apart.

    Args:
        claim: The claim.
        errors: Errors of the runs of each row, of the same length and dtype.

    Returns:
        The sentence, or an empty text if no comparison was run.

    >>> claim = Claim("Deeper is better.", (("resnet56", "resnet20"),))
    >>> finding(claim, {"resnet20": [9.0, 9.2], "resnet56": [7.0, 7.3]})
    '1 of 1 comparisons agrees with the claim.'
    """
    found: dict[str, list[str]] = {}
    for lower, higher in claim.pairs:
        if lower in errors and higher in errors:
            outcome = _outcome(errors[lower], errors[higher])
            found.setdefault(outcome, []).append(f"{lower} < {higher}")
    if not found:
        return ""
    count = sum(map(len, found.values()))
    agree = len(found.pop(_AGREES, ()))
    verb = "agrees" if agree == 1 else "agree"
    parts = [f"{agree} of {count} comparisons {verb} with the claim"]
    parts += [f"{outcome}: {', '.join(found[outcome])}" for outcome in found]
    return "; ".join(parts) + "."


_AGREES = "agrees"
_CONTRADICTS = "contradicted"
_EQUAL = "not told apart"
_ONE_RUN = "one run of each row, so not decided"


def _outcome(lower: Sequence[float], higher: Sequence[float]) -> str:
    many = [errors for errors in (lower, higher) if len(errors) > 1]
    if not many:
        return _ONE_RUN
    variances = [
        statistics.variance(errors if len(errors) > 1 else many[0])
        / len(errors)
        for errors in (lower, higher)
    ]
    difference = statistics.fmean(higher) - statistics.fmean(lower)
    if abs(difference) <= 2 * math.sqrt(sum(variances)):
        return _EQUAL
    return _AGREES if difference > 0 else _CONTRADICTS
