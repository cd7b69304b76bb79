"""What the CPU benchmarks count, pair, leave out, compose and print. No test looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_build import ROOT, require_cmake_and_compiler
from cpp_build import run as run_command

from dca_ext import DCAConfig, reference

sys.path.insert(0, str(ROOT / "bench"))
import attention_share
import bench_cpu
import benchmark_results
import cache_steps
import cpu_ceilings
import cpu_contenders
import cpu_plot
import cpu_report
import cpu_runs
import cpu_timing
import instructions
import samples
from cpu_cases import SHAPES, Case, Contender, Inputs, Prepared


def make_case(kind: str = "prefill", seqlen: int = 40, dtype: str = "float32") -> Case:
    """Small heads, chunks of 16."""
    return Case(kind, "tiny", 4, 2, 8, seqlen, dtype, 16)


def row(contender: str, role: str = "rival", **figures: object) -> dict:
    """A row as a run makes it."""
    return {**make_case(seqlen=4096).to_dict(), "contender": contender, "role": role, **figures}


# --- Counting and pairing ---------------------------------------------------------------------------------------------


def test_work_is_that_of_causal_attention_of_the_cache_and_of_the_projections() -> None:
    assert make_case(seqlen=5).work == 4 * 8 * 4 * (1 + 2 + 3 + 4 + 5)
    assert make_case("decode", 5, "bfloat16").work == 2 * 5 * 2 * 8 * 2
    projections = 2 * 5 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    assert make_case("module", 5).work == make_case(seqlen=5).work + projections


def test_ratios_are_those_of_neighbours() -> None:
    assert samples.median_of_ratios([(1.0, 2.0), (10.0, 30.0), (1.0, 9.0)]) == 3.0
    order: list[str] = []
    timed = cpu_timing.alternating_pairs(lambda: order.append("A"), lambda: order.append("B"), 3)
    assert order == ["A", "B"] * 3
    assert len(timed) == 3


def test_pairs_within_a_budget() -> None:
    assert cpu_timing.pairs_within(100.0, 1.0, 9) == 9
    assert cpu_timing.pairs_within(5.0, 1.0, 9) == 5
    assert cpu_timing.pairs_within(2.9, 1.0, 9) == 0, "below three pairs a median says little"
    assert cpu_timing.pairs_within(2.9, 1.0, 2) == 2, "unless no more were wanted"
    assert cpu_timing.pairs_within(100.0, 0.01, 9) == 30, "short calls get more"
    assert cpu_timing.pairs_within(100.0, 1e-6, 9) == 99


def test_task_limits_are_those_of_the_kernels() -> None:
    files = [ROOT / "csrc" / "dispatch" / "heuristics.h", *sorted((ROOT / "csrc" / "cpu").glob("simd_*.inc"))]
    sources = "".join(path.read_text() for path in files)
    for limit, name in [
        (cpu_ceilings.LEAST_TASK_ELEMENTS, "kCpuTaskElements"),
        (cpu_ceilings.MOST_TASK_ELEMENTS, "kCpuLargestTaskElements"),
        (cpu_ceilings.STRIP_ROWS, "kStripRows"),
        (cpu_ceilings.AMX_STRIP_ROWS, "kTileStrip"),
    ]:
        assert f" {name} = {limit};" in sources


def test_block_shapes_are_those_of_the_kernel(tmp_path: Path) -> None:
    require_cmake_and_compiler()
    shapes = [(group, head_dim) for group in (1, 2, 3, 4, 8, 40) for head_dim in (64, 80, 128, 256)]
    elements = (cpu_ceilings.LEAST_TASK_ELEMENTS, 50000, cpu_ceilings.MOST_TASK_ELEMENTS)
    limits = [(n, strip) for n in elements for strip in (cpu_ceilings.STRIP_ROWS, cpu_ceilings.AMX_STRIP_ROWS)]
    shapes = [(*shape, *limit) for shape in shapes for limit in limits]
    calls = "\n".join(f"  print(dca::cpu_tile_shape({', '.join(map(str, shape))}));" for shape in shapes)
    (tmp_path / "shapes.cpp").write_text(
        '#include <cstdio>\n#include "dispatch/heuristics.h"\n'
        'void print(dca::CpuTileShape s) { std::printf("%d\\n", s.block_m); }\n'
        f"int main() {{\n{calls}\n}}\n"
    )
    run_command("c++", "-std=c++17", "-I", ROOT / "csrc", tmp_path / "shapes.cpp", "-o", tmp_path / "shapes")
    told = run_command(tmp_path / "shapes").stdout.splitlines()
    ours = [str(cpu_ceilings.positions_per_tile(*shape)) for shape in shapes]
    assert told == ours


def test_cases_go_from_short_to_long_in_every_kind_shape_and_dtype() -> None:
    args = bench_cpu.parse(["--shape", "smollm2", "--prefill", "64", "16", "--decode", "--dtype", "float32", "float16"])
    assert [(case.kind, case.dtype, case.seqlen) for case in bench_cpu.cases(args)] == [
        *[("prefill", "float32", n) for n in (16, 64)],
        *[("prefill", "float16", n) for n in (16, 64)],
    ]
    full = bench_cpu.parse(["--full", "--dtype", "bfloat16"])
    assert full.shape == list(SHAPES)
    assert full.dtype == ["bfloat16"]
    assert max(case.seqlen for case in bench_cpu.cases(full)) == 32768
    assert bench_cpu.parse(["--memory"]).memory == bench_cpu.MEMORY_LENGTHS
    assert bench_cpu.parse([]).memory == []


def test_an_unknown_instruction_set_is_refused_before_anything_runs() -> None:
    command = [sys.executable, ROOT / "bench" / "bench_cpu.py", "--prefill", "64", "--decode"]
    result = subprocess.run(
        command, env={**os.environ, "DCA_CPU_ISA": "sse9"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "DCA_CPU_ISA=sse9" in result.stderr
    assert "avx2" in result.stderr or "portable" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_contenders_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench_cpu.parse(["--contenders", "jax"])
    assert "no name begins with 'jax'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--chunk-len", "99999999999"],
        ["--threads", str(10**20)],
        ["--budget", "nan"],
        ["--budget", "inf"],
        ["--budget", "-5"],
        ["--budget", "0"],
    ],
)
def test_numbers_out_of_bounds_are_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench_cpu.parse(options)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {options[0]}: must be " in said
    assert f"; got {options[1]}\n" in said


# --- Contenders compute what they are timed for -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seqlen", [1, 16, 17, 33, 61])
def test_composed_form_on_the_cpu_is_dual_chunk_attention(seqlen: int, dtype: str) -> None:
    x = Inputs(make_case(seqlen=seqlen, dtype=dtype))
    expected = reference.dca_attention(
        x.q, x.k_unrotated, x.v, x.cos, x.sin, DCAConfig(16, 19), out_dtype=torch.float64
    )
    out = cpu_contenders.composed(x).call()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["llama2-7b", "smollm2"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_all_contenders_agree_with_float64(kind: str, shape: str, dtype: str) -> None:
    run = cpu_runs.Run(cpu_runs.Limits())
    wrong = cpu_runs.check_contenders(Case(kind, shape, *SHAPES[shape], 4096, dtype, 2560), run)
    wrong.pop("dca_ext int8", None)  # a build without int8 caches refuses
    assert wrong == {}
    assert run.failures == []
    assert all(rate > 0 for rate in run.rates.values())


def test_reads_take_all_bytes_as_they_are() -> None:
    k, v = (torch.full((16,), value, dtype=torch.int64).view(torch.bfloat16) for value in (1, 2))
    ways = cpu_ceilings.reads(k, v)
    assert [int(x) for x in ways["sum of int64"]()] == [16, 32]
    assert [int(x) for x in ways["amax of int64"]()] == [1, 2]


def test_products_of_blocks_count_what_they_do() -> None:
    case = make_case()
    call, flop = cpu_ceilings.block_products(case, 3, torch.bfloat16)
    call()
    assert flop == 3 * 4 * cpu_ceilings.rows_per_tile(case) * 128 * 8


# --- What is left out -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_into_memory_or_time_is_left_out_with_its_reason() -> None:
    case = Case("prefill", "llama3-8b", *SHAPES["llama3-8b"], 32768, "float32", 2560)
    run = cpu_runs.Run(cpu_runs.Limits(budget_s=60.0, memory_bytes=lambda: 20.0 * 2**30))
    run.wrong["prefill", "llama3-8b", "float32"] = {"composed": "off by 1.00e+00"}
    run.rates["prefill", "llama3-8b", "float32", "torch sdpa"] = case.work / 100.0
    by_name = {contender.name: contender for contender in run.contenders("prefill")}
    reasons = {name: cpu_runs.reason_to_skip(case, contender, run) for name, contender in by_name.items()}
    assert reasons["transformers eager"].startswith("needs about 26")
    assert reasons["transformers eager"].endswith("GiB more, 20.0 GiB are free")
    assert reasons["torch sdpa"] == "a call would take about 100 s at its rate so far (--budget 60)"
    assert reasons["composed"] == "off by 1.00e+00"
    assert reasons["dca_ext"] == reasons["torch sdpa gqa"] == ""
    equal = Case("prefill", "llama2-7b", *SHAPES["llama2-7b"], 1024, "float32", 2560)
    run.wrong["prefill", "llama2-7b", "float32"] = {}
    assert "the same call as torch sdpa" in cpu_runs.reason_to_skip(equal, by_name["torch sdpa gqa"], run)


def test_too_little_memory_leaves_out_the_case() -> None:
    run = cpu_runs.Run(cpu_runs.Limits(memory_bytes=lambda: 1.0))
    cpu_runs.run_case(make_case(), run)
    assert [(r["contender"], "are free" in r["skipped"]) for r in run.rows] == [("dca_ext", True)]


def test_a_call_beyond_the_budget_is_left_out_after_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runs, "seconds_of", lambda call: (call(), 10.0)[1])
    run = cpu_runs.Run(cpu_runs.Limits(budget_s=30.0), names=["torch sdpa"])
    cpu_runs.run_case(make_case(), run)
    rows = {r["contender"]: r for r in run.rows}
    assert rows["torch sdpa"]["skipped"] == "a pair of calls takes about 20.0 s: too few fit into --budget 30"
    assert rows["K pass"]["calls"] == 3
    assert rows["dca_ext"]["calls"] == 3, "ours is timed alone where no pair fits"


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contender("torch wrong", lambda x: Prepared(lambda: x.q * 2))
    ours = cpu_contenders.CONTENDERS["prefill"][0]
    monkeypatch.setitem(cpu_contenders.CONTENDERS, "prefill", [ours, wrong])
    run = cpu_runs.Run(cpu_runs.Limits())
    cpu_runs.run_case(make_case(), run)
    assert [("rate" in r, r["contender"]) for r in run.rows] == [(True, "dca_ext"), (False, "torch wrong")]
    assert "torch wrong: off by" in run.failures[0]


# --- Reporting --------------------------------------------------------------------------------------------------------

ROWS = [
    row("dca_ext", "ours", median_ms=2.0, p10_ms=1.0, p90_ms=3.0, rate=100e9, calls=27),
    row("torch sdpa", median_ms=3.0, p10_ms=3.0, p90_ms=3.0, rate=66e9, pairs=9, speedup=1.5),
    row("torch sdpa gqa", median_ms=2.5, p10_ms=2.5, p90_ms=2.5, rate=80e9, pairs=5, speedup=1.25, note="as they are"),
    row("transformers eager", skipped="needs about 137.0 GiB more, 20.0 GiB are free"),
    row("bmm of the blocks", "ceiling", median_ms=9, p10_ms=9, p90_ms=9, rate=125e9, pairs=9, percent_of_ceiling=80.0),
]


def test_tables_say_what_was_measured_and_why_the_rest_was_not() -> None:
    lines = cpu_report.contender_table(ROWS).splitlines()
    assert lines[0] == "prefill, tiny 4/2 d8 float32, chunk_len 16"
    assert lines[3].split() == ["4k", "dca_ext", "2", "1", "3", "100", "-", "-", "27"]
    assert lines[5].split()[-3:] == ["1.25", "-", "5"]
    assert lines[6].split()[3:] == ["-"] * 7
    assert lines[7].split()[-4:] == ["-", "80", "%", "9"]
    assert "  torch sdpa gqa: as they are" in lines
    assert lines[-1] == "  transformers eager left out at 4k: needs about 137.0 GiB more, 20.0 GiB are free"


def test_summary_names_the_best_rival_and_the_share_of_the_ceiling() -> None:
    line = cpu_report.summary_table(ROWS).splitlines()[2].split()
    assert line[-9:] == ["GFLOP/s", "1.25", "-", "-", "sdpa", "gqa", "80", "%", "5"]
    report = cpu_report.report(ROWS, [])
    assert cpu_report.DIRECTION in report
    assert cpu_report.report([], []) == "nothing was measured"


def test_plot_writes_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    decode = [{**r, "kind": "decode", "unit": "B"} for r in ROWS]
    cpu_plot.save_plot([*ROWS, *decode], "a machine", tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 10000
    cpu_plot.save_plot([], "a machine", tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        bench_cpu.parse(["--plot", "cpu.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


# --- Where results go -------------------------------------------------------------------------------------------------


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "real.json")
    for n in (1, 2):
        benchmark_results.write_json({"n": n}, tmp_path / "link.json")
        assert json.loads((tmp_path / "there" / "real.json").read_text()) == {"n": n}
        assert (tmp_path / "link.json").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["real.json"]


def test_a_pipe_stays_and_is_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        benchmark_results.write_json({"n": 1}, benchmark_results.output_file(str(pipe)))
        assert json.loads(os.read(reader, 100)) == {"n": 1}
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        benchmark_results.write_json({}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parse", [bench_cpu.parse, attention_share.parse, cache_steps.parse, instructions.parse])
def test_an_unusable_json_file_is_refused_before_anything_runs(
    parse: Callable[[list[str]], object], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for place, words in [(tmp_path / "none" / "a.json", "folder that exists"), (tmp_path, "must be a file")]:
        with pytest.raises(SystemExit) as exit_:
            parse(["--json", str(place)])
        assert exit_.value.code == 2
        assert f"{words}; got {place}" in capsys.readouterr().err.replace("the folder ", "")


def test_a_picture_needs_a_suffix_that_matplotlib_knows(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    for name in ("cpu", "cpu.json", "none/cpu.png"):
        with pytest.raises(SystemExit):
            bench_cpu.parse(["--plot", name])
        assert f"got {name}" in capsys.readouterr().err
    assert bench_cpu.parse(["--plot", "cpu.PNG"]).plot == Path("cpu.PNG")


# --- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_cpu.SHAPES, "smollm2", (4, 2, 16))
    monkeypatch.setattr(cpu_ceilings, "KEYS_PER_BLOCK", 16)


TINY = ["--shape=smollm2", "--prefill", "40", "--decode", "50", "--chunk-len", "16", "--pairs=1", "--json=cpu.json"]


@pytest.mark.usefixtures("_tiny_shape")
def test_a_whole_run(capsys: pytest.CaptureFixture) -> None:
    assert bench_cpu.main([*TINY, "--module", "24", "--memory", "64"]) == 0
    results = json.loads(Path("cpu.json").read_text())
    assert {"machine", "features", "torch", "build", "threads", "date", "commit", "direction"} <= set(results)
    assert results["build"]["cpu_isa"]
    rows = {(r["kind"], r["contender"]): r for r in results["rows"]}
    for kind, name in [("prefill", "composed"), ("decode", "torch bmm"), ("module", "transformers sdpa")]:
        assert len(rows[kind, name]["samples_s"]) == len(rows[kind, name]["ours_samples_s"]) > 0
        assert rows[kind, name]["speedup"] > 0
    assert rows["prefill", "bmm of the blocks"]["percent_of_ceiling"] > 0
    assert rows["decode", "read of K and V"]["note"]
    assert "speedup" not in rows["prefill", "K pass"]
    assert rows["prefill", "dca_ext"]["kernel"].startswith("cpu/")
    assert [r["contender"] for r in results["rows"]].count("dca_ext") == 3
    assert results["memory"][0]["out_and_rotated_k_mib"] > 0
    said = capsys.readouterr().out
    assert said.startswith(results["machine"])
    assert "memory of one prefill" in said


@pytest.mark.usefixtures("_tiny_shape")
def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    whole = cpu_runs.CaseRun.row

    def interrupted(case_run: cpu_runs.CaseRun, contender: Contender) -> dict:
        if contender.name == "composed":
            raise KeyboardInterrupt
        return whole(case_run, contender)

    monkeypatch.setattr(cpu_runs.CaseRun, "row", interrupted)
    assert bench_cpu.main(TINY) == 130
    names = [r["contender"] for r in json.loads(Path("cpu.json").read_text())["rows"]]
    assert names[0] == "dca_ext"
    assert names[-1] == "transformers eager"
    assert "torch sdpa" in capsys.readouterr().out


# --- Instructions -----------------------------------------------------------------------------------------------------


def test_instructions_are_counted_once_per_kind_of_kv_head() -> None:
    args = instructions.parse(["--prefill", "64", "--decode", "128", "--dtype", "fp32"])
    found = [(c.operation, c.group, c.head_dim, c.cache_dtype) for c in instructions.counts(args)]
    heads = [(1, 128), (4, 128), (4, 64), (3, 64)]
    assert found[:4] == [("prefill", *head, "same") for head in heads]
    assert found[4:6] == [("decode", 1, 128, "same"), ("decode", 1, 128, "e4m3")]
    assert "--cache-dtype=e4m3" in list(instructions.counts(args))[5].arguments()


def test_a_missing_tool_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert instructions.main(["--build", str(tmp_path)]) == 2
    assert "-DDCA_BUILD_BENCH=ON" in capsys.readouterr().err
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main(["--build", str(tmp_path)]) == 2
    assert "apt-get install valgrind" in capsys.readouterr().err


def test_counts_come_from_callgrinds_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def callgrind(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        options = dict(part.split("=", 1) for part in command if part.startswith("--") and "=" in part)
        Path(options["--callgrind-out-file"]).write_text("events: Ir\nsummary: 500\n\ntotals: 500\n")
        Path(options["--json"]).write_text(json.dumps({"kernel": env["DCA_CPU_ISA"], "work": 4000, "work_unit": "B"}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(instructions, "find_binary", lambda build: build / "dca_bench")
    monkeypatch.setattr(instructions.subprocess, "run", callgrind)
    monkeypatch.setattr(instructions, "commit", lambda: "abc")
    assert instructions.main(["--shape=smollm2", "--prefill", "--dtype=fp32", "--json=counts.json"]) == 0
    results = json.loads(Path("counts.json").read_text())
    assert [r["instructions_per_unit"] for r in results["rows"]] == [0.125, 0.125]
    assert "0.1250 per byte" in capsys.readouterr().out
    with pytest.raises(instructions.CannotCountError, match="counted nothing"):
        instructions.instructions_of("summary: 0\n")


# --- The share of attention -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_llama() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_share_of_attention_in_a_tiny_model(
    tiny_llama: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    samples: attention_share.Samples = {}
    attention_share.measure(tiny_llama, torch.randint(32, (1, 20)), 2, lambda name: None, samples)
    rows = [attention_share.summary(name, taken) for name, taken in samples.items()]
    assert [r["model"] for r in rows] == ["plain, sdpa", "DCA"]
    for r in rows:
        assert 0 < r["attention_s"] < r["total_s"]
        assert 0 < r["attention_percent"] < 100
        assert len(r["samples"]) == 2
    assert attention_share.table(rows).splitlines()[2].startswith("plain, sdpa")
    assert attention_share.main(["--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err


def test_ctrl_c_keeps_finished_repeats(
    tiny_llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, passes = attention_share.forward_once, []

    def interrupted(*args: Any) -> dict[str, float]:
        passes.append(args)
        if len(passes) == 6:  # two to warm up, two of the first repeat, then the plain model's second
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(attention_share, "forward_once", interrupted)
    monkeypatch.setattr(attention_share.models, "load_model", lambda *_, **__: (tiny_llama, None))
    assert attention_share.main(["--tokens=20", "--repeats=9", "--json=share.json"]) == 130
    rows = json.loads(Path("share.json").read_text())["rows"]
    assert [(r["model"], len(r["samples"])) for r in rows] == [("plain, sdpa", 2), ("DCA", 1)]
    assert "plain, sdpa" in capsys.readouterr().out


# --- Steps over caches -----------------------------------------------------------------------------------------------


def test_steps_over_each_cache_of_a_tiny_model(
    tiny_llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cache_steps.models, "load_model", lambda *_, **__: (tiny_llama, None))
    assert cache_steps.main(["--tokens=40", "--steps=3", "--json=steps.json"]) == 0
    rows = {row["cache"]: row for row in json.loads(Path("steps.json").read_text())["rows"]}
    assert next(iter(rows)) == "plain, DynamicCache"
    assert all(len(row["samples_s"]) == 3 and min(row["samples_s"]) > 0 for row in rows.values())
    tokens = 40 + cache_steps.WARM_UP + 1  # when the first sample is taken
    exact = 2 * 2 * tokens * 32 * 4 / 2**20
    assert rows["DCA, DynamicCache"]["held_mib"] == pytest.approx(exact)
    assert rows["DCA, DCACache"]["held_mib"] == pytest.approx(exact)
    assert rows["DCA, DCACache, float8_e4m3fn"]["held_mib"] == pytest.approx(exact / 4, rel=0.02)
    assert rows["DCA, DCACache, int8"]["held_mib"] == pytest.approx(exact * (8 + 4) / 32)
    assert "DCA, StaticCache" in capsys.readouterr().out


def test_steps_of_a_model_of_random_weights(
    tiny_llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = {name: getattr(tiny_llama.config, name) for name in cache_steps.SHAPES["smollm2"]}
    monkeypatch.setitem(cache_steps.SHAPES, "smollm2", small)
    assert (
        cache_steps.main(["--tokens=20", "--steps=1", "--random=smollm2", "--dtype=bfloat16", "--json=steps.json"]) == 0
    )
    results = json.loads(Path("steps.json").read_text())
    assert results["rows"][0]["held_mib"] == 2 * 2 * (20 + cache_steps.WARM_UP + 1) * 32 * 2 / 2**20
    assert "smollm2, random weights, behind 20 tokens, bfloat16" in capsys.readouterr().out


def test_steps_end_with_a_sentence_or_with_what_was_measured(
    tiny_llama: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert cache_steps.main(["--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    whole, passes = cache_steps.seconds_of_pass, []

    def interrupted(*args: Any) -> float:
        passes.append(args)
        if len(passes) == 6 + 6 * cache_steps.WARM_UP + 4:  # six caches read, warm up, and three take a step
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(cache_steps, "seconds_of_pass", interrupted)
    monkeypatch.setattr(cache_steps.models, "load_model", lambda *_, **__: (tiny_llama, None))
    assert cache_steps.main(["--tokens=20", "--steps=9"]) == 130
    assert "DCA, StaticCache" in (printed := capsys.readouterr().out)
    assert "DCACache" not in printed
