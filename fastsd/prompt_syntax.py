"""The prompt syntax of AUTOMATIC1111's web UI: phrases with weights, and breaks.

`(x)` weighs x by 1.1, `[x]` by 1/1.1, `(x:1.3)` by 1.3; within one another they multiply. A backslash before a bracket or a
backslash makes a letter of it. BREAK, a word in capitals, begins a new chunk.

Unlike there, a bracket without its partner is a letter, wherever it stands, and BREAK breaks within brackets too. The web UI's
ways to change a prompt between steps (`[from:to:when]`, `[a|b]`) and to blend prompts (`AND`) are no syntax here.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fastsd.errors import PromptError
from fastsd.wording import quoted

LARGEST_WEIGHT = 100.0
"""The largest weight of a phrase, and its negative the smallest."""

# Possessive (++, *+), so that no text takes more than linear time.
_MARK = re.compile(
    r"""\\([\\()\[\]])
      | (:\s*+([+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+\))
      | ([()\[\]])
      | ([^\\()\[\]:]++|[\\:])""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")
_FACTORS = {")": 1.1, "]": 1 / 1.1}
_OPENING = {")": "(", "]": "["}


class _Mark(NamedTuple):
    """What _MARK finds: one of these, the others ""; a closing bracket may have a weight."""

    letter: str
    weighted: str
    weight: str
    bracket: str
    text: str


class Phrase(NamedTuple):
    """A part of a prompt whose words weigh the same."""

    text: str
    weight: float


def parse(prompt: str, name: str = "prompt") -> list[list[Phrase]]:
    """A prompt's sections (what BREAK parts), each as its phrases, none of them empty; in time linear in its length.

    PromptError for a weight beyond LARGEST_WEIGHT; name: what the message calls the prompt.
    """
    marks = [_Mark(*groups) for groups in _MARK.findall(prompt)]
    factors, closed = _partners(marks)
    weights = {"(": [1.0], "[": [1.0]}  # of the brackets open now; the two kinds may cross
    sections: list[list[tuple[list[str], float]]] = [[]]
    for index, mark in enumerate(marks):
        if index in factors:
            weights[mark.bracket].append(weights[mark.bracket][-1] * factors[index])
        elif index in closed:
            weights[closed[index]].pop()
        else:
            weight = weights["("][-1] * weights["["][-1]
            letters = mark.letter or mark.weighted or mark.bracket or mark.text
            for part, text in enumerate(_BREAK.split(letters)):
                if part:
                    sections.append([])
                if text:
                    _add(sections[-1], text, weight)
    parsed = [[Phrase("".join(texts), weight) for texts, weight in section] for section in sections]
    for phrase in (phrase for section in parsed for phrase in section):
        if not abs(phrase.weight) <= LARGEST_WEIGHT:  # NaN too: 0 times a weight that overflowed
            raise PromptError(
                f"{name}: {quoted(phrase.text, 40)} weighs {phrase.weight:g}; "
                f"weights go from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            )
    return parsed


def _partners(marks: Sequence[_Mark]) -> tuple[dict[int, float], dict[int, str]]:
    """By index, of the brackets that have a partner: an opening one's factor, and what a closing one closes."""
    waiting: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}
    closed: dict[int, str] = {}
    for index, mark in enumerate(marks):
        bracket = ")" if mark.weighted else mark.bracket
        if bracket in waiting:
            waiting[bracket].append(index)
        elif bracket and waiting[_OPENING[bracket]]:
            factors[waiting[_OPENING[bracket]].pop()] = float(mark.weight or _FACTORS[bracket])
            closed[index] = _OPENING[bracket]
    return factors, closed


def _add(phrases: list[tuple[list[str], float]], text: str, weight: float) -> None:
    if phrases and phrases[-1][1] == weight:
        phrases[-1][0].append(text)
    else:
        phrases.append(([text], weight))
