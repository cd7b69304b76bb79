"""What the CUDA benchmark counts, composes and prints, without a CUDA device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cpp_build import ROOT
from torch import Tensor

import dca_ext
from dca_ext import DCAConfig, reference

sys.path.insert(0, str(ROOT / "bench"))
import attention_cases
import attention_report
import bench_attention
import benchmark_results
import composed_attention
import geometries
import samples

CONFIG = DCAConfig(16, 20)


def make_inputs(seqlen: int, heads: int = 4, kv_heads: int = 2) -> attention_cases.Inputs:
    """A prefill case of the small geometry, two sequences."""
    case = attention_cases.Case("prefill", "tiny", heads, kv_heads, 8, 2, seqlen, CONFIG.chunk_len)
    return attention_cases.make_inputs(case, CONFIG, torch.float32)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cases, "DEVICE", "cpu")


# --- The composed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 32, 33, 48, 61])
def test_composed_form_is_dual_chunk_attention(seqlen: int) -> None:
    x = make_inputs(seqlen)
    expected = reference.dca_attention_with_kvcache(
        x.q, x.k, x.v, x.cos, x.sin, CONFIG, cache_seqlens=seqlen, out_dtype=torch.float64
    )
    for attend in (composed_attention.exact_attend, composed_attention.per_head(composed_attention.exact_attend)):
        out = composed_attention.composed_attention(
            x.q_rotated, x.k, x.v, CONFIG, attend, composed_attention.merge_in_torch
        )
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_composed_form_takes_the_librarys_merge() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = composed_attention.exact_attend(q, k, v, causal)
        return out.float(), lse.float()

    x = make_inputs(61)
    forms = [
        composed_attention.composed_attention(x.q_rotated, x.k, x.v, CONFIG, attend, merge)
        for merge in (composed_attention.merge_in_torch, attention_cases.merge_fused)
    ]
    torch.testing.assert_close(forms[1], forms[0], rtol=0, atol=1e-6)


def test_queries_are_rotated_in_float32_and_rounded_once() -> None:
    x = make_inputs(40)
    rotated = composed_attention.rotated_queries(x.q.bfloat16(), x.cos, x.sin, CONFIG)
    assert set(rotated) == set(reference.SEGMENTS)
    positions = torch.arange(40) % CONFIG.chunk_len
    exact = reference.rope(x.q.bfloat16().float(), positions, x.cos, x.sin)
    assert torch.equal(rotated["intra"], exact.bfloat16())


# --- Counting ---------------------------------------------------------------------------------------------------------


def test_work_is_that_of_causal_attention_and_the_bytes_of_the_cache() -> None:
    prefill = attention_cases.Case("prefill", "tiny", 6, 2, 16, 3, 5, 2)
    assert prefill.work == 4 * 16 * 6 * 3 * (1 + 2 + 3 + 4 + 5)
    decode = attention_cases.Case("decode", "tiny", 6, 2, 16, 3, 5, 2)
    assert decode.work == 3 * 5 * 2 * 16 * 2 * 2
    assert decode.bytes_needed(repeated_kv=True) > decode.bytes_needed(repeated_kv=False) >= decode.work


def test_geometries_of_the_default_chunk_lengths() -> None:
    assert list(geometries.CONFIGS) == [2560, 6144, 81920]
    assert geometries.config_for(2560) == DCAConfig(2560, 3072)
    assert geometries.config_for(100) == DCAConfig(100, 120)
    assert geometries.config_for(1) == DCAConfig(1, 1)


def test_cases_stay_within_their_bounds() -> None:
    args = bench_attention.parse([])
    prefill, decode = list(bench_attention.prefill_cases(args)), list(bench_attention.decode_cases(args))
    assert {case.chunk_len for case in prefill} == {2560, 6144, 81920}
    assert all(case.seqlen > case.chunk_len for case in prefill)
    assert max(case.batch * case.seqlen for case in decode) == 4 * 2**20
    quick = bench_attention.parse(["--quick", "--lengths", "8192"])
    assert [case.seqlen for case in bench_attention.prefill_cases(quick)] == [8192]
    assert quick.limit < 180


def test_quantiles_lie_between_neighbours() -> None:
    assert samples.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert samples.quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)


def test_an_error_counts_in_norm_and_nan_never_passes() -> None:
    exact = torch.randn(1, 10000, 2, 4)
    assert bench_attention.relative_error(exact * 1.01, exact) == pytest.approx(0.01, rel=1e-3)
    assert not bench_attention.relative_error(exact.masked_fill(exact == exact[0, 0, 0, 0], torch.nan), exact) <= 1e9


# --- Reporting --------------------------------------------------------------------------------------------------------


def test_table_columns_are_as_wide_as_their_widest_cell() -> None:
    text = benchmark_results.format_table(["what", "n"], [["long name", "1"], ["x", "1000"]])
    assert text.splitlines() == ["what          n", "---------  ----", "long name     1", "x          1000"]


def test_results_name_no_folders_of_the_machine(tmp_path: Path) -> None:
    inside = benchmark_results.ROOT / "bench" / "bench_cpu.py"
    said = [str(inside), "--json", str(tmp_path / "a.json"), f"--plot={tmp_path / 'a.png'}", "--pairs", "9"]
    published = benchmark_results.command_line(said)
    assert published == ["bench/bench_cpu.py", "--json", "a.json", "--plot=a.png", "--pairs", "9"]


def test_tables_hold_a_dash_where_nothing_was_measured() -> None:
    case = {"kind": "prefill", "shape": "tiny", "head_dim": 8, "seqlen": 4096, "chunk_len": 16, "work": 1.0}
    rows = [
        {**case, "contender": "dca_ext", "rate": 3e12, "rotate_keys_ms": 0.5},
        {**case, "contender": "torch flash", "rate": 2e12},
        {**case, "contender": "composed", "skipped": "no memory"},
    ]
    assert attention_report.tables(rows).splitlines()[2].split() == [
        *("tiny", "d8", "4k", "n16", "3.0", "2.0", "-", "1.50", "-", "0.500")
    ]
    decode = {**case, "kind": "decode", "batch": 2, "work": 2.0**21, "contender": "dca_ext", "skipped": "no memory"}
    assert attention_report.tables([decode]).splitlines()[2].split() == [
        "tiny",
        "d8",
        "2",
        "x",
        "4k",
        "2",
        "-",
        "-",
        "-",
        "-",
    ]


def test_a_cache_of_e4m3_is_rated_by_its_own_bytes_and_compared_by_time() -> None:
    case = {"kind": "decode", "shape": "tiny", "head_dim": 8, "batch": 1, "seqlen": 4096, "chunk_len": 16}
    rows = [
        {**case, "contender": "dca_ext e4m3", "work": 2.0**20, "rate": 5e11, "median_ms": 1.5},
        {**case, "contender": "dca_ext", "work": 2.0**21, "rate": 6e11, "median_ms": 2.7, "percent_of_ceiling": 60.0},
    ]
    line = attention_report.tables(rows).splitlines()[2].split()
    assert line == ["tiny", "d8", "1", "x", "4k", "2", "500", "600", "60.0", "-", "1.80"]


def test_refuses_in_one_sentence_without_a_device(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_attention.py"])
    assert bench_attention.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "needs a CUDA device" in said.err
    assert said.err.count("\n") == 1


# --- A whole run, with the CPU in the device's place ------------------------------------------------------------------


class Clock:
    """Takes the place of the flush, and of the device's clock."""

    buffer = torch.zeros(4)

    def __call__(self) -> None:
        """Nothing to flush."""


@pytest.fixture
def _cpu_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(calls: dict, rounds: int, flush: object) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1e-3] * rounds for name in calls}

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = composed_attention.exact_attend(q, k, v, causal)
        return out.to(q.dtype), lse.float()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 2**30, 8 * 2**30))
    monkeypatch.setattr(dca_ext, "build_info", lambda: {"cuda_architectures": ["80"]})
    monkeypatch.setattr(bench_attention, "CacheFlush", Clock)
    monkeypatch.setattr(bench_attention, "alternating_seconds", seconds)
    monkeypatch.setattr(bench_attention, "rounds_for", lambda calls, flush, **_: 3)
    monkeypatch.setattr(bench_attention, "as_graph", lambda call: call)
    monkeypatch.setattr(bench_attention, "copy_bandwidth", lambda: (1e12, 2**32))
    monkeypatch.setattr(bench_attention, "matmul_rate", lambda dtype: 1e14)
    monkeypatch.setattr(bench_attention, "device_facts", lambda: {"device": "a CPU"})
    monkeypatch.setattr(attention_cases, "flash_attend", attend)
    monkeypatch.setattr(bench_attention, "SHAPES", {"llama3-8b": (4, 2)})


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    options = ["--shapes=llama3-8b", "--head-dims=16", "--chunk-lens=32", f"--out={out}", *arguments]
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *options])
    return bench_attention.main()


SMALL = ["--lengths", "16", "40", "100", "--decode-batches=2", "--decode-lengths", "128", str(2**22)]


@pytest.mark.usefixtures("_cpu_for_a_device")
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("DCA_COMMIT", "abc")
    assert run(monkeypatch, tmp_path, *SMALL) == 0
    results = json.loads((tmp_path / "attention.json").read_text())
    assert results["commit"] == "abc"
    assert results["failures"] == []
    rows = {(row["kind"], row["seqlen"], row["contender"]): row for row in results["rows"]}
    assert {kind_and_length[:2] for kind_and_length in rows} == {("prefill", 40), ("prefill", 100), ("decode", 128)}
    for name in ("dca_ext", "composed", "composed, our merge", "composed per head"):
        assert rows["prefill", 100, name]["rate"] == pytest.approx(4 * 16 * 4 * 5050 / 1e-3)
    assert rows["prefill", 100, "dca_ext"]["rotate_keys_ms"] == pytest.approx(1.0)
    assert rows["prefill", 100, "dca_ext"]["difference_to_composed"] < 1e-2
    assert rows["decode", 128, "dca_ext paged"]["percent_of_ceiling"] > 0
    assert rows["decode", 128, "dca_ext"]["rate"] == 2 * rows["decode", 128, "dca_ext e4m3"]["rate"], "of equal times"
    said = capsys.readouterr().out
    assert "dca_ext, dca_ext paged, dca_ext e4m3" in said, "compared with float64 first"
    assert "torch cudnn takes no part: " in said
    assert said.rstrip().endswith(attention_report.tables(results["rows"]).splitlines()[-1])
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".txt"}
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.usefixtures("_cpu_for_a_device")
def test_other_kernels_take_part_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str | None] = []
    attend = attention_cases.dca_attention_with_kvcache

    def noted(*args: object, **kwargs: object) -> object:
        names.append(os.environ.get("DCA_CUDA_KERNELS"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention_cases, "dca_attention_with_kvcache", noted)
    monkeypatch.delenv("DCA_CUDA_KERNELS", raising=False)
    assert run(monkeypatch, tmp_path, *SMALL, "--kernels", "sm80", "sm90:three_consumers") == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    of_kind = {kind: {row["contender"] for row in rows if row["kind"] == kind} for kind in ("prefill", "decode")}
    assert {"dca_ext", "dca_ext sm80", "dca_ext sm90:three_consumers"} <= of_kind["prefill"]
    assert "dca_ext sm80" in of_kind["decode"]
    assert "dca_ext sm90:three_consumers" not in of_kind["decode"], "variants are kernels of prefill"
    assert set(names) == {None, "sm80", "sm90:three_consumers"}
    assert "DCA_CUDA_KERNELS" not in os.environ


@pytest.mark.usefixtures("_cpu_for_a_device")
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench_attention.run_case

    def interrupted(case: attention_cases.Case, state: bench_attention.Run) -> list[attention_report.Row]:
        if case.seqlen == 100:
            raise KeyboardInterrupt
        return whole(case, state)

    monkeypatch.setattr(bench_attention, "run_case", interrupted)
    assert run(monkeypatch, tmp_path, *SMALL) == 130
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {row["seqlen"] for row in rows} == {40}


@pytest.mark.usefixtures("_cpu_for_a_device")
def test_a_file_is_no_folder_for_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert run(monkeypatch, tmp_path / "file", *SMALL) == 2
    assert f"--out must be a folder or become one; got {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.usefixtures("_cpu_for_a_device")
def test_what_does_not_fit_is_skipped_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    assert run(monkeypatch, tmp_path, *SMALL) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert all("are free" in row["skipped"] and "rate" not in row for row in rows)


@pytest.mark.usefixtures("_cpu_for_a_device")
def test_a_wrong_result_is_never_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = attention_cases.dca_attention_with_kvcache
    monkeypatch.setattr(attention_cases, "dca_attention_with_kvcache", lambda *a, **k: 1.1 * right(*a, **k))
    assert run(monkeypatch, tmp_path, *SMALL) == 1
    results = json.loads((tmp_path / "attention.json").read_text())
    assert not [row for row in results["rows"] if row["contender"].startswith("dca_ext")]
    assert any("dca_ext e4m3: off by" in failure for failure in results["failures"])
    assert any("dca_ext: off by 1.00e-01" in failure for failure in results["failures"])
    assert "WRONG: " in capsys.readouterr().out
