"""The C++ tests under ctest, and dca_bench's own comparison with the reference."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from cpp_build import build_tree, has_googletest, require_cmake_and_compiler, run

#: A small shape with all three segments.
SHAPE = [
    *("--batch=2", "--heads=6", "--kv-heads=2", "--head-dim=80", "--seqlen=200"),
    *("--chunk-len=48", "--max-position=70", "--threads=2", "--repeat=3"),
]


def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tree(tmp_path_factory) / "bench" / "cpp" / "dca_bench"


def test_cpp_tests_pass_for_every_instruction_set_that_runs_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    require_cmake_and_compiler()
    if not has_googletest():
        pytest.skip("CMake finds no GoogleTest (Debian, Ubuntu: apt-get install libgtest-dev)")
    build = build_tree(tmp_path_factory)
    result = run("ctest", "--output-on-failure", cwd=build)
    print(result.stdout)  # shown with pytest -rP: which sets were skipped, and how long each took
    assert re.search(r"dca_cpp_tests\.portable \.+\s+Passed", result.stdout)
    assert "100% tests passed" in result.stdout


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("operation", ["prefill", "decode", "append", "merge"])
def test_bench_verifies_and_writes_json(
    operation: str, dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path / "result.json"
    result = run(bench(tmp_path_factory), operation, *SHAPE, f"--dtype={dtype}", "--verify", "--json", file)
    assert "max error" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "no temporary file stays"
    row = json.loads(file.read_text())
    assert (row["benchmark"], row["dtype"], row["seqlen"], row["threads"]) == (operation, dtype, 200, 2)
    assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    pairs = 200 * 201 // 2
    cache_bytes = 2 * 2 * 200 * 2 * 80 * (4 if dtype == "fp32" else 2)
    part_bytes = 2 * 6 * 200 * (80 * (4 if dtype == "fp32" else 2) + 4)
    work = {
        "prefill": 4 * 2 * 6 * 80 * pairs,
        "decode": cache_bytes,
        "append": 2 * cache_bytes,
        "merge": (3 + 1) * part_bytes,  # three parts read, one written
    }[operation]
    assert row["work"] == pytest.approx(work)
    assert row["rate_per_s"] == pytest.approx(work / row["median_ms"] * 1e3, rel=1e-6)
    assert row["ceiling_per_s"] > 0
    assert row["device"] == "cpu"
    assert row["machine"]
    assert row["compiler"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"])


def test_bench_writes_through_links_and_into_pipes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.touch()
    link.symlink_to(file)
    os.mkfifo(pipe)
    binary = bench(tmp_path_factory)
    run(binary, "append", *SHAPE, "--json", link)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        run(binary, "append", *SHAPE, "--json", pipe)
        assert json.loads(reader.read())["benchmark"] == "append"
    assert json.loads(file.read_text())["benchmark"] == "append"
    assert link.is_symlink()
    assert pipe.is_fifo()


@pytest.mark.parametrize("operation", ["decode", "append"])
def test_bench_verifies_caches_of_pages(operation: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    queries = ["--queries=3"] if operation == "decode" else []
    result = run(bench(tmp_path_factory), operation, *SHAPE, *queries, "--page-size=16", "--dtype=bf16", "--verify")
    assert "page_size 16" in result.stdout
    assert "max error" in result.stdout


@pytest.mark.parametrize("layout", [[], ["--page-size=16"]], ids=["contiguous", "pages"])
@pytest.mark.parametrize("cache_dtype", ["e4m3", "int8"])
@pytest.mark.parametrize("operation", ["decode", "append"])
def test_bench_verifies_caches_of_8_bit_numbers(
    operation: str, cache_dtype: str, layout: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path / "result.json"
    narrow = ["--dtype=bf16", f"--cache-dtype={cache_dtype}", *layout, "--verify", "--json", file]
    result = run(bench(tmp_path_factory), operation, *SHAPE, *narrow)
    assert f"cache {cache_dtype}" in result.stdout
    row = json.loads(file.read_text())
    rows = 2 * 2 * 200 * 2  # of k and v
    cached = rows * (80 + (4 if cache_dtype == "int8" else 0))  # int8 has a scale for each
    assert row["cache_dtype"] == cache_dtype
    assert row["work"] == pytest.approx(cached if operation == "decode" else rows * 80 * 2 + cached)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to time"),
        (["fly"], "must be prefill, decode, append or merge; got 'fly'"),
        (["merge", "--page-size=16"], "--page-size is for decode and append; got merge"),
        (["prefill", "--device=tpu"], "--device must be cpu or cuda; got 'tpu'"),
        (["decode", "--timing=graph"], "--timing needs --device=cuda"),
        (["decode", "--device=cuda"], "--device=cuda needs"),  # a build with CUDA kernels, or else a CUDA device
        (["prefill", "--heads", "many"], "--heads must be an integer between 1 and 2147483647; got 'many'"),
        (["prefill", "--dtype", "int8"], "--dtype must be fp32, bf16 or fp16; got 'int8'"),
        (["decode", "--cache-dtype", "e5m2"], "--cache-dtype must be same, e4m3 or int8; got 'e5m2'"),
        (["decode", "--cache-dtype=int8", "--device=cuda"], "--cache-dtype=int8 is for --device=cpu; got cuda"),
        (["prefill", "--cache-dtype", "e4m3"], "--cache-dtype is for decode and append; got prefill"),
        (["prefill", "--speed", "9"], "unknown option '--speed'"),
        (["decode", "--heads=7"], "num_heads must be a positive multiple of num_heads_kv"),
        (["append", "--json", "no/such/folder/x.json"], "--json must name a file in an existing folder"),
        (["append", "--json", "/"], "--json must name a file; '/' is a folder"),
        (["append", "--json"], "--json must name a file; got none"),
        (["append", "--verify=0"], "--verify takes no value; got '--verify=0'"),
    ],
)
def test_bench_refuses_bad_options_in_one_sentence(
    arguments: list[str], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = run(bench(tmp_path_factory), *arguments, check=False)
    assert result.returncode != 0
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_bench_help_names_every_flag(tmp_path_factory: pytest.TempPathFactory) -> None:
    text = run(bench(tmp_path_factory), "--help").stdout
    for flag in ("batch", "heads", "kv-heads", "head-dim", "seqlen", "chunk-len", "max-position", "dtype", "threads"):
        assert f"--{flag} " in text
    for flag in (
        "splits",
        "repeat",
        "warmup",
        "verify",
        "json",
        "device",
        "timing",
        "page-size",
        "queries",
        "parts",
        "cache-dtype",
    ):
        assert f"--{flag} " in text


def test_amx_limits_prints_them_or_that_there_is_no_amx(tmp_path_factory: pytest.TempPathFactory) -> None:
    dca_bench = bench(tmp_path_factory)
    refusal = run("env", "DCA_CPU_ISA=none", dca_bench, "prefill", "--seqlen=8", check=False).stderr
    assert "portable" in refusal, "which names the compiled instruction sets"
    if "amx_bf16" not in refusal:
        pytest.skip("this compiler, or its assembler, does not know AMX")
    program = dca_bench.with_name("dca_amx_limits")
    assert run("env", "DCA_CPU_ISA=portable", program, check=False).returncode == 77
    result = run(program, check=False)
    if result.returncode == 77:
        assert "No AMX" in result.stdout
    else:
        assert result.returncode == 0
        assert re.search(r"^product of two tiles +[1-9][0-9.]* ns", result.stdout, re.MULTILINE)
        assert "nan" not in result.stdout
