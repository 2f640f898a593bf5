"""Numbers, truth values and text as pandas, Polars, DuckDB, Spark, JSON and CSV files write them."""

import math
import re
from decimal import Decimal

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_BLANK = {"", "nan", "null", "none"}
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def is_missing(value: object) -> bool:
    """Return whether a value is null, or NaN, which pandas writes for null."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def is_unstated(value: object) -> bool:
    """Return whether a number or a truth value is missing; as text it may also be blank."""
    return is_missing(value) or (isinstance(value, str) and value.strip().lower() in _BLANK)


def number(value: object) -> float | None:
    """Return the value of 1, 1.0, "1", true or a decimal; infinity if it is too large, None if it is not a number."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _NUMBER.fullmatch(text) else None
    if not isinstance(value, int | float | Decimal):  # True and False are integers
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def truth(value: object) -> bool | None:
    """Return the value of true, 1, "1" or "True"; None if it is neither true nor false."""
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    found = number(value)
    return bool(found) if found in (0, 1) else None


def index(value: object, count: int) -> int | None:
    """Return the value as an index below `count`; None if it is not one."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < count and found == int(found) else None
