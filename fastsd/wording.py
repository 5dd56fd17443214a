"""What files and callers supply, made fit for a one-line message.

A checkpoint's author chooses its tensor names: they may be megabytes long, or hold newlines and terminal escapes.
"""

from collections.abc import Collection

LISTED = 10
"""How many names of a list an error shows."""


def shown(text: str, limit: int = 120) -> str:
    """`text` as it is if it is short and printable, else cut and escaped."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return cut if cut.isprintable() else ascii(cut)


def quoted(value: object, limit: int = 120) -> str:
    """`repr` of any value, cut and escaped likewise."""
    try:
        return shown(repr(value[: limit + 1] if isinstance(value, str | bytes) else value), limit)
    except ValueError:  # an integer of more digits than Python prints
        return f"a huge {type(value).__name__}"


def listed(names: Collection[str]) -> str:
    """The first ten of `names`, sorted, and how many more there are."""
    head = ", ".join(shown(name) for name in sorted(names)[:LISTED])
    return head if len(names) <= LISTED else f"{head} and {len(names) - LISTED} more"
