"""Mutations of the CUDA kernels, for mutations.py: one kind of kernel each, on a GPU or under the simulator."""

from __future__ import annotations

import os
from pathlib import Path

from mutation_suite import Mutation, Suite, build_program, is_green
from test_cuda_suite import MODES, PTXSIM, cutlass_dir, has_gpu

SM80 = "csrc/kernels/sm80/"
SM90 = "csrc/kernels/sm90/"
COMMON = "csrc/kernels/common/"

MUTATIONS = [
    Mutation(
        "mask: one key too many", COMMON + "queries.h", "position - block.begin + 1)", "position - block.begin + 2)"
    ),
    Mutation(
        "mask: none",
        COMMON + "key_blocks.h",
        "return block.count < block_n ||",
        "return false && block.count < block_n ||",
    ),
    Mutation(
        "segment switch: Q stays as it was",
        SM80 + "prefill_kernel.h",
        "if (segment != static_cast<int32_t>(block.segment)) {",
        "if (segment == -1) {",
    ),
    Mutation(
        "segment: rotary positions of queries count from the tile",
        COMMON + "queries.h",
        "positions_.of(position - tile_.chunk_begin)",
        "positions_.of(position - tile_.positions.begin)",
    ),
    Mutation(
        "segment switch: some rows of Q are not made",
        COMMON + "queries.h",
        "return of(lane / kPairsOfRow + i * (kLanes / kPairsOfRow), lane % kPairsOfRow);",
        "return of(lane / kPairsOfRow + i, lane % kPairsOfRow);",
    ),
    Mutation(
        "segment switch: Q of another segment",
        SM80 + "decode_tile.h",
        "read_queries(tSrQ, block.segment);",
        "read_queries(tSrQ, Segment::Intra);",
    ),
    Mutation(
        "wait: prefill does not wait for its copies",
        SM80 + "prefill_kernel.h",
        "    cp_async_wait<0>();\n    if constexpr (Traits::kE4M3) widen(ring_k",
        "    if constexpr (Traits::kE4M3) widen(ring_k",
        ("late", "random"),
    ),
    Mutation(
        "wait: decode does not wait for its copies",
        SM80 + "decode_ring.h",
        "cp_async_wait<kStages - 1>();",
        "cp_async_wait<kStages>();",
        ("late", "random"),
    ),
    Mutation(
        "barrier: prefill's wait is not followed by one",
        SM80 + "prefill_kernel.h",
        "widen(ring_k(stage), widened_k());\n    __syncthreads();",
        "widen(ring_k(stage), widened_k());",
        ("race", "late"),
    ),
    Mutation(
        "barrier: prefill reads values before all warps have widened theirs",
        SM80 + "prefill_kernel.h",
        "      widen(ring_v(stage), widened_v());\n      __syncthreads();\n",
        "      widen(ring_v(stage), widened_v());\n",
        ("race", "late"),
        tests="*E4M3*",
    ),
    Mutation(
        "barrier: decode's warps publish into rings in use",
        SM80 + "decode_tile.h",
        "    __syncthreads();  // all warps are done with their rings\n",
        "",
        ("race", "late"),
    ),
    Mutation(
        "softmax: a maximum that has not moved rescales a little",
        COMMON + "softmax.h",
        "exp2_approx(__fmul_rn(row_max[r], scale_log2) - power)",
        "exp2_approx(fmaf(row_max[r], scale_log2, -power))",
    ),
    Mutation(
        "merge: parts weigh the same",
        COMMON + "merge.cu",
        "const float weight = expf(lse - largest);",
        "const float weight = 1.0f;",
    ),
    Mutation(
        "merge: splits weigh the same",
        COMMON + "combine.cu",
        "mine[i] = exp2_approx((mine[i] - offset) * kLog2E);",
        "mine[i] = mine[i] > -INFINITY ? 1.0f : 0.0f;",
    ),
    Mutation(
        "merge: warps of a decode tile weigh the same",
        SM80 + "decode_tile.h",
        "const float weight = exp2_approx(exchange_max(w, row) - largest);",
        "const float weight = 1.0f;",
    ),
    Mutation(
        "softmax: O keeps its scale when the maximum moves",
        COMMON + "softmax.h",
        "o(r, c) *= rescale.factor[r];",
        "o(r, c) *= 1.0f;",
    ),
    Mutation(
        "softmax: prefill trusts the first maxima whatever comes of it",
        COMMON + "softmax.h",
        "if (!__all_sync(0xffffffff, fits)) return false;",
        "",
    ),
    Mutation(
        "softmax: logits that are computed again are not masked",
        SM80 + "prefill_kernel.h",
        "          if (masked) mask_logits(s,",
        "          if (false) mask_logits(s,",
    ),
    Mutation(
        "softmax: a maximum stays however far it is exceeded",
        COMMON + "softmax.h",
        "<= kSlack) largest",
        "<= 1e9f) largest",
    ),
    Mutation(
        "runs: blocks that need a mask count as plain",
        COMMON + "key_blocks.h",
        "Segment::Intra && ranges_.mask_from < end) end",
        "Segment::Intra && ranges_.mask_from < 0) end",
    ),
    Mutation(
        "append: values go to the slot before",
        COMMON + "rotate.cu",
        "Cached* const value = row_of<Cached>(p.v_cache, batch, slot, head);",
        "Cached* const value = row_of<Cached>(p.v_cache, batch, slot > 0 ? slot - 1 : slot, head);",
    ),
    Mutation(
        "offsets: those of keys have 32 bits",
        COMMON + "tile_scheduler.h",
        "static_cast<const char*>(cache.data) + offset * element_bytes",
        "static_cast<const char*>(cache.data) + static_cast<int32_t>(offset) * element_bytes",
        tests="*FarMemory*",
    ),
    Mutation(
        "offsets: those of results have 32 bits",
        COMMON + "output_rows.h",
        "batch + (tile.seqlen.q_row + row) * stride.row + head * stride.head",
        "batch + static_cast<int32_t>((tile.seqlen.q_row + row) * stride.row + head * stride.head)",
        tests="*FarMemory*",
    ),
    Mutation(
        "e4m3: Q keeps the order of its columns",
        SM80 + "e4m3_products.h",
        "const int32_t first = column / 16 * 16 + column % 16 / 2;",
        "const int32_t first = column / 16 * 16 + column % 8 / 2;",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: Q of bf16 keeps its exponents",
        SM80 + "e4m3_products.h",
        "__uint_as_float(__float_as_uint(scale.magnitude_log2 / kRead) & 0x7f800000u)",
        "1.0f",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: O keeps the order of its columns",
        SM80 + "decode_tile.h",
        "{o(r, c), o(r, c + 2), o(r, c + 1), o(r, c + 3)}",
        "{o(r, c), o(r, c + 1), o(r, c + 2), o(r, c + 3)}",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: all heads have the scales of the first",
        COMMON + "e4m3.h",
        "scale.of(kv_head)",
        "scale.of(0)",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: prefill tiles widen numbers in another order",
        SM80 + "e4m3_rows.h",
        "elements = {low.x, low.y, high.x, high.y};",
        "elements = {low.y, low.x, high.x, high.y};",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: prefill tiles leave the scale of the values out",
        SM80 + "prefill_kernel.h",
        "factor(args_.p.v_scale)",
        "1.0f",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: small weights are too small for fp16",
        SM80 + "traits.h",
        "std::is_same_v<Value, cutlass::half_t> ? 15 : 0;",
        "std::is_same_v<Value, cutlass::half_t> ? 0 : 0;",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: NaN is read as 480",
        COMMON + "e4m3.h",
        "return with_nan(multiply(small, 0x7b807b80u));",
        "return multiply(small, 0x7b807b80u);",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: NaN is read as 480, as fp16",
        COMMON + "e4m3.h",
        '"r"(0x78807880u)',
        '"r"(0x3c003c00u)',
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: append truncates",
        COMMON + "e4m3.h",
        "+ 0x7ffffu + (bits >> 20 & 1u)) >> 20;",
        ") >> 20;",
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper mask: one key too many",
        SM90 + "mainloop.h",
        "position - block.begin + 1);",
        "position - block.begin + 2);",
    ),
    Mutation(
        "Hopper mask: keys in front of a block that begins inside a page",
        SM90 + "mainloop.h",
        "if (column < begin || column >= limit)",
        "if (column >= limit)",
    ),
    Mutation(
        "Hopper notes: a block does not say that it needs a mask",
        SM90 + "block_notes.h",
        "flags.bits |= BlockFlags::kMasked | BlockFlags::kMaxima;",
        "flags.bits |= BlockFlags::kMaxima;",
    ),
    Mutation(
        "Hopper softmax: trust in the first maxima is not checked",
        SM90 + "consumer.h",
        "if (Traits::kTrusting && !slot.careful) check(",
        "if (false) check(",
    ),
    Mutation(
        "Hopper softmax: a tile that failed does not come again",
        SM90 + "producer.h",
        "const int32_t index = slot.failed != 0 ? slot.index : -1;",
        "const int32_t index = -1;",
    ),
    Mutation(
        "Hopper softmax: the last word is said before all tiles are done",
        SM90 + "producer.h",
        "for (uint32_t i = 1; i < Traits::kTileSlots && index < 0; ++i) index = failed_in({slot_.count + i});",
        "",
    ),
    Mutation(
        "Hopper softmax: a tile that comes again trusts again",
        SM90 + "block_notes.h",
        "if (look) flags.bits |= BlockFlags::kMaxima;",
        "",
    ),
    Mutation(
        "Hopper segment switch: Q stays as it was",
        SM90 + "consumer.h",
        "if (flags.has(BlockFlags::kSwitch)) rotate_queries(",
        "if (false && flags.has(BlockFlags::kSwitch)) rotate_queries(",
    ),
    Mutation(
        "Hopper wait: K is not waited for",
        SM90 + "consumer.h",
        "Barrier::wait(&shared_.products.k_full[at_.stage()], at_.phase());",
        "",
        ("late", "random"),
    ),
    Mutation(
        "Hopper wait: the producer does not wait for free places",
        SM90 + "producer.h",
        "    EmptyBarrier::wait(&empty[at_.stage()], at_.phase_before());",
        "    if (false) EmptyBarrier::wait(&empty[at_.stage()], 0);",
        ("race", "random", "late"),
    ),
    Mutation(
        "Hopper wait: the producer does not wait for the tile before the last",
        SM90 + "producer.h",
        "EmptyBarrier::wait(&shared_.tile_empty[at.stage()], at.phase_before());",
        "",
        ("race", "random", "late"),
    ),
    Mutation(
        "Hopper barrier: Q is rotated while other warps' products read it",
        SM90 + "consumer.h",
        "    take_place_of_q();\n    const int32_t",
        "    wait_for_stores();\n    const int32_t",
        ("race", "late", "random"),
    ),
    Mutation(
        "Hopper barrier: O is written over Q that other warps' products read",
        SM90 + "consumer.h",
        "    take_place_of_q();\n    stage_results(",
        "    wait_for_stores();\n    stage_results(",
        ("race", "late", "random"),
    ),
    Mutation(
        "Hopper wait: O is written into the place of O before that is stored",
        SM90 + "consumer.h",
        "    take_place_of_q();\n    stage_results(",
        "    Barriers::warpgroup(warpgroup());\n    stage_results(",
        ("late", "random", "race"),
    ),
    Mutation(
        "Hopper fence: Q is not made visible to wgmma",
        SM90 + "consumer.h",
        "        made_anew(thread_));\n    cutlass::arch::fence_view_async_shared();\n",
        "        made_anew(thread_));\n",
        ("race",),
    ),
    Mutation(
        "Hopper fence: O is not made visible to TMA",
        SM90 + "consumer.h",
        "bool again) const {\n    cutlass::arch::fence_view_async_shared();\n",
        "bool again) const {\n",
        ("race",),
    ),
    Mutation(
        "Hopper wait: Q is rotated into the place of O before that is stored",
        SM90 + "consumer.h",
        "    if (thread_ % 128 == 0) tma_store_wait<0>();",
        "",
        ("late", "race", "random"),
    ),
    Mutation(
        "Hopper decode: both halves of a block are those of the first page",
        SM90 + "decode_loads.h",
        "first_key(block) + piece * Traits::kLeastBoxRows;",
        "first_key(block);",
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper e4m3 wait: a block is widened before it has come",
        SM90 + "widener.h",
        "    Barrier::wait(&packed_full[from.stage()], from.phase());\n",
        "",
        ("late", "random"),
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper e4m3 wait: a block is widened into a place in use",
        SM90 + "widener.h",
        "    EmptyBarrier::wait(&wide_empty[to.stage()], to.phase_before());\n",
        "",
        ("race", "random", "late"),
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper e4m3 fence: what has been widened is not made visible to wgmma",
        SM90 + "widener.h",
        "    cutlass::arch::fence_view_async_shared();",
        "",
        ("race",),
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper e4m3 softmax: a tile that comes again trusts again",
        SM90 + "widener.h",
        "careful || look",
        "look",
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper e4m3: the scale of the values is left out",
        SM90 + "consumer.h",
        "factor(args_.p.v_scale, tile)",
        "1.0f",
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper decode: keys and values are not waited for",
        SM90 + "decode_loads.h",
        "    Barrier::wait(&full_[stage_], phase_);\n",
        "",
        ("late", "random"),
    ),
    Mutation(
        "Hopper decode: pages lie one behind the other",
        SM90 + "decode_loads.h",
        "if (ahead_.in_run() && args_.attention.p.pages.page_table == nullptr) {",
        "if (ahead_.in_run()) {",
    ),
    Mutation(
        "Hopper decode: values of nobody are not cleared",
        SM90 + "decode_loads.h",
        "if (first < 0 || first + kRows > tile_.seqlen.kv_len) clear_foreign",
        "if (false) clear_foreign",
    ),
    Mutation(
        "Hopper: values of other sequences are not cleared",
        SM90 + "consumer.h",
        "if (!Traits::kE4M3 && flags.has(BlockFlags::kForeignRows)) clear_foreign",
        "if (false) clear_foreign",
    ),
    Mutation(
        "Hopper e4m3: values of other sequences are not cleared",
        SM90 + "widener.h",
        "if (first_key >= 0 && first_key + Traits::kBlockN <= kv_len) return;",
        "if (first_key >= 0 || kv_len >= 0) return;",
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper tiles: a cut tile is stored whole",
        SM90 + "consumer.h",
        "prefill_.out_by_tma && tile.num_positions() >= first_row + 64",
        "prefill_.out_by_tma",
    ),
]

#: One kernel of each kind. A mutation may spill registers; that is not what it is here for.
OPTIONS = [
    *("-DDCA_CUDA=ON", "-DDCA_BUILD_TESTS=ON", "-DDCA_CUDA_STATIC_RUNTIME=OFF", "-DDCA_CUDA_ARCHITECTURES=80;90a"),
    "-DDCA_CUDA_ALLOW_SPILLS=ON",
    "-DDCA_CUDA_INSTANCES=prefill-bf16-64;decode-bf16-64;prefill-bf16-64-e4m3;decode-bf16-64-e4m3;"
    "sm90-prefill-bf16-64;sm90-prefill-bf16-64-e4m3;sm90-decode-bf16-64;sm90-decode-bf16-64-e4m3",
    f"-DCUTLASS_DIR={cutlass_dir()}",
]


def run_tests(build: Path, mutation: Mutation, mode: str) -> bool:
    """Tests of Hopper's kernels for mutations of theirs, those of e4m3 on request; all others for the rest."""
    hopper = mutation.file.startswith(SM90)
    command = [str(build / "tests/cpp/cuda/dca_cuda_tests")]
    environment = {**os.environ, **MODES[mode]}
    if not has_gpu():
        command.insert(0, str(PTXSIM / "run"))
        environment["PTXSIM_BUILD"] = str(build / "ptxsim")
    if not hopper:
        tests = f"{mutation.tests}-Sm90*"
    elif mutation.tests == "*":
        tests = "Sm90/*-*E4M3*"
    else:
        tests = f"Sm90/{mutation.tests}"
    return is_green(command, tests, environment)


SUITE = Suite(
    mutations=MUTATIONS,
    unchanged=[Mutation("", SM80, "", ""), Mutation("", SM90, "", ""), Mutation("", SM90, "", "", tests="*E4M3*")],
    modes=list(MODES),
    build=lambda tree, build: build_program(tree, build, "dca_cuda_tests", OPTIONS),
    run_tests=run_tests,
)
