"""The operators and the modules on a CUDA device: `pytest -m gpu`. The kernels alone: test_cuda_suite.py."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from oracle import (
    E4M3,
    SMALL,
    Cache,
    assert_close,
    attend_in_low_precision,
    baseline_attention,
    empty_cache,
    ragged_borders,
    random_rows,
    tables,
)
from test_torch_integration import DIM, operator_calls
from tiny_models import logits, tiny_config, tokens

import dca_ext
from dca_ext import (
    DCACache,
    DCAConfig,
    dca_attention,
    dca_attention_varlen,
    dca_attention_with_kvcache,
    dca_segment_attention,
    kv_cache_scale,
    merge_attention_states,
    reference,
    rotate_and_append_kv,
    rotate_keys,
)
from dca_ext.patch import replace_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not dca_ext.build_info()["cuda_architectures"], reason="built without CUDA kernels"),
]

DTYPES = (torch.bfloat16, torch.float16)


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to("cuda") for tensor in tensors]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_equals_the_reference(dtype, head_dim):
    cos, sin = tables(SMALL, head_dim)
    q, k, v = (random_rows(2, 131, heads, head_dim, dtype=dtype) for heads in (8, 2, 2))
    out = dca_attention(*on_gpu(q, k, v, cos, sin), SMALL)
    exact = reference.dca_attention(q.double(), k.double(), v.double(), cos, sin, SMALL)
    assert_close(out.cpu(), exact, baseline_attention(q, k, v, cos, sin, SMALL))


@pytest.mark.parametrize("seqlen_q", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_equals_the_reference(dtype, seqlen_q):
    cos, sin = tables(SMALL, 64)
    q = random_rows(2, seqlen_q, 8, 64, dtype=dtype)
    k, v = (random_rows(2, 300, 2, 64, dtype=dtype).contiguous() for _ in range(2))
    lengths = torch.tensor([300, 97], dtype=torch.int32)
    out = dca_attention_with_kvcache(*on_gpu(q, k, v, cos, sin), SMALL, cache_seqlens=lengths.cuda()).cpu()
    for b, length in enumerate(lengths.tolist()):
        positions = torch.arange(length - seqlen_q, length)
        cache = (k[b : b + 1, :length], v[b : b + 1, :length])
        exact = reference.dca_attention_with_kvcache(
            q[b : b + 1].double(), *(t.double() for t in cache), cos, sin, SMALL, cache_seqlens=length
        )
        baseline = attend_in_low_precision(q[b], cache[0][0], cache[1][0], positions, cos, sin, SMALL, 64**-0.5)
        assert_close(out[b], exact[0], baseline)


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float8_cache_gives_what_it_gives_on_the_cpu(dtype, seqlen_q):
    cos, sin = tables(SMALL, 64)
    q, k, v = (random_rows(2, 300, heads, 64, dtype=dtype) for heads in (8, 2, 2))
    outs = []
    for device in ("cuda", "cpu"):
        caches = [torch.zeros(2, 300, 2, 64, device=device).to(E4M3) for _ in range(2)]
        tensors = [x.to(device) for x in (q[:, -seqlen_q:], *caches, cos, sin)]
        scales = {name: kv_cache_scale(x).to(device) for name, x in (("k_scale", k), ("v_scale", v))}
        rotate_and_append_kv(k.to(device), v.to(device), *tensors[1:], SMALL, cache_seqlens=0, **scales)
        out = dca_attention_with_kvcache(*tensors, SMALL, cache_seqlens=300, **scales)
        outs.append(out.float().cpu())
    torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)


def test_ragged_sequences_equal_the_reference():
    lengths, (cos, sin) = (1, 40, 41, 97), tables(SMALL, 64)
    q, k, v = (random_rows(sum(lengths), heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    borders = ragged_borders(*lengths)
    out = dca_attention_varlen(*on_gpu(q, k, v, borders), max(lengths), *on_gpu(cos, sin), SMALL).cpu()
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        rows = [x[None, begin:end] for x in (q, k, v)]
        exact = reference.dca_attention(*(x.double() for x in rows), cos, sin, SMALL)
        assert_close(out[None, begin:end], exact, baseline_attention(*rows, cos, sin, SMALL))


@pytest.mark.parametrize("page_size", [None, 16])
def test_appending_to_a_poisoned_cache_gives_what_it_gives_on_the_cpu(page_size):
    """Prefill and decode in one ragged batch, the second sequence left-padded; what no token owns is NaN."""
    cos, sin = tables(SMALL, 64)
    cache = empty_cache(2, 100, 2, 64, torch.bfloat16, page_size=page_size)
    before = [torch.randn(2, 60, 2, 64).bfloat16() for _ in range(2)]
    q, k, v = (torch.randn(38, heads, 64).bfloat16() for heads in (8, 2, 2))
    results = []
    for device in ("cuda", "cpu"):
        there = Cache(*(None if x is None else x.to(device, copy=True) for x in (cache.k, cache.v, cache.page_table)))
        rotary = (cos.to(device), sin.to(device))
        padding = torch.tensor([0, 9], dtype=torch.int32, device=device)
        old = [x.to(device) for x in before]
        rotate_and_append_kv(
            *old, there.k, there.v, *rotary, SMALL, cache_seqlens=0, cache_leftpad=padding, **there.layout
        )
        out, lse = dca_attention_with_kvcache(
            *(q.to(device), there.k, there.v, *rotary, SMALL),
            k=k.to(device),
            v=v.to(device),
            cache_seqlens=torch.tensor([60, 60], dtype=torch.int32, device=device),
            cu_seqlens_q=ragged_borders(37, 1).to(device),
            max_seqlen_q=37,
            cache_leftpad=padding,
            return_lse=True,
            **there.layout,
        )
        results.append([x.float().cpu() for x in (out, lse, there.k, there.v)])
    assert not results[0][0].isnan().any()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2, equal_nan=True)


def test_segments_merge_to_the_whole():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(random_rows(1, 130, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)))
    k = rotate_keys(k, cos, sin, SMALL)
    whole = dca_attention_with_kvcache(q, k, v, cos, sin, SMALL, cache_seqlens=130)
    parts = [
        dca_segment_attention(q, k, v, cos, sin, SMALL, segment=segment, cache_seqlens=130)
        for segment in reference.SEGMENTS
    ]
    merged, _ = merge_attention_states([out for out, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(merged.float(), whole.float(), atol=2e-2, rtol=2e-2)


def test_other_streams_are_respected():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(random_rows(1, 512, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)))
    expected = dca_attention(q, k, v, cos, sin, SMALL)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        out = dca_attention(late, k, v, cos, sin, SMALL)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_a_captured_graph_serves_every_length():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(torch.randn(2, n, heads, 64).bfloat16() for n, heads in ((1, 8), (600, 2), (600, 2))))
    lengths = torch.full((2,), 600, dtype=torch.int32, device="cuda")

    def decode():
        return dca_attention_with_kvcache(q, k, v, cos, sin, SMALL, cache_seqlens=lengths)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    for length in (600, 1, 40, 41, 333):
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(captured, decode())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_synchronisation():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(torch.randn(1, 64, heads, 64).bfloat16() for heads in (8, 2, 2)))
    lengths = torch.tensor([64], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        dca_attention_with_kvcache(q, k, v, cos, sin, SMALL, cache_seqlens=lengths)
        dca_attention(q, k, v, cos, sin, SMALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_appends_wherever_the_lengths_say():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(torch.randn(2, 1, heads, 64).bfloat16() for heads in (8, 2, 2)))
    caches = [torch.zeros(2, 600, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")

    def decode(caches):
        return dca_attention_with_kvcache(q, *caches, cos, sin, SMALL, k=k, v=v, cache_seqlens=lengths)

    decode(caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(caches)
    others = [cache.clone() for cache in caches]
    for length in (1, 2, 39, 40, 333):
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(captured, decode(others))
        assert all(map(torch.equal, caches, others))


def test_memory_is_that_of_the_results_and_one_copy_of_the_keys():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(torch.randn(1, 4096, heads, 64).bfloat16() for heads in (8, 2, 2)))

    def extra(call):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    rounding = 4 * 512  # torch hands memory out in units of 512 bytes
    whole = extra(lambda: dca_attention(q, k, v, cos, sin, SMALL))
    assert q.nbytes + k.nbytes <= whole <= q.nbytes + k.nbytes + rounding
    cached = extra(lambda: dca_attention_with_kvcache(q, k, v, cos, sin, SMALL, cache_seqlens=4096, num_splits=1))
    assert q.nbytes <= cached <= q.nbytes + rounding


@pytest.mark.parametrize(
    ("op", "arguments"),
    [pytest.param(op, args, id=name) for name, op, args in operator_calls() if "int8" not in name],
)
def test_opcheck(op, arguments):
    def to_gpu(x):
        if isinstance(x, list):
            return [to_gpu(y) for y in x]
        if not isinstance(x, torch.Tensor):
            return x
        rows = x.is_floating_point() and x.dim() >= 3 and x.shape[-1] == DIM  # of q, k, v and caches
        return x.to("cuda", torch.bfloat16) if rows else x.to("cuda", copy=True)

    torch.library.opcheck(op.default, tuple(map(to_gpu, arguments)))


def test_compiles_to_one_graph():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(torch.randn(1, 100, heads, 64).bfloat16() for heads in (8, 2, 2)))
    compiled = torch.compile(lambda *tensors: dca_attention(*tensors, SMALL) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v, cos, sin), dca_attention(q, k, v, cos, sin, SMALL) * 2)


def test_refusals_name_the_argument():
    cos, sin = on_gpu(*tables(SMALL, 64))
    q, k, v = on_gpu(*(torch.randn(1, 9, 2, 64) for _ in range(3)))
    with pytest.raises(ValueError, match="dtype must be BFloat16 or Float16 for attention on CUDA; got Float32"):
        dca_attention(q, k, v, cos, sin, SMALL)
    with pytest.raises(ValueError, match="rotary_cos must be on the device"):
        dca_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cos.cpu(), sin.cpu(), SMALL)


def test_values_in_device_memory_are_checked_on_request():
    """In a process of its own: the variable is read once."""
    program = """
import torch
from dca_ext import DCAConfig, dca_attention_with_kvcache
q, k = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16).cuda() for n in (1, 50))
tables = torch.ones(49, 32).cuda()
lengths = torch.tensor([51], dtype=torch.int32).cuda()
dca_attention_with_kvcache(q, k, k, tables, tables, DCAConfig(40, 48), cache_seqlens=lengths)
torch.cuda.synchronize()
"""
    for check in ("0", "1"):
        environment = {**os.environ, "DCA_CHECK": check}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if check == "0":
            assert result.returncode == 0, result.stderr
        else:
            assert "ValueError: cache_seqlens" in result.stderr


def on_both(padding: int = 0):
    """A model with Dual Chunk Attention on the CPU and its copy on the GPU; prompts, the second padded on the left."""
    from transformers import LlamaForCausalLM

    cpu = replace_attention(LlamaForCausalLM(tiny_config(head_dim=64)).eval().bfloat16(), DCAConfig(6, 9))
    ids = tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return cpu, copy.deepcopy(cpu).cuda(), ids, mask


def assert_as_on_the_cpu(cpu, out, mask):
    """Each token is the best by the CPU's own logits, as far as these tell it from the second."""
    begin = mask.shape[1]
    scores = logits(cpu, out, attention_mask=torch.cat((mask, mask.new_ones(len(out), out.shape[1] - begin)), 1))
    scores = scores[:, begin - 1 : -1]
    chosen = scores.gather(-1, out[:, begin:, None])[..., 0]
    assert (scores.amax(-1) - chosen <= 0.02 * scores.abs().amax()).all()


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
        {"use_cache": False},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_a_model_generates_what_it_does_on_the_cpu(kwargs, padding):
    cpu, gpu, ids, mask = on_both(padding)
    out = gpu.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=8, do_sample=False, **kwargs).cpu()
    assert_as_on_the_cpu(cpu, out, mask)


def test_several_tokens_at_a_time_are_verified_as_on_the_cpu():
    """Prompt lookup proposes tokens out of the prompt, which repeats itself; some are taken, some cut off again."""
    cpu, gpu, ids, _ = on_both()
    ids = ids[:1, :7].repeat(1, 5)
    mask = torch.ones_like(ids)
    out = gpu.generate(
        ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert_as_on_the_cpu(cpu, out.cpu(), mask)


def logits_over_a_dca_cache(model, ids, mask, dtype):
    """A prompt in two pieces; then steps, the order of the sequences changed in between."""
    ids, mask, order = (t.to(model.device) for t in (ids, mask, torch.tensor([1, 0])))
    cache = DCACache(model.config, dtype=dtype, capacity=26)
    seen = [logits(model, ids[:, :20], attention_mask=mask[:, :20], past=cache)[:, -1:]]
    seen.append(logits(model, ids[:, 20:26], attention_mask=mask[:, :26], past=cache))
    cache.reorder_cache(order)
    ids, mask = ids[order], mask[order]
    for t in range(26, 29):
        seen.append(logits(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past=cache))
    assert cache.layers[1].keys.device.type == model.device.type
    return torch.cat(seen, dim=1).cpu()


def test_a_model_over_a_dca_cache_computes_what_it_does_on_the_cpu():
    cpu, gpu, ids, mask = on_both(padding=8)
    exact, expected = (logits_over_a_dca_cache(cpu, ids, mask, dtype) for dtype in (None, E4M3))
    out = logits_over_a_dca_cache(gpu, ids, mask, None)
    torch.testing.assert_close(out, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    # What bfloat16 rounds in other places makes some numbers of 8 bits others: a part of what 8 bits change at all.
    out = logits_over_a_dca_cache(gpu, ids, mask, E4M3)
    assert (out - expected).abs().max() < 0.5 * (exact - expected).abs().max()


def test_a_decoding_step_compiles_to_one_graph():
    from transformers import StaticCache

    _, gpu, ids, mask = on_both(padding=8)
    ids, mask = ids.cuda(), mask.cuda()
    whole = logits(gpu, ids, attention_mask=mask, use_cache=False)
    cache = StaticCache(config=gpu.config, max_cache_len=32)
    logits(gpu, ids[:, :25], attention_mask=mask[:, :25], past=cache)
    compiled = torch.compile(gpu, fullgraph=True, backend="aot_eager")
    for t in range(25, 29):
        step = logits(compiled, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past=cache)
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=0, atol=0.02 * whole.abs().max().item())
