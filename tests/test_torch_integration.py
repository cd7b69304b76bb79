"""The operators as torch sees them: registration, tracing, torch.compile, and the missing backward."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import SMALL, empty_cache, ragged_borders, tables
from torch._inductor.utils import run_and_get_code
from torch.torch_version import TorchVersion

import dca_ext
from dca_ext import (
    dca_attention,
    dca_attention_varlen,
    dca_attention_with_kvcache,
    dca_segment_attention,
    merge_attention_states,
    rotate_and_append_kv,
    rotate_keys,
)

HEADS, KV_HEADS, DIM = 4, 2, 16
COS, SIN = tables(SMALL, DIM)


def rows(batch=2, seqlen=50, heads=HEADS):
    return torch.randn(batch, seqlen, heads, DIM)


def qkv(batch=2, seqlen=50):
    return rows(batch, seqlen), rows(batch, seqlen, KV_HEADS), rows(batch, seqlen, KV_HEADS)


def operator_calls():
    """(operator, arguments) for each operator, uniform, ragged and paged."""
    ops = torch.ops.dca_ext
    q, k, v = qkv()
    n, p = SMALL.chunk_len, SMALL.max_position
    unscaled = (None, 1.0, None, 1.0)
    plain = (
        q, k, v, COS, SIN, n, p, -1, None, 0, None, 0, None, 50, None, None, *unscaled, 0.25, None, 0, 0, False, True,
    )  # fmt: skip
    yield "attention", ops.attention, plain
    borders = ragged_borders(20, 30)
    flat = [x[0] for x in (q, k, v)]
    temperature = torch.ones(2)
    yield "attention, ragged", ops.attention, (
        *flat, COS, SIN, n, p, -1, borders, 30, borders, 30, None, 0, None, None, *unscaled, None, temperature, 0, 0,
        False, False,
    )  # fmt: skip
    cache = empty_cache(2, 64, KV_HEADS, DIM, torch.float32, page_size=16)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    append = (
        k, v, cache.k, cache.v, COS, SIN, n, p, None, 0, lengths, 0, None, cache.page_table, *unscaled, None, None,
        False,
    )  # fmt: skip
    yield "append", ops.rotate_and_append_kv, append
    zeros = [torch.zeros_like(pages) for pages in (cache.k, cache.v)]  # what is compared must not be NaN
    yield "append and attend", ops.append_and_attend, (
        q, k, v, *zeros, *append[4:-1], None, temperature, 0, 0, False, True,
    )  # fmt: skip
    numbers = tuple(torch.zeros(2, 64, KV_HEADS, DIM, dtype=torch.int8) for _ in range(2))
    written = tuple(torch.zeros(2, 64, KV_HEADS) for _ in range(2))
    yield "append to int8 and attend", ops.append_and_attend, (
        q, k, v, *numbers, COS, SIN, n, p, None, 0, lengths, 0, None, None, *unscaled, *written, None, None, 0, 0,
        False, False,
    )  # fmt: skip
    yield "rotate", ops.rotate_keys, (k, COS, SIN, n, p, None, 0, lengths, 0, None, True)
    yield "merge", ops.merge_attention_states, ([q, q], [torch.randn(2, HEADS, 50)] * 2)


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(op, args, id=name) for name, op, args in operator_calls()])
def test_opcheck(op, arguments):
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_without_values_have_the_dtypes_of_those_with(dtype):
    results = []
    for device in ("cpu", "meta"):
        tensors = [x.to(device, dtype) for x in qkv()]
        whole = dca_attention(*tensors, COS.to(device), SIN.to(device), SMALL, return_lse=True)
        merged = merge_attention_states([whole[0]], [whole[1]])
        results.append([(x.dtype, x.shape) for x in (*whole, *merged)])
    assert results[0] == results[1]


def cached_call(q, k, v, k_cache, v_cache, lengths):
    out = dca_attention_with_kvcache(q, k_cache, v_cache, COS, SIN, SMALL, k=k, v=v, cache_seqlens=lengths)
    return out * 2


COMPILED = {
    "dca_attention": (lambda q, k, v: dca_attention(q + 1, k, v, COS, SIN, SMALL) * 2, qkv()),
    "dca_attention_varlen": (
        lambda q, k, v: dca_attention_varlen(
            q[0], k[0], v[0], ragged_borders(20, 30), 30, COS, SIN, SMALL, return_lse=True
        ),
        qkv(1),
    ),
    "rotate_keys": (lambda k: rotate_keys(k, COS, SIN, SMALL, cache_seqlens=7) + 1, (rows(heads=KV_HEADS),)),
    "dca_segment_attention": (
        lambda q, k, v: dca_segment_attention(q, k, v, COS, SIN, SMALL, segment="successive", cache_seqlens=50),
        qkv(),
    ),
    "merge_attention_states": (
        lambda a, b, x, y: merge_attention_states([a, b], [x, y]),
        (rows(), rows(), torch.randn(2, HEADS, 50), torch.randn(2, HEADS, 50)),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_graph_break(name):
    function, arguments = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiled_decode_mutates_the_cache_it_was_given(as_tensor):
    compiled = torch.compile(cached_call, fullgraph=True, backend="aot_eager")
    cache, twin = (empty_cache(2, 64, KV_HEADS, DIM, torch.float32) for _ in range(2))
    for step in range(4):  # a length that changes must not compile anew for ever
        q, k, v = qkv(seqlen=1)
        lengths = torch.full((2,), step, dtype=torch.int32) if as_tensor else step
        out = compiled(q, k, v, cache.k, cache.v, lengths)
        torch.testing.assert_close(out, cached_call(q, k, v, twin.k, twin.v, lengths))
    assert torch.equal(cache.k.nan_to_num(), twin.k.nan_to_num())
    assert not cache.k[:, :4].isnan().any()
    assert cache.k[:, 4:].isnan().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_compiled_code_copies_no_cache():
    def two_layers(q, k, v, caches):  # of one pool, so that the operator gets views
        for k_cache, v_cache in caches:
            q = cached_call(q * 2, k * 2, v * 2, k_cache, v_cache, 3) + 1
        return q

    q, k, v = qkv(seqlen=1)
    caches = torch.zeros(2, 2, 2, 77, KV_HEADS, DIM)
    _, code = run_and_get_code(torch.compile(two_layers, fullgraph=True), q, k, v, caches)
    assert len(re.findall("append_and_attend.default\\(", code[0])) == 2
    assert not [line for line in code[0].splitlines() if re.search(r"empty_strided\w*\(.*\b77\b|copy_|clone", line)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_compiles_with_inductor():
    function = COMPILED["dca_attention"][0]
    arguments = qkv()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(*arguments), function(*arguments))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_backward_says_that_there_is_none(which):
    tensors = list(qkv())
    tensors[which].requires_grad_()
    with torch.enable_grad():
        out = dca_attention(*tensors, COS, SIN, SMALL)
        assert out.requires_grad
        with pytest.raises(NotImplementedError, match=r"dca_ext::(attention|rotate_keys) has no backward"):
            out.sum().backward()
        if which == 1:
            with pytest.raises(NotImplementedError, match="dca_ext::rotate_keys has no backward"):
                rotate_keys(tensors[1], COS, SIN, SMALL).sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_backward_through_a_cache_says_so_too(which):
    tensors = list(qkv(seqlen=3))
    tensors[which].requires_grad_()
    q, k, v = tensors
    cache = empty_cache(2, 64, KV_HEADS, DIM, torch.float32)
    with torch.enable_grad():
        out = dca_attention_with_kvcache(q, cache.k, cache.v, COS, SIN, SMALL, k=k, v=v, cache_seqlens=0)
        with pytest.raises(NotImplementedError, match="has no backward"):
            out.sum().backward()
        if which:
            with pytest.raises(NotImplementedError, match="rotate_and_append_kv has no backward"):
                rotate_and_append_kv(k, v, cache.k, cache.v, COS, SIN, SMALL, cache_seqlens=0)


@pytest.mark.parametrize("attends", [False, True])
def test_autograd_learns_that_a_cache_was_written(attends):
    q, k, v = qkv(seqlen=3)
    caches = tuple(torch.zeros(2, 64, KV_HEADS, DIM) for _ in range(2))
    weights = torch.ones_like(caches[0], requires_grad=True)
    with torch.enable_grad():
        product = (weights * caches[0]).sum()  # saves the cache
        if attends:
            dca_attention_with_kvcache(q, *caches, COS, SIN, SMALL, k=k, v=v, cache_seqlens=0)
        else:
            rotate_and_append_kv(k, v, *caches, COS, SIN, SMALL, cache_seqlens=0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("which", [0, 1])
def test_caches_that_require_grad_are_refused(which):
    q, k, v = qkv(seqlen=3)
    caches = [torch.zeros(2, 64, KV_HEADS, DIM) for _ in range(2)]
    caches[which].requires_grad_()
    with torch.enable_grad():
        for call in (
            lambda: rotate_and_append_kv(k, v, *caches, COS, SIN, SMALL, cache_seqlens=0),
            lambda: dca_attention_with_kvcache(q, *caches, COS, SIN, SMALL, k=k, v=v, cache_seqlens=0),
        ):
            with pytest.raises(NotImplementedError, match="caches that are written must not require grad"):
                call()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13",
    reason="before torch 2.13 inductor writes to wrong places where both caches are views of one tensor (README)",
)
def test_compiled_appends_to_views_of_one_tensor():
    q, k, v = qkv(seqlen=3)
    pools = [torch.zeros(2, 2, 64, KV_HEADS, DIM) for _ in range(2)]
    out = torch.compile(cached_call, fullgraph=True)(q, k, v, *pools[0], 0)
    torch.testing.assert_close(out, cached_call(q, k, v, *pools[1], 0))
    assert torch.equal(pools[0], pools[1])


def test_without_grad_mode_caches_and_rows_may_require_grad():
    q, k, v = (x.requires_grad_() for x in qkv(seqlen=3))
    caches = [torch.zeros(2, 64, KV_HEADS, DIM).requires_grad_() for _ in range(2)]
    rotate_and_append_kv(k, v, *caches, COS, SIN, SMALL, cache_seqlens=0)
    out = dca_attention_with_kvcache(q, *caches, COS, SIN, SMALL, k=k, v=v, cache_seqlens=3)
    assert not out.requires_grad
    assert torch.equal(caches[1][:, :3], v)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_row_gets_lost_from_the_graph(which):
    """Asked for the gradient of one among several, where autograd would say that it is unused."""
    tensors = [x.requires_grad_() for x in qkv(seqlen=3)]
    q, k, v = tensors
    cache = empty_cache(2, 64, KV_HEADS, DIM, torch.float32)
    with torch.enable_grad():
        for out in (
            dca_attention(q, k, v, COS, SIN, SMALL),
            dca_attention_with_kvcache(q, cache.k, cache.v, COS, SIN, SMALL, k=k, v=v, cache_seqlens=0),
        ):
            with pytest.raises(NotImplementedError, match="has no backward"):
                torch.autograd.grad(out.sum(), tensors[which], allow_unused=True)


def test_caches_of_inference_mode_are_written():
    q, k, v = qkv(seqlen=3)
    with torch.inference_mode():
        caches = [torch.zeros(2, 64, KV_HEADS, DIM) for _ in range(2)]
        dca_attention_with_kvcache(q, *caches, COS, SIN, SMALL, k=k, v=v, cache_seqlens=0)
        assert torch.equal(caches[1][:, :3], v)


def test_merge_has_no_backward_either():
    outs = torch.randn(2, 1, 3, 2, 8, requires_grad=True)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="merge_attention_states has no backward"):
        merge_attention_states(outs, torch.randn(2, 1, 2, 3))[0].sum().backward()


# torch's own import
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_says_that_there_is_none(which):
    q, k, v = qkv(seqlen=3)
    cache = empty_cache(2, 64, KV_HEADS, DIM, torch.float32)
    calls = [
        lambda *x: dca_attention(*x, COS, SIN, SMALL),
        lambda q, k, v: dca_attention_varlen(q[0], k[0], v[0], ragged_borders(3), 3, COS, SIN, SMALL),
        lambda q, k, v: dca_attention_with_kvcache(
            q, cache.k, cache.v, COS, SIN, SMALL, k=k, v=v, cache_seqlens=torch.tensor([0, 1], dtype=torch.int32)
        ),
        lambda q, k, v: dca_segment_attention(q, k, v, COS, SIN, SMALL, segment="intra", cache_seqlens=3),
        lambda *x: merge_attention_states([x[which], x[which]], [torch.randn(2, x[which].shape[2], 3)] * 2)[0],
        lambda *x: merge_attention_states([torch.zeros_like((q, k, v)[which])], [x[which].transpose(1, 2).sum(-1)])[1],
        lambda *x: dca_attention(q, k, v, COS, SIN, SMALL, temperature=x[which].sum((1, 2, 3))),
    ]
    if which:
        calls.append(lambda _, k, v: rotate_and_append_kv(k, v, cache.k, cache.v, COS, SIN, SMALL, cache_seqlens=0))
    for call in calls:

        def of_one(x, call=call):
            return call(*[x if i == which else t for i, t in enumerate((q, k, v))])

        x = (q, k, v)[which]
        with torch.enable_grad(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(of_one, (x,), (torch.ones_like(x),))
    assert cache.k.isnan().all()


def test_the_public_names_exist_and_are_documented():
    for name in dca_ext.__all__:
        assert getattr(dca_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dca_ext.nothing  # noqa: B018


def test_build_info_says_what_was_built():
    info = dca_ext.build_info()
    assert info["version"] == dca_ext.__version__
    assert info["cpu_isa"] in info["cpu_instruction_sets"]
    assert "portable" in info["cpu_instruction_sets"]
    assert all(name.startswith("sm_") for name in info["cuda_architectures"])


@pytest.mark.parametrize("name", ["dca_attention", "build_info()"])
def test_a_package_without_its_compiled_parts_says_so(name, tmp_path):
    source = Path(dca_ext.__file__).parent
    shutil.copytree(source, tmp_path / "dca_ext", ignore=shutil.ignore_patterns("*.so", "cpp", "__pycache__"))
    # An editable install finds its own compiled parts, wherever the package lies.
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')]"
    command = [sys.executable, "-c", f"{alone}; import dca_ext; dca_ext.{name}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ImportError: dca_ext was not built: {tmp_path / 'dca_ext'} holds no _")
    assert "`pip install .`" in last_line


def test_kernels_are_named_from_shapes():
    shape = dict(num_heads=9, num_heads_kv=3, head_dim=64)
    isa = dca_ext.build_info()["cpu_isa"]
    assert dca_ext._core.describe_kernel(seqlen_q=4096, seqlen_k=4096, **shape) == f"cpu/{isa}/tile"
    assert dca_ext._core.describe_kernel(seqlen_q=1, seqlen_k=4096, **shape) == f"cpu/{isa}/rows"
    on_cuda = dict(seqlen_q=1, seqlen_k=4096, device="cuda", dtype="bfloat16", **shape)
    if not dca_ext.build_info()["cuda_architectures"]:
        with pytest.raises(RuntimeError, match="no CUDA kernels; build it where nvcc is found"):
            dca_ext._core.describe_kernel(**on_cuda)
    elif torch.cuda.is_available():
        assert re.match("cuda/sm(80|90)/decode/bf16/64", dca_ext._core.describe_kernel(**on_cuda))
    else:
        with pytest.raises(RuntimeError, match="the current CUDA device: "):
            dca_ext._core.describe_kernel(**on_cuda)
    with pytest.raises(ValueError, match="num_heads must be a positive multiple"):
        dca_ext._core.describe_kernel(seqlen_q=1, seqlen_k=1, num_heads=3, num_heads_kv=2, head_dim=64)
