"""Which of many alike cases run by default: the others are slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Returns the cases, all but the `kept` ones marked slow; a case is one value or a tuple."""
    cases = list(cases)
    assert set(kept) <= set(cases), f"{set(kept) - set(cases)} are no cases"
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks: Collection[Any] = () if case in kept else (pytest.mark.slow,)
        found.append(pytest.param(*values, marks=marks))
    return found
