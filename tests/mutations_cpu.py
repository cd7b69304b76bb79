"""Mutations of the CPU kernels and of what host and device share, for mutations.py."""

from __future__ import annotations

import os
from pathlib import Path

from mutation_suite import Mutation, Suite, build_program, is_green

CPU = "csrc/cpu/"
SHARED = "csrc/include/dca/"
DISPATCH = "csrc/dispatch/"

#: Q is rotated for the first segment that has keys, and never again.
KEEP_FIRST_Q = "if (it.keys().end == c_.task.q_end) load_queries(it.segment());"

MUTATIONS = [
    Mutation("mask: one key too many", CPU + "query_rows.h", "position(row) - begin + 1", "position(row) - begin + 2"),
    Mutation(
        "mask: none in the intra segment",
        SHARED + "chunk_geometry.h",
        "end > positions_.begin + 1",
        "end < positions_.begin",
    ),
    Mutation(
        "mask: unseen keys of a packed block keep their weights",
        CPU + "simd_packed_softmax.inc",
        "for (int32_t j = rows.counts[r]; j < whole; ++j) s[r * kBlockKeys + j] = -kInfinity;",
        "",
        modes=("native", "portable"),
    ),
    Mutation(
        "mask: a NaN in an unseen value reaches rows of a tile",
        CPU + "tile_walk.h",
        "if (masked && !block.finite) {",
        "if (false && !block.finite) {",
    ),
    Mutation(
        "mask: a strip sees what its last row sees",
        CPU + "tile_walk.h",
        "c_.rows.visible(first, block.begin, block.count) < block.count",
        "c_.rows.visible(first + m - 1, block.begin, block.count) < block.count",
    ),
    Mutation(
        "mask: a NaN in an unseen value reaches rows of a decode task",
        CPU + "row_walk.h",
        "if (run.offset + run.count <= seen_by_all) {",
        "if (run.offset <= seen_by_all) {",
    ),
    Mutation(
        "segment: the successive one ends one chunk early",
        SHARED + "chunk_geometry.h",
        "if (segment == Segment::Successive) return {previous, begin};",
        "if (segment == Segment::Successive) return {previous, previous};",
    ),
    Mutation(
        "segment: queries of the inter segment one position nearer",
        SHARED + "chunk_geometry.h",
        "if (segment == Segment::Inter) return {0, max_position};",
        "if (segment == Segment::Inter) return {0, max_position - 1};",
    ),
    Mutation(
        "segment: the successive position is not capped",
        SHARED + "chunk_geometry.h",
        "return {max_position - chunk_len, chunk_len};",
        "return {chunk_len, chunk_len};",
    ),
    Mutation("segment: a tile's Q stays as it was", CPU + "tile_walk.h", "load_queries(it.segment());", KEEP_FIRST_Q),
    Mutation(
        "segment: a decode task's Q stays as it was", CPU + "row_walk.h", "load_queries(it.segment());", KEEP_FIRST_Q
    ),
    Mutation(
        "tiles: one straddles a chunk border",
        SHARED + "chunk_geometry.h",
        "if (tile_end > end()) tile_end = end();",
        "",
    ),
    Mutation(
        "splits: each leaves out its last key",
        CPU + "plan.cpp",
        "static_cast<int32_t>(std::min<int64_t>(first + keys, end))}",
        "static_cast<int32_t>(std::min<int64_t>(first + keys - (plan.num_splits > 1 ? 1 : 0), end))}",
    ),
    Mutation(
        "merge: parts weigh the same",
        CPU + "combine.h",
        "const float weight = std::exp(lse_of(part) - largest);",
        "const float weight = 1.0f;",
    ),
    Mutation(
        "merge: a NaN becomes a silent zero", CPU + "combine.h", "if (!any_nan) return -INFINITY;", "return -INFINITY;"
    ),
    Mutation(
        "softmax: O keeps its scale when the maximum moves",
        CPU + "simd_softmax.inc",
        "if (alpha[r] != 1.0f) scale_row",
        "if (false) scale_row",
    ),
    Mutation(
        "softmax: the sum keeps its scale when the maximum moves",
        CPU + "simd_softmax.inc",
        "row_sum = row_sum * alpha[r] +",
        "row_sum = row_sum +",
    ),
    Mutation(
        "softmax: columns behind the last one count",
        CPU + "simd_softmax.inc",
        "for (; n % kLanes != 0; ++n) row[n] = -kInfinity;",
        "for (; n % kLanes != 0; ++n) row[n] = row[0];",
    ),
    Mutation(
        "softmax: LSE stays in base 2",
        CPU + "query_rows.h",
        "(row_max[r] + std::log2(row_sum[r])) * kLn2",
        "(row_max[r] + std::log2(row_sum[r]))",
    ),
    Mutation(
        "GQA: all heads of a decode task read the first KV head's rows",
        CPU + "cache_rows.h",
        "rows.head_stride = tensor.stride.head;",
        "rows.head_stride = 0;",
    ),
    Mutation(
        "left padding: logical key 0 is slot 0",
        CPU + "cache_rows.h",
        "first_row_(info.k_row + info.leftpad)",
        "first_row_(info.k_row)",
    ),
    Mutation(
        "left padding: rows in front of the first key are left as they were",
        CPU + "attention.cpp",
        "  clear_rows_without_position(p, output);\n",
        "",
    ),
    Mutation(
        "pages: a run goes on behind the end of its page",
        CPU + "cache_rows.h",
        "run.count = std::min(run.count, page_size_ - within);",
        "run.count = std::min(run.count, 2 * page_size_ - within);",
    ),
    Mutation(
        "append: values go to the slot before",
        CPU + "rotate.cpp",
        "const Place place = place_of(b, slot);",
        "const Place place = place_of(b, slot > 0 ? slot - 1 : slot);",
    ),
    Mutation(
        "append: left padding counts as positions",
        CPU + "rotate.cpp",
        "return slot(b, r) - (p.cache_leftpad != nullptr ? p.cache_leftpad[b] : 0);",
        "return slot(b, r);",
    ),
    Mutation(
        "rotation: pairs turn the other way in vectors",
        CPU + "simd_rotary.inc",
        "store(row + c, a * load(cos + c) - b * load(sin + c));",
        "store(row + c, a * load(cos + c) + b * load(sin + c));",
    ),
    Mutation(
        "rotation: interleaved pairs are taken for halves",
        CPU + "simd_rotary.inc",
        "const int32_t partner = interleaved ? 1 : half;",
        "const int32_t partner = half;",
    ),
    Mutation(
        "products: the last keys of a run are left out",
        CPU + "simd_rows.inc",
        "  if (j < n) qk_block",
        "  if (false) qk_block",
    ),
    Mutation(
        "products: the last panel of values is taken for a whole one",
        CPU + "simd_packed.inc",
        "if (vecs < kVecs) return",
        "if (false) return",
    ),
    Mutation(
        "bf16: O keeps the order of its channels",
        CPU + "row_walk.h",
        "c_.mk.unpack_output_row(c_.state.row(row), c_.values.dtype, dim_);",
        "",
    ),
    Mutation(
        "bf16: rounding truncates",
        CPU + "simd_elements.inc",
        "const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
        "const VecU rounded = bits >> 16;",
    ),
    Mutation(
        "bf16: the second number of each pair is left out",
        CPU + "simd_elements.inc",
        "return sum + bit_cast<Vec>(x & 0xffff0000u) * bit_cast<Vec>(y & 0xffff0000u);",
        "return sum;",
        modes=("portable_bf16",),
    ),
    Mutation(
        "bf16: a value without a partner is left out",
        CPU + "simd_rows.inc",
        "if (kCount > 1 && j < n) add_values<1>(weights, j, value + j * stride, stride, acc);",
        "",
        modes=("portable_bf16",),
    ),
    Mutation(
        "bf16: the channels behind the last whole pair of vectors have half of each product",
        CPU + "simd_row_operands.inc",
        "(kCount == 2 ? load_halves(value + stride) << 16 : VecU{})",
        "VecU{}",
        modes=("portable_bf16",),
    ),
    Mutation(
        "amx: a block's second tile of columns is the first",
        CPU + "simd_tiles.inc",
        "load_passing_tile<kRight + 1>(b + panel_size, kTileWords);",
        "load_passing_tile<kRight + 1>(b, kTileWords);",
        modes=("amx_bf16",),
    ),
    Mutation(
        "amx: sums begin with those of the block before",
        CPU + "simd_tiles.inc",
        "block.clear();",
        "",
        modes=("amx_bf16",),
    ),
    Mutation(
        "amx: a query's last channels are left out",
        CPU + "simd_tiles.inc",
        "const bool second = 2 * w + kLanes < dim;",
        "const bool second = 2 * w + 2 * kLanes < dim;",
        modes=("amx_bf16",),
    ),
    Mutation(
        "packed softmax: weights of one key too many",
        CPU + "simd_packed_softmax.inc",
        "for (int32_t j = rows.counts[r]; j < whole; ++j)",
        "for (int32_t j = rows.counts[r] + 1; j < whole; ++j)",
    ),
    Mutation(
        "packed softmax: O keeps its scale when the maximum moves",
        CPU + "simd_packed_softmax.inc",
        "if (alphas[r] != 1.0f) scale_row",
        "if (false) scale_row",
    ),
    Mutation(
        "packed softmax: the sum keeps its scale when the maximum moves",
        CPU + "simd_packed_softmax.inc",
        "store_lanes(rows.row_sum + first, m, load_lanes(rows.row_sum + first, m) * alpha);",
        "",
    ),
    Mutation(
        "packed softmax: the last group takes the next strip's rows along",
        CPU + "simd_packed_softmax.inc",
        "if (count >= kLanes) return store(p, x);",
        "return store(p, x);",
    ),
    Mutation(
        "packed softmax: sums are not looked at",
        CPU + "simd_packed_softmax.inc",
        "fine = fine && all_below(sum, kMaxSum);",
        "",
    ),
    Mutation(
        "packed softmax: what was trusted in vain is not computed again",
        CPU + "tile_walk.h",
        "if (!products_.softmax(w_.logits, rows, most, factors, trusting)) {",
        "if (!products_.softmax(w_.logits, rows, most, factors, trusting) && false) {",
    ),
    Mutation(
        "amx: all blocks are packed into one place",
        CPU + "tile_walk.h",
        "w_.keys + index * TileBuffers::block_keys(w_.dim)",
        "w_.keys",
        modes=("amx_bf16",),
    ),
    Mutation(
        "factors: a tile takes them without their sign",
        CPU + "tile_walk.h",
        "std::copysign(1.0f, logit_factor_)",
        "1.0f",
    ),
    Mutation(
        "factors: a tile's maximum stays without them",
        CPU + "tile_walk.h",
        "c_.state.row_max[row] *= softmax_factor();",
        "c_.state.row_max[row] *= 1.0f;",
    ),
    Mutation(
        "amx: what follows the last value of a tile is left as it was",
        CPU + "simd_packed.inc",
        "w < depth_of<Words>(values.count)",
        "w < words_of(values.count, 2)",
        modes=("amx_bf16",),
    ),
    Mutation(
        "amx: a thread keeps its tiles (AMX itself does not mind; its emulation does)",
        CPU + "simd_tile_registers.inc",
        'void end_tiles() { asm volatile("tilerelease"); }',
        "void end_tiles() {}",
        modes=("amx_bf16",),
    ),
    Mutation(
        "e4m3: NaN is read as a number",
        CPU + "simd_elements.inc",
        "_mm256_cvtph_ps(_mm_or_si128(half, nan))",
        "_mm256_cvtph_ps(half)",
        modes=("avx2",),
    ),
    Mutation(
        "e4m3: subnormal numbers are read as normal ones",
        CPU + "simd_elements.inc",
        "const Vec z = y * 2.0f - 0x1p-6f;",
        "const Vec z = y;",
        modes=("portable",),
    ),
    Mutation(
        "e4m3: all heads have the scale of the first",
        CPU + "query_rows.h",
        "head_scale(p_, p_.k_scale, kv_head(row))",
        "head_scale(p_, p_.k_scale, 0)",
    ),
    Mutation(
        "int8: a decode task leaves out the scales",
        CPU + "simd_rows.inc",
        "if (rows.first.scales == nullptr) return;",
        "return;",
    ),
    Mutation(
        "int8: packed keys leave out the scales",
        CPU + "tile_walk.h",
        "block.scaled ? block.key_scales : nullptr",
        "nullptr",
    ),
    Mutation(
        "int8: packed values leave out the scales",
        CPU + "tile_walk.h",
        "block.scaled ? block.value_scales : nullptr",
        "nullptr",
    ),
    Mutation(
        "int8: a NaN for a scale of an unseen value reaches rows of a tile",
        CPU + "tile_walk.h",
        "block.finite = block.finite && std::isfinite(values.scale[j]);",
        "block.finite = block.finite && true;",
    ),
    Mutation(
        "int8: a row's last channels do not count for its scale",
        CPU + "simd_quantize.inc",
        "for (int32_t c = whole; c < n; ++c) rest[c - whole] = src[c];",
        "",
    ),
    Mutation(
        "workers: two share their buffers",
        CPU + "attention.cpp",
        "memory_.get() + worker * per_worker_",
        "memory_.get() + worker / 2 * per_worker_",
    ),
    Mutation(
        "CUDA tiles: all groups of KV heads begin with their longest",
        DISPATCH + "tile_order.h",
        "if ((num_groups - 1 - group) % 2 != 0)",
        "if (num_groups < 0)",
        tests="TileOrder*",
    ),
    Mutation(
        "CUDA tiles: groups of KV heads overlap",
        DISPATCH + "tile_order.h",
        "group * kv_heads_at_once.divisor + place",
        "group + place",
        tests="TileOrder*",
    ),
    Mutation(
        "CUDA tiles: fewer KV heads at once than divide their number",
        DISPATCH + "heuristics.h",
        "while (heads < num_kv_heads && num_kv_heads % heads != 0) ++heads;",
        "",
        tests="CudaHeuristics*",
    ),
]

OPTIONS = ["-DDCA_CUDA=OFF", "-DDCA_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release"]


def run_tests(build: Path, mutation: Mutation, mode: str) -> bool:
    """All tests with the kernels for one instruction set, or with those that the library chooses."""
    environment = {**os.environ, "DCA_NUM_THREADS": "4"}
    environment.pop("DCA_CPU_ISA", None)
    if mode != "native":
        environment["DCA_CPU_ISA"] = mode
    return is_green([str(build / "tests/cpp/dca_cpp_tests")], mutation.tests, environment)


SUITE = Suite(
    mutations=MUTATIONS,
    unchanged=[Mutation("", CPU, "", "")],
    modes=["native", "portable", "portable_bf16", "amx_bf16"],
    build=lambda tree, build: build_program(tree, build, "dca_cpp_tests", OPTIONS),
    run_tests=run_tests,
)
