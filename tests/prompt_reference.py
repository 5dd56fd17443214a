"""The web UI's rules for prompts, done slowly and plainly: to judge fastsd's reading of them by."""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_WEIGHT = re.compile(r":\s*([+-]?([0-9]+\.?[0-9]*|\.[0-9]+))\s*\)")
_BREAK = re.compile(r"\bBREAK\b")


def letters(prompt: str) -> list[list[tuple[str, float]]]:
    """Each section's letters with their weights: every bracket that closes goes over all letters since it was opened."""
    sections: list[list[list]] = [[]]
    opened: dict[str, list[tuple[int, list]]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        section, bracket = opened[kind].pop()
        bracket[0] = ""  # it was no letter
        for index, within in enumerate(sections[section:]):
            since = next(i for i, letter in enumerate(within) if letter is bracket) if index == 0 else 0
            for letter in within[since:]:
                letter[1] *= factor

    position = 0
    while position < len(prompt):
        letter, length = prompt[position], 1
        weight = _WEIGHT.match(prompt, position)
        if letter == "\\" and prompt[position + 1 : position + 2] in ("\\", *"()[]"):
            sections[-1].append([prompt[position + 1], 1.0])
            length = 2
        elif weight and opened["("]:
            close("(", float(weight[1]))
            length = len(weight[0])
        elif letter == ")" and opened["("]:
            close("(", 1.1)
        elif letter == "]" and opened["["]:
            close("[", 1 / 1.1)
        elif _BREAK.match(prompt, position):
            sections.append([])
            length = 5
        else:
            sections[-1].append([letter, 1.0])
            if letter in opened:
                opened[letter].append((len(sections) - 1, sections[-1][-1]))
        position += length
    return [[(letter, weight) for letter, weight in section if letter] for section in sections]


def phrases(prompt: str) -> list[list[tuple[str, float]]]:
    """Each section's letters, those side by side of equal weight (but for rounding) put together."""
    found: list[list[tuple[str, float]]] = []
    for section in letters(prompt):
        found.append([])
        for letter, weight in section:
            if found[-1] and abs(found[-1][-1][1] - weight) < 1e-9:
                letter = found[-1].pop()[0] + letter
            found[-1].append((letter, weight))
    return found


def chunks(sections: Sequence[Sequence[T]], is_comma: Callable[[T], bool]) -> list[list[T]]:
    """Each section cut into pieces of at most 75 tokens, after a comma where one is among the last 20 of a full piece."""
    found: list[list[T]] = []
    for section in sections:
        left = list(section)
        while len(left) > 75:
            near = [end for end in range(56, 76) if is_comma(left[end - 1])]
            end = near[-1] if near and not is_comma(left[75]) else 75
            found.append(left[:end])
            left = left[end:]
        found.append(left)
    return found[:-1] if len(found) > 1 and not found[-1] else found
