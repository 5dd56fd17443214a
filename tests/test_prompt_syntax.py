"""The web UI's prompt syntax and chunks against its documented cases, and against slow readings of its rules."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import PromptError
from fastsd.prompt_chunks import BACKTRACK, MAX_CHUNKS, Token, a1111_chunks, split
from fastsd.prompt_syntax import parse
from fastsd.tokenizer import Tokenizer
from tests import prompt_reference
from tests.small_model import SMALL_MODEL

Sections = list[list[tuple[str, float]]]

DOCUMENTED: dict[str, Sections] = {
    "normal text": [[("normal text", 1.0)]],
    "an (important) word": [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]],
    r"\(literal\]": [[("(literal]", 1.0)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    "(a (house:1.3)) [on] a (hill:0.5), sun, (((sky)))": [
        [
            *(("a ", 1.1), ("house", 1.43), (" ", 1.0), ("on", 1 / 1.1), (" a ", 1.0), ("hill", 0.5)),
            *((", sun, ", 1.0), ("sky", 1.331)),
        ]
    ],
    # The documentation's longest, with the bracket that it leaves open closed at the end.
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)": [
        [
            *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
            *((", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
        ]
    ],
}
MORE: dict[str, Sections] = {
    "": [[]],
    "()[](:1.5)": [[]],
    "(x:+.5)(y:2.)(z: 1.25 )": [[("x", 0.5), ("y", 2.0), ("z", 1.25)]],
    "(x:-1)": [[("x", -1.0)]],
    "(x:0)": [[("x", 0.0)]],
    r"\\(x\\)": [[("\\", 1.0), ("x\\", 1.1)]],
    r"c:\path": [[(r"c:\path", 1.0)]],
    # Weights that are none: letters, and the bracket one without a number.
    "(x:1.2.3)(y:1e3)(z:)(w:1,5)": [[("x:1.2.3y:1e3z:w:1,5", 1.1)]],
    # A bracket without its partner is a letter.
    "(unbalanced": [[("(unbalanced", 1.0)]],
    "a] b) ([c": [[("a] b) ([c", 1.0)]],
    "x:1.3)": [[("x:1.3)", 1.0)]],
    "[x:1.3)": [[("[x:1.3)", 1.0)]],
    "((x)": [[("(", 1.0), ("x", 1.1)]],
    "[(x]": [[("(x", 1 / 1.1)]],
    "(a [b) c]": [[("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]],  # the two kinds may cross
    # Breaks.
    "a BREAK b": [[("a ", 1.0)], [(" b", 1.0)]],
    "BREAK": [[], []],
    "a,BREAK,b BREAK": [[("a,", 1.0)], [(",b ", 1.0)], []],
    "(a BREAK b:1.2)": [[("a ", 1.2)], [(" b", 1.2)]],
    "BREAKING break _BREAK BREAK1": [[("BREAKING break _BREAK BREAK1", 1.0)]],
}


def assert_phrases(prompt: str, expected: Sections) -> None:
    found = parse(prompt)
    assert [[text for text, _ in section] for section in found] == [
        [text for text, _ in section] for section in expected
    ], f"{prompt!r}: other phrases"
    for section, wanted in zip(found, expected, strict=True):
        for (text, weight), (_, right) in zip(section, wanted, strict=True):
            assert weight == pytest.approx(right, rel=1e-12), f"{prompt!r}: {text!r} weighs {weight}, not {right}"


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_documented_cases(prompt: str) -> None:
    assert_phrases(prompt, DOCUMENTED[prompt])


@pytest.mark.parametrize("prompt", MORE)
def test_escapes_odd_weights_lone_brackets_and_breaks(prompt: str) -> None:
    assert_phrases(prompt, MORE[prompt])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["(", ")", "[", "]", ":", "1.2", ".5", "-2", "\\", " ", "ab", "BREAK", "1."])).map("".join)
)
def test_any_prompt_reads_as_letter_by_letter(prompt: str) -> None:
    expected = prompt_reference.letters(prompt)
    if any(abs(weight) > 100 for section in expected for _, weight in section):
        with pytest.raises(PromptError, match="weights go from -100 to 100"):
            parse(prompt)
        return
    found = [[(letter, weight) for text, weight in section for letter in text] for section in parse(prompt)]
    assert [[letter for letter, _ in section] for section in found] == [
        [letter for letter, _ in one] for one in expected
    ]
    for section, wanted in zip(found, expected, strict=True):
        assert [weight for _, weight in section] == pytest.approx([weight for _, weight in wanted], rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_no_text_without_brackets_is_changed(prompt: str) -> None:
    text = re.sub(r"[\\()\[\]]|BREAK", "", prompt)
    assert [phrase.text for section in parse(text) for phrase in section] == [text] * bool(text)


@pytest.mark.parametrize(
    "prompt", ["(x:101)", "(x:-100.5)", "(" * 60 + "x" + ")" * 60, "(" * 8000 + "(x:0)" + ")" * 8000]
)
def test_a_weight_out_of_range_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match=r"^negative_prompt\[3\]: 'x' weighs .*; weights go from -100 to 100$"):
        parse(prompt, "negative_prompt[3]")


HEAPS = ["(", "([", "()", "(:", ": ", ":1", "\\", "\\(", "(a)b", "BREAK ", " "]


@pytest.mark.parametrize("heap", HEAPS)
def test_10_000_marks_take_bounded_time(heap: str) -> None:
    start = time.process_time()
    for prompt in (heap * 10_000, heap * 5_000 + ")" * 5_000):
        with contextlib.suppress(PromptError):  # 5,000 brackets that close weigh what they hold beyond the range
            parse(prompt)
    assert time.process_time() - start < 1, "measured 0.02 to 0.5 s, on a busy machine"


@pytest.mark.parametrize("prompt", ["(" * 250_000, ":" + "1" * 1_000_000, "([" * 75_000 + ")]" * 50_000])
def test_long_prompts_take_linear_time(prompt: str) -> None:
    start = time.process_time()
    parse(prompt)
    assert time.process_time() - start < 10, "measured 0.03 to 1 s; quadratic work would take minutes"


# Chunks ---------------------------------------------------------------------------------------------------------------

WORD, COMMA = 7, 9


def chunk_sizes(*sections: str) -> list[str]:
    """Sections as strings of "w" and "," → chunks of at most 75, likewise."""
    tokens = [[Token(COMMA if mark == "," else WORD, 1.0, 0) for mark in section] for section in sections]
    return ["".join("," if token.id == COMMA else "w" for token in chunk) for chunk in split(tokens, 75, COMMA)]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ([""], [""]),
        (["w" * 75], ["w" * 75]),
        (["w" * 76], ["w" * 75, "w"]),
        (["w" * 150], ["w" * 75, "w" * 75]),
        (["w" * 60 + "," + "w" * 30], ["w" * 60 + ",", "w" * 30]),  # what follows the comma stays together
        (["w" * 55 + "," + "w" * 30], ["w" * 55 + ",", "w" * 30]),  # the 20th token from the end
        (["w" * 54 + "," + "w" * 30], ["w" * 54 + "," + "w" * 20, "w" * 10]),  # the 21st: too far back
        (["w" * 74 + "," + "w"], ["w" * 74 + ",", "w"]),
        (["w" * 60 + "," + "w" * 14 + ",ww"], ["w" * 60 + "," + "w" * 14, ",ww"]),  # a comma comes next: no going back
        (["w" * 60 + "," + "w" * 14], ["w" * 60 + "," + "w" * 14]),  # full, but nothing comes after
        (["w" * 60 + "," + "w" * 80], ["w" * 60 + ",", "w" * 75, "w" * 5]),  # a comma counts once
        (["w", "ww"], ["w", "ww"]),
        (["", "w"], ["", "w"]),
        (["w", ""], ["w"]),
        (["", ""], [""]),
        (["w", "", "w"], ["w", "", "w"]),
        (["w" * 75, "w"], ["w" * 75, "w"]),
        (["w" * 60 + "," + "w" * 14, "w"], ["w" * 60 + "," + "w" * 14, "w"]),
    ],
)
def test_where_a_chunk_ends(sections: list[str], expected: list[str]) -> None:
    assert chunk_sizes(*sections) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("w" * 12 + ",", max_size=400), min_size=1, max_size=4))
def test_chunks_are_what_the_rules_say(sections: list[str]) -> None:
    commas = [[mark == "," for mark in section] for section in sections]
    expected = [["w,"[comma] for comma in chunk] for chunk in prompt_reference.chunks(commas, lambda comma: comma)]
    assert BACKTRACK == 20
    assert [list(chunk) for chunk in chunk_sizes(*sections)] == expected


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(SMALL_MODEL / "tokenizer")


def test_a_chunk_is_framed_and_what_frames_it_weighs_1(tokenizer: Tokenizer) -> None:
    (chunk,), warning = a1111_chunks(tokenizer, "a (red circle:1.5)")
    assert list(chunk.ids) == tokenizer.encode(["a red circle"]).ids[0]
    assert chunk.weights == (1.0, 1.0, 1.5, 1.5, *[1.0] * 73)
    assert warning == ""
    assert a1111_chunks(tokenizer, "a red (circle:1)")[0][0].weights is None


def test_a_word_ends_at_a_bracket(tokenizer: Tokenizer) -> None:
    (chunk,), _ = a1111_chunks(tokenizer, "cir(cle)")
    assert list(chunk.ids) == tokenizer.encode(["cir cle"]).ids[0]


@pytest.mark.parametrize("breaks", ["", " BREAK" * 10])
def test_past_the_last_chunk_the_warning_says_what_fell_off(tokenizer: Tokenizer, breaks: str) -> None:
    fitting = "red " * 75 * (MAX_CHUNKS - 1) + "circle " * 75
    chunks, warning = a1111_chunks(tokenizer, fitting + breaks)
    assert (len(chunks), warning) == (MAX_CHUNKS, "")
    cut, warning = a1111_chunks(tokenizer, fitting + breaks + " (Blue moon:1.2) [star]")
    assert cut == chunks
    assert warning.endswith("is longer than 32 chunks of 75 tokens, so this was left out: 'Blue moon star'")
