"""The oracle is transformers' CLIPTokenizer, loaded from the same folder."""

import inspect
import json
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from fastsd.errors import CheckpointError, PromptError
from fastsd.tokenizer import MAX_PROMPT_BYTES, Tokenizer
from tests.small_model import SMALL_MODEL

SMALL = SMALL_MODEL / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"

HARD = [
    "",
    " ",
    "   \t\n ",
    "a small red circle above a large blue square, on a black background",
    "A Photo OF an ASTRONAUT riding a horse, 4K, highly-detailed!!! (masterpiece:1.2), [blurry]",
    "I'll we've it's don't they'd I'M you'RE o'clock 'tis rock 'n' roll",
    "😀👍🏽 🏳️‍🌈 👩‍👩‍👧‍👦 🇯🇵 e\u20e3 ❤️",  # skin tone, ZWJ sequences, flag, keycap, variation selector
    "日本語のテキスト 中文字符 한국어 텍스트 𠮷野家",
    "مرحبا بالعالم שָׁלוֹם \u202eright to left\u202c \u200fمزيج mixed",
    "नमस्ते दुनिया ภาษาไทย Ελληνικά ΣΊΣΥΦΟΣ Кириллица",
    unicodedata.normalize("NFC", "café naïve Ångström ﬁne ½ Ⅳ"),
    unicodedata.normalize("NFD", "café naïve Ångström ﬁne ½ Ⅳ"),
    "İstanbul IĞDIR straße ǅ ſ Ⱥ",  # lower case of another length, or with no single lower case
    "a &amp; b &lt;3 &#8217; <b>bold</b> \\( \\) \\\\",
    "((((((((( ]]]]]]]] {{{}}} <<<>>> |||",
    "12345 1,000.50 3.14e-5 ٣٤٥ ²³ 0x1F 2nd",
    "tab\tnewline\nreturn\r\nvertical\x0bform\x0cnbsp\u00a0nel\u0085ls\u2028ideographic\u3000end",
    "zero\u200bwidth\u200cjoiners\u200d\ufeffbom soft\u00adhyphen word\u2060joiner",
    "\x01\x02\x1b[31mred\x7f\x80\x9f",
    "nul\x00in\x00side",
    "\x00",
    f"before{END}after {END} middle {START}{START} end",
    f"{END}",
    "<|ENDOFTEXT|> <|StartOfText|> <|endoftext |> <|endoftext",  # matched only where flagged `normalized`
    "wow! really!! !important! ! !a",  # "!" is SD 2's padding token and with it a special one
    "\ufffd\uffff\U0010ffff\ue000",
    "a" * 500,
    "antidisestablishmentarianism" * 20,
    "word " * 75,
    "word " * 76,
    "the quick brown fox jumps over the lazy dog " * 30,
    "é" * 200,
    "😀" * 100,
    "Zalgo " + "o\u0301\u0316\u0327" * 40,
]


def byte_symbols() -> list[str]:
    """The 256 symbols of byte-level BPE in CLIP's order: the printable Latin-1 ones, then stand-ins for the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def clip_like(target: int = 2000) -> tuple[dict[str, int], list[str]]:
    """A vocabulary laid out as CLIP's: symbols, symbols</w>, one token a merge, the two special ones at the end."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=target, end_of_word_suffix="</w>", show_progress=False)
    text = [
        inspect.getsource(json).lower(),
        inspect.getsource(inspect).lower(),
        *[p.lower() for p in HARD for _ in range(20)],
    ]
    trained.train_from_iterator(text, trainer)
    merges = [" ".join(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(merge.replace(" ", "") for merge in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def special(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **flags}


def write_release(folder: Path, pad: str) -> None:
    """The files of the SD 1 and SD 2 releases: flags in two places, the padding token a bare string."""
    vocab, merges = clip_like()
    names = {"bos_token": special(START), "eos_token": special(END), "unk_token": special(END)}
    config = {key: {"__type": "AddedToken", **token} for key, token in names.items()}
    config |= {"pad_token": pad, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names | {"pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def as_transformers_4(folder: Path, pad: str) -> None:
    """transformers 4.34 to 4.57: names are strings, flags are in added_tokens_decoder."""
    write_release(folder, pad)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    listed = {
        str(vocab[t]): {**special(t, normalized=t == START), "special": True} for t in dict.fromkeys([pad, START, END])
    }
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    edit(folder / "tokenizer_config.json", lambda config: config.update(names, added_tokens_decoder=listed))


def as_transformers_5(folder: Path, pad: str) -> None:
    """transformers 5 writes tokenizer.json and tokenizer_config.json, nothing else."""
    release = folder.with_name(folder.name + "-release")
    write_release(release, pad)
    CLIPTokenizer.from_pretrained(release).save_pretrained(folder)


def as_bare_tokenizer_json(folder: Path, pad: str) -> None:
    """tokenizer.json alone, merges as "a b": no config says the padding token, so it is CLIP's."""
    as_transformers_5(folder, pad)
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()

    def join_merges(fast: dict[str, Any]) -> None:
        fast["model"]["merges"] = [" ".join(merge) for merge in fast["model"]["merges"]]

    edit(folder / "tokenizer.json", join_merges)


def as_textual_inversion(folder: Path, pad: str) -> None:
    write_release(folder, pad)
    size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": size, "fox": size + 1}))


def as_bare_vocabulary(folder: Path, pad: str) -> None:
    write_release(folder, pad)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()


STYLES = {
    "release": write_release,
    "transformers-4": as_transformers_4,
    "transformers-5": as_transformers_5,
    "tokenizer-json-only": as_bare_tokenizer_json,
    "textual-inversion": as_textual_inversion,
    "vocabulary-only": as_bare_vocabulary,
}
FOLDERS = ["small", *(f"{style}/{pad}" for style in STYLES for pad in (END, "!"))]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, CLIPTokenizer]]:
    root, cache = tmp_path_factory.mktemp("tokenizers"), {}

    def get(name: str) -> tuple[Tokenizer, CLIPTokenizer]:
        if name not in cache:
            style, _, pad = name.partition("/")
            folder = SMALL if name == "small" else root / f"{style}-{'sd2' if pad == '!' else 'sd1'}"
            if name != "small":
                STYLES[style](folder, pad)
            cache[name] = Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)
        return cache[name]

    return get


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small model's tokenizer, to be damaged."""
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    for path in SMALL.iterdir():
        shutil.copyfile(path, copy / path.name)
    return copy


def expected_ids(oracle: CLIPTokenizer, prompts: list[str]) -> list[list[int]]:
    return oracle(prompts, padding="max_length", max_length=77, truncation=True).input_ids


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers_on_hard_strings(name: str, load: Any) -> None:
    ours, oracle = load(name)
    got, expected = ours.encode(HARD).ids, expected_ids(oracle, HARD)
    wrong = [(prompt, g, e) for prompt, g, e in zip(HARD, got, expected, strict=True) if g != e]
    assert not wrong, f"{len(wrong)} of {len(HARD)} differ; first {wrong[0][0]!r}:\n{wrong[0][1]}\n{wrong[0][2]}"


@pytest.mark.parametrize("name", FOLDERS)
def test_special_ids_and_sizes_equal_transformers(name: str, load: Any) -> None:
    ours, oracle = load(name)
    assert (ours.start_id, ours.end_id, ours.pad_id) == (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id)
    assert ours.vocab_size == len(oracle)
    assert ours.max_length == 77


def test_sd1_pads_with_the_end_token_and_sd2_with_id_0(load: Any) -> None:
    sd1, sd2 = load(f"release/{END}")[0], load("release/!")[0]
    assert sd1.pad_id == sd1.end_id == sd1.vocab_size - 1
    assert sd2.pad_id == 0
    assert sd1.encode([""]).ids == [[sd1.start_id] + [sd1.end_id] * 76]
    assert sd2.encode([""]).ids == [[sd2.start_id, sd2.end_id] + [0] * 75]


@pytest.mark.parametrize("name", ["small", f"release/{END}", "release/!"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=120) | st.lists(st.sampled_from([*HARD, " ", "!", "'s", "\u0301", END])).map("".join))
def test_ids_equal_transformers_on_any_text(name: str, load: Any, prompt: str) -> None:
    ours, oracle = load(name)
    assert ours.encode([prompt]).ids == expected_ids(oracle, [prompt])


def test_rows_do_not_depend_on_their_batch(load: Any) -> None:
    ours, _ = load(f"release/{END}")
    alone = [ours.encode([prompt]) for prompt in HARD]
    together = ours.encode(HARD)
    assert together.ids == [tokens.ids[0] for tokens in alone]
    assert together.dropped == [tokens.dropped[0] for tokens in alone]
    assert ours.encode([]).ids == []


def test_dropped_is_what_diffusers_would_warn_about(load: Any) -> None:
    ours, oracle = load(f"release/{END}")
    prompts = ["The Quick brown fox, jumps over the lazy dog; " * 12, "a cat " * 75, "short", ""]
    tokens = ours.encode(prompts)
    for prompt, dropped in zip(prompts, tokens.dropped, strict=True):
        removed = oracle(prompt).input_ids[76:-1]
        assert "".join(dropped.lower().split()) == "".join(oracle.decode(removed).split()), prompt
    assert tokens.dropped[0][0].isalpha(), "the prompt's own spelling, not the tokenizer's"
    assert tokens.dropped[0] in prompts[0]
    assert tokens.dropped[2:] == ["", ""]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(["a", "Red", "circle,", "éa", "日本", "😀", "x!"]), min_size=60, max_size=140))
def test_kept_and_dropped_make_the_prompt(load: Any, words: list[str]) -> None:
    ours, oracle = load(f"release/{END}")
    prompt = " ".join(words)
    tokens = ours.encode([prompt])
    assert prompt.endswith(tokens.dropped[0])
    assert bool(tokens.dropped[0]) == (len(oracle(prompt).input_ids) > 77)


def test_exactly_75_words_fit(load: Any) -> None:
    ours, _ = load("small")
    assert ours.encode(["red " * 75]).dropped == [""]
    assert ours.encode(["red " * 75 + "Blue "]).dropped == ["Blue"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("lone \ud83d surrogate", "U\\+D83D.* at character 5"),
        ("\udcff", "surrogate"),
        ("a" * (MAX_PROMPT_BYTES + 1), "1,000,001 bytes"),
        ("é" * (MAX_PROMPT_BYTES // 2 + 1), "1,000,002 bytes"),  # the limit counts bytes
        (None, "NoneType"),
        (b"bytes", "bytes"),
        (3, "int"),
        (["nested"], "list"),
    ],
)
def test_bad_prompts_are_refused_by_number(prompt: Any, message: str, load: Any) -> None:
    ours, _ = load("small")
    with pytest.raises(PromptError, match=rf"^prompts\[1\]: .*{message}") as error:
        ours.encode(["a red circle", prompt])
    assert "\n" not in str(error.value)
    assert ours.encode(["a red circle"]).ids[0][-1] == ours.pad_id  # the next valid request succeeds


@pytest.mark.parametrize("prompts", ["a string", b"bytes", None, 3, {"a set"}])
def test_prompts_must_be_a_list(prompts: Any, load: Any) -> None:
    with pytest.raises(PromptError, match="list of strings"):
        load("small")[0].encode(prompts)


@pytest.mark.parametrize(
    "prompt", ["(" * MAX_PROMPT_BYTES, "a" * MAX_PROMPT_BYTES, "\u0301\u0316" * (MAX_PROMPT_BYTES // 4)]
)
def test_a_megabyte_takes_bounded_time(prompt: str, load: Any) -> None:
    ours, _ = load("small")
    start = time.perf_counter()
    tokens = ours.encode([prompt])
    assert time.perf_counter() - start < 10, "measured 0.6 to 1.2 s; quadratic work would take minutes"
    assert len(tokens.ids[0]) == 77
    assert len(tokens.dropped[0]) > len(prompt) - 100


def test_threads_share_one_tokenizer(load: Any) -> None:
    ours, _ = load("release/!")
    expected = ours.encode(HARD)
    gate = threading.Barrier(8)

    def work(_: int) -> bool:
        gate.wait()
        return all(ours.encode(HARD) == expected for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_runtime_imports_neither_transformers_nor_diffusers() -> None:
    source = inspect.getsource(sys.modules[Tokenizer.__module__])
    assert not [
        line for line in source.splitlines() if "import" in line and ("transformers" in line or "diffusers" in line)
    ]


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "vocab missing": ("vocab.json", Path.unlink),
    "vocab empty": ("vocab.json", lambda p: p.write_bytes(b"")),
    "vocab cut short": ("vocab.json", lambda p: p.write_bytes(p.read_bytes()[:1000])),
    "vocab not UTF-8": ("vocab.json", lambda p: p.write_bytes(b'{"\xff": 0}')),
    "vocab nested deep": ("vocab.json", lambda p: p.write_text("[" * 100_000)),
    "vocab a list": ("vocab.json", lambda p: p.write_text("[]")),
    "vocab without entries": ("vocab.json", lambda p: p.write_text("{}")),
    "vocab ids negative": ("vocab.json", lambda p: edit(p, lambda v: v.update({"!": -1}))),
    "vocab ids not whole": ("vocab.json", lambda p: edit(p, lambda v: v.update({"!": 0.5}))),
    "vocab ids boolean": ("vocab.json", lambda p: edit(p, lambda v: v.update({"!": True}))),
    "vocab id twice": ("vocab.json", lambda p: edit(p, lambda v: v.update({"!": 5}))),
    "vocab without end": ("vocab.json", lambda p: edit(p, lambda v: v.pop(END))),
    "vocab without start": ("vocab.json", lambda p: edit(p, lambda v: v.pop(START))),
    "vocab a folder": ("vocab.json", lambda p: (p.unlink(), p.mkdir())),
    "merges missing": ("merges.txt", Path.unlink),
    "merges unknown": ("merges.txt", lambda p: p.write_text("#version: 0.2\nq z\n")),
    "merges of three": ("merges.txt", lambda p: p.write_text("#version: 0.2\na b c\n")),
    "merges not UTF-8": ("merges.txt", lambda p: p.write_bytes(b"#version: 0.2\n\xff\xfe\n")),
    "merges is JSON": ("merges.txt", lambda p: p.write_text('{"a": "b"}')),
    "config damaged": ("tokenizer_config.json", lambda p: p.write_text("{")),
    "config length 0": ("tokenizer_config.json", lambda p: edit(p, lambda v: v.update(model_max_length=0))),
    "config length text": ("tokenizer_config.json", lambda p: edit(p, lambda v: v.update(model_max_length="77"))),
    "config pads left": ("tokenizer_config.json", lambda p: edit(p, lambda v: v.update(padding_side="left"))),
    "config decoder": ("tokenizer_config.json", lambda p: edit(p, lambda v: v.update(added_tokens_decoder={"x": 1}))),
    "config pad empty": ("special_tokens_map.json", lambda p: edit(p, lambda v: v.update(pad_token=""))),
    "config pad number": (
        "tokenizer_config.json",
        lambda p: edit(p, lambda v: v.update(added_tokens_decoder={}, pad_token=3)),
    ),
    "map damaged": ("special_tokens_map.json", lambda p: p.write_text("null")),
    "fast damaged": ("tokenizer.json", lambda p: p.write_text("{")),
    "fast of another kind": ("tokenizer.json", lambda p: p.write_text('{"model": {"type": "Unigram"}}')),
    "fast without merges": ("tokenizer.json", lambda p: p.write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')),
    "fast tokens damaged": ("tokenizer.json", lambda p: p.write_text('{"added_tokens": [{"content": "a"}]}')),
    "vocab key twice": ("vocab.json", lambda p: p.write_text('{"a": 0, ' + p.read_text()[1:-1] + ', "a": 1}')),
    "vocab over 16 MB": ("vocab.json", lambda p: p.write_text("{" + " " * (17 << 20) + p.read_text()[1:])),
    "merges over 16 MB": ("merges.txt", lambda p: p.write_text(p.read_text() + "\n" * (17 << 20))),
    "config NaN": ("tokenizer_config.json", lambda p: p.write_text(p.read_text()[:-2] + ', "x": NaN}')),
    "config more a number": ("tokenizer_config.json", lambda p: edit(p, lambda v: v.update(extra_special_tokens=5))),
    "config more a text": (
        "tokenizer_config.json",
        lambda p: edit(p, lambda v: v.update(additional_special_tokens="<cat>")),
    ),
    "config more of numbers": (
        "tokenizer_config.json",
        lambda p: edit(p, lambda v: v.update(additional_special_tokens=[5])),
    ),
    "map more a number": (
        "special_tokens_map.json",
        lambda p: edit(p, lambda v: v.update(additional_special_tokens=5)),
    ),
    "added tokens damaged": ("added_tokens.json", lambda p: p.write_text('{"<cat>": "x"}')),
}


@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("special_tokens_map.json", {"additional_special_tokens": ["<cat>", "<dog>"]}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<cat>", "<dog>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<cat>", "<dog>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"cat_token": "<cat>", "dog_token": "<dog>"}}),
        ("tokenizer_config.json", {"extra_special_tokens": [], "additional_special_tokens": None}),
    ],
    ids=["map", "older-name", "newer-name", "with-roles", "none"],
)
def test_more_special_tokens_equal_transformers(file: str, more: dict[str, Any], tmp_path: Path) -> None:
    write_release(tmp_path / "tokenizer", END)
    edit(tmp_path / "tokenizer" / file, lambda config: config.update(more))
    ours, oracle = Tokenizer.from_folder(tmp_path / "tokenizer"), CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompts = ["a <cat> and a <dog>", "a<cat>b <DOG>", "cat dog"]
    assert ours.encode(prompts).ids == expected_ids(oracle, prompts)
    assert ours.vocab_size == len(oracle)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(damage: str, folder: Path) -> None:
    name, break_file = DAMAGE[damage]
    break_file(folder / name)
    named = "vocab.json" if damage == "config pad empty" else name
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")) as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*vocab\.json is missing.*tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_an_unlimited_length_means_clips_own(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json", lambda config: config.update(model_max_length=1000000000000000019884624838656)
    )
    assert Tokenizer.from_folder(folder).max_length == 77


def test_a_shorter_limit_is_kept(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda config: config.update(model_max_length=8))
    ours, oracle = Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)
    expected = oracle(HARD, padding="max_length", truncation=True).input_ids
    assert ours.encode(HARD).ids == expected
    assert {len(row) for row in expected} == {8}


def test_sd2_takes_every_exclamation_mark_for_padding(load: Any) -> None:
    """A quirk of the standard that images depend on: the padding token is special, so "!" never joins a word."""
    sd1, sd2 = load(f"release/{END}")[0], load("release/!")[0]
    row = sd2.encode(["!a!"]).ids[0]
    assert row[1] == row[3] == 0, row
    assert row[4:] == [sd2.end_id] + [0] * 72
    assert 0 not in sd1.encode(["!a!"]).ids[0], "here it is the word '!</w>'"
