"""Problems, the files of configs and what is found in them; the candidates that a tuner times; warming Triton's cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.shapes import trace
from fastsd.config import TINY
from fastsd.kernels import geglu, gemm, groupnorm_silu, layernorm, tuned
from fastsd.kernels.launch import SHARED_MEMORY, shared_memory
from fastsd.kernels.tuned import Entry, Problem, lookup, problem
from fastsd.ops import REFERENCE, Shortcut
from tests.kernels.case import Output, draw, run_compiled

HALF = torch.float16


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_problem_reads_as_what_it_is() -> None:
    x = meta(2, 64, 64, 320)
    shortcut = Shortcut(meta(2, 64, 64, 640), meta(2, 64, 64, 320), meta(320, 960, 1, 1), meta(320))
    assert problem("linear", x, meta(640, 320), None, meta(2, 64, 64, 640), "gelu") == Problem(
        "linear", "fp16", 8192, "w 640x320, residual 640, activation gelu"
    )
    assert problem("group_norm", x, meta(640), meta(640), 32, 1e-5, True, x).fixed == (
        "w 640, b 640, groups 32, eps 1e-05, silu, skip 320"
    )
    assert problem(
        "conv2d", x, meta(320, 320, 3, 3), meta(320), 1, (1, 1, 1, 1), meta(2, 320), None, shortcut
    ).fixed == (
        "w 320x320x3x3, b 320, pad 1+1+1+1, channel_bias 320, "
        "shortcut.x 640, shortcut.skip 320, shortcut.w 320x960x1x1, shortcut.b 320"
    )
    assert problem("project_heads", meta(2, 77, 768), [meta(320, 768)] * 2, None, 8).fixed == (
        "weights 320x768+320x768, heads 8"
    )
    q, k = meta(2, 4096, 8, 40), meta(2, 77, 8, 40)
    assert problem("attention", q, q, q).fixed == "heads 8, D 40, keys self"
    assert problem("attention", q, k, k, meta(2, 1, 1, 77, dtype=torch.bool)).fixed == (
        "heads 8, D 40, keys 77, mask boolean"
    )
    assert problem(
        "attention", meta(2, 77, 8, 48), meta(2, 77, 8, 48), meta(2, 77, 8, 48), causal=True, head_dim=40
    ) == (Problem("attention", "fp16", 1232, "heads 8, D 40, keys self, causal"))
    assert problem("layer_norm", meta(7, 320, dtype=torch.bfloat16), meta(320), meta(320)).dtype == "bf16"


def test_one_problem_however_it_is_called() -> None:
    x, w, b, residual = meta(4, 8), meta(6, 8), meta(6), meta(4, 6)
    expected = problem("linear", x, w, b, residual)
    assert problem("linear", x, w, b, residual, None) == expected
    assert problem("linear", x, residual=residual, b=b, w=w) == expected
    image, kernel = meta(1, 8, 8, 8), meta(8, 8, 3, 3)
    assert problem("conv2d", image, kernel) == problem("conv2d", image, kernel, None, 1, (0, 0, 0, 0), shortcut=None)
    assert problem("layer_norm", x, b, b) == problem("layer_norm", x, b, b, 1e-5)
    plain = problem("upsample_conv2d", image, kernel, b)
    assert problem("upsample_conv2d", image, kernel, b, torch.Size((16, 16))) == plain
    assert problem("upsample_conv2d", image, kernel, b, (15, 16)).fixed == plain.fixed + ", odd"


def test_arguments_that_an_op_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="geglu takes x, w, b"):
        problem("geglu", meta(4, 8), meta(6, 8), meta(6), meta(4, 6))
    with pytest.raises(TypeError, match="given 2 and silu"):
        problem("linear", meta(4, 8), meta(6, 8), silu=True)


def test_only_the_size_follows_the_picture_and_the_batch() -> None:
    """All calls of a model, at two sizes and two batches: the same problems but for their size."""

    def problems(pixels: int, batch: int) -> set[tuple[str, str]]:
        calls = [call for calls in trace(TINY, pixels, batch).values() for call in calls]
        return {(call.op, problem(call.op, **call.empty(HALF)).fixed) for call in calls}

    few = problems(16, 2)
    assert few == problems(48, 2) == problems(32, 8)
    assert {op for op, _ in few} == tuned.PARAMETERS.keys()


def entry(size: int, config: tuple[int, ...] | None = (1, 2), **change: Any) -> Entry:
    fields = {"op": "linear", "dtype": "fp16", "size": size, "fixed": "w 8x8", "use": "kernel", "us": 1.0}
    return Entry(**fields | {"config": config, "library_us": 2.5} | change)


def test_lookup_finds_the_nearest_size(tmp_path: Path) -> None:
    near, far = entry(100), entry(1000, (3, True))
    other = entry(100, None, dtype="bf16", use="library", us=None)
    tuned.write(tmp_path / "sm_90.json", {"device": "a GPU"}, [near, far, other])

    def found(size: int, dtype: str = "fp16", fixed: str = "w 8x8", arch: int = 90) -> Entry | None:
        return lookup(Problem("linear", dtype, size, fixed), arch, tmp_path)

    assert found(100) == found(25) == found(316) == near
    assert found(317) == found(4000) == far, "nearest by ratio: 316.2 is between them"
    assert found(24) is None, "more than 4 times smaller than any that was measured"
    assert found(4001) is None
    assert found(100, dtype="bf16") == other
    assert found(100, dtype="fp32") is None
    assert found(100, fixed="w 8x8, b 8") is None
    assert found(100, arch=80) is None
    assert tuned.has(90, tmp_path)
    assert not tuned.has(80, tmp_path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, about = tmp_path / "new" / "sm_90.json", {"device": "a GPU", "commit": "0"}
    for entries in ([], [entry(7, (64, True, 0)), entry(8, None, use="library", us=None)]):
        tuned.write(path, about, entries)
        assert tuned.read(path) == (about, entries)
        assert [file.name for file in path.parent.iterdir()] == ["sm_90.json"]


SOUND = {"entries": [entry(100)._asdict()]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"entries": 3}',
        '{"entries": [3]}',
        '{"entries": [{"op": "linear"}]}',
        *(
            json.dumps({"entries": [entry(100)._asdict() | change]})
            for change in (
                {"size": 0},
                {"size": True},
                {"size": "8"},
                {"use": "luck"},
                {"config": [1.5]},
                {"config": "128"},
                {"config": None},  # "use": "kernel" needs one
                {"us": None},
                {"library_us": None},
                {"fixed": 1},
                {"more": 1},
            )
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "sm_90.json").write_text(json.dumps(SOUND))
    assert lookup(entry(100).problem, 90, tmp_path)
    (tmp_path / "sm_80.json").write_text(content)
    with pytest.raises(ValueError, match=r"sm_80\.json"):
        lookup(entry(100).problem, 80, tmp_path)


def test_the_files_that_are_shipped_are_sound() -> None:
    for path in tuned.CONFIGS.glob("*.json"):
        about, entries = tuned.read(path)
        assert {"device", "torch", "triton", "commit"} <= about.keys()
        assert len({each.problem for each in entries}) == len(entries) > 0


CANDIDATES = {
    "linear": lambda arch: gemm.candidates(8192, 320, 1280, HALF, arch),
    "linear, bare": lambda arch: gemm.candidates(8192, 960, 320, HALF, arch, residual=False, activation=None),
    "linear, few CTAs": lambda arch: gemm.candidates(512, 1280, 5120, HALF, arch),
    "linear, narrow": lambda arch: gemm.candidates(2, 8, 5120, HALF, arch),
    "geglu": lambda arch: geglu.candidates(8192, 2560, HALF, arch),
    "group_norm": lambda arch: groupnorm_silu.candidates(2, 4096, 320, 32, 320),
    "group_norm, few channels": lambda arch: groupnorm_silu.candidates(1, 16, 8, 2),
    "layer_norm": lambda arch: layernorm.candidates(8192, 320),
    "layer_norm, wide": lambda arch: layernorm.candidates(2, 16384),
}


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("some", CANDIDATES.values(), ids=CANDIDATES)
def test_candidates_are_few_different_and_fit(some: Any, arch: int) -> None:
    found = some(arch)
    assert 1 <= len(found) <= 16
    assert len(set(found)) == len(found)
    for config in found:
        assert config.num_warps in (1, 2, 4, 8)
        if isinstance(config, gemm.Config):
            stage = 2 * (config.block_m + config.block_n) * config.block_k
            assert stage * config.num_stages <= shared_memory(arch)


def test_candidates_begin_with_the_choosers_and_split_k_where_ctas_are_few() -> None:
    few, many = (512, 1280, 5120, HALF, 90), (8192, 960, 320, HALF, 90)
    assert gemm.candidates(*few)[0] == gemm.choose_config(*few)
    assert {config.split_k for config in gemm.candidates(*few)} > {1, 2}
    assert {config.split_k for config in gemm.candidates(*many)} == {1}
    wide = (128, 256)
    assert wide in {config[:2] for config in gemm.candidates(*many, residual=False, activation=None)}
    assert wide not in {config[:2] for config in gemm.candidates(*many)}, "it spills beside an epilogue"
    assert wide in {config[:2] for config in geglu.candidates(8192, 2560, HALF, 90)}
    assert wide not in {config[:2] for config in geglu.candidates(8192, 2560, HALF, 100)}
    assert geglu.candidates(*many[:2], HALF, 90)[0] == geglu.choose_config(*many[:2], HALF, 90)
    assert groupnorm_silu.candidates(2, 4096, 320, 32)[0] == groupnorm_silu.choose_config(2, 4096, 320, 32)
    kernels = {config.steps > 0 for config in groupnorm_silu.candidates(2, 1024, 640, 32)}
    assert kernels == {True, False}, "one kernel and two are both timed"
    assert layernorm.candidates(8192, 320)[0] == layernorm.choose_config(8192, 320)


def test_every_candidate_computes_the_op() -> None:
    """Through the wrappers' config=; rows, columns and pixels that no tile divides."""
    x, residual = draw(17, 520, seed=0, dtype=HALF), draw(17, 90, seed=1, dtype=HALF)
    w, b = draw(90, 520, seed=2, dtype=HALF, scale=520**-0.5), draw(90, seed=3, dtype=HALF)
    image, skip = draw(2, 3, 7, 40, seed=4, dtype=HALF), draw(2, 3, 7, 24, seed=5, dtype=HALF)
    scale, shift = draw(64, seed=6, dtype=HALF), draw(64, seed=7, dtype=HALF)
    row = draw(520, seed=8, dtype=HALF)
    cases: list[tuple[str, Any, dict[str, Any], list[Any], tuple[int, ...]]] = [
        (
            *("linear", gemm.linear, {"x": x, "w": w, "b": b, "residual": residual}),
            *(gemm.candidates(17, 90, 520, HALF, 90), (17, 90)),
        ),
        ("geglu", geglu.geglu, {"x": x, "w": w, "b": b}, geglu.candidates(17, 90, HALF, 90), (17, 45)),
        (
            *("layer_norm", layernorm.layer_norm, {"x": x, "w": row, "b": row}),
            *(layernorm.candidates(17, 520), (17, 520)),
        ),
        (
            *("group_norm", groupnorm_silu.group_norm),
            {"x": image, "w": scale, "b": shift, "groups": 8, "eps": 1e-5, "silu": True, "skip": skip},
            *(groupnorm_silu.candidates(2, 21, 40, 8, 24), (2, 3, 7, 64)),
        ),
    ]
    for op, kernel, arguments, configs, shape in cases:
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        truth = getattr(REFERENCE, op)(**wide)
        assert len(configs) > 3
        for config in configs:
            out = Output(*shape, dtype=HALF)
            kernel(**arguments, out=out.tensor, config=config)
            out.check(op, truth)


def test_warm_compiles_what_another_process_finds(tmp_path: Path) -> None:
    """For an sm_90 that is only named: the second warming, with an empty memory, compiles nothing."""
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.runtime import driver\n"
        "from fastsd.kernels import layernorm\n"
        "from fastsd.compiling import Named\n"
        "driver.set_active(Named(90))\n"
        "x, w = (torch.empty(size, dtype=torch.float16, device='meta') for size in ((64, 32), (32,)))\n"
        "launch, = layernorm.plan_layer_norm(x, w, w, 1e-5, x)\n"
        "launch.warm()\n"
        f"files = sorted(Path({str(tmp_path)!r}).rglob('*'))\n"
        "assert any(file.suffix == '.cubin' for file in files)\n"
        "layernorm.layer_norm_kernel.device_caches.clear()\n"
        "launch.warm()\n"
        f"assert sorted(Path({str(tmp_path)!r}).rglob('*')) == files\n"
    )
    done = run_compiled("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
