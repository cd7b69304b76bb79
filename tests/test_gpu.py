"""The operators and the modules on a CUDA device: `pytest -m gpu`. The kernels alone: test_cuda_suite.py."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import E4M3, SMALL, assert_close, attend_in_low_precision, baseline_attention, random_rows, tables
from tiny_models import tiny_config, tokens

import dca_ext
from dca_ext import (
    DCAConfig,
    dca_attention,
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


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_model_generates_what_it_does_on_the_cpu(cache):
    """Tokens are equal as far as the CPU's own logits tell the best from the second."""
    from transformers import LlamaForCausalLM

    config = tiny_config(head_dim=64)
    cpu = replace_attention(LlamaForCausalLM(config).eval().bfloat16(), DCAConfig(6, 9))
    gpu = copy.deepcopy(cpu).cuda()
    ids = tokens(2, 29)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    actual = gpu.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **kwargs).cpu()
    with torch.no_grad():
        scores = cpu(actual).logits[:, 28:-1].float()
    chosen = scores.gather(-1, actual[:, 29:, None])[..., 0]
    assert (scores.amax(-1) - chosen <= 0.02 * scores.abs().amax()).all()
