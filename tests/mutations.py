"""Breaks the CUDA kernels one way at a time and expects the tests to turn red: `python tests/mutations.py`.

Each mutation is one edit of a scratch copy of the tree; one kind of kernel is rebuilt and its tests run, on a GPU or
under the simulator, in the order of warps and copies that ought to show the fault. Minutes each: by hand or nightly.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from test_cuda_suite import MODES, PTXSIM, cutlass_dir, has_gpu

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One edit: `old` stands `occurrences` times in `file`, and all of them become `new`."""

    name: str
    file: str
    old: str
    new: str
    modes: tuple[str, ...] = ("random",)  #: red in one of them is enough
    occurrences: int = 1
    tests: str = "*"

    @property
    def filter(self) -> str:
        """Tests of Hopper's kernels for mutations of theirs; all others for the rest."""
        return "Sm90/*" if self.file.startswith(SM90) else f"{self.tests}-Sm90/*"


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
        "if (segment != static_cast<int32_t>(blocks[0].segment)) {",
        "if (segment == -1) {",
    ),
    Mutation(
        "segment switch: Q of another segment",
        SM80 + "decode_kernel.h",
        "read_queries(tSrQ, block.segment);",
        "read_queries(tSrQ, Segment::Intra);",
    ),
    Mutation(
        "wait: prefill does not wait for its copies",
        SM80 + "prefill_kernel.h",
        "cp_async_wait<2 * (kStages - 1)>();",
        "cp_async_wait<2 * kStages>();",
        ("late", "random"),
    ),
    Mutation(
        "wait: decode does not wait for its copies",
        SM80 + "decode_kernel.h",
        "cp_async_wait<kStages - 1>();",
        "cp_async_wait<kStages>();",
        ("late", "random"),
    ),
    Mutation(
        "barrier: prefill's wait is not followed by one",
        SM80 + "prefill_kernel.h",
        "    cp_async_wait<2 * (kStages - 1)>();\n    __syncthreads();",
        "    cp_async_wait<2 * (kStages - 1)>();",
        ("race", "late"),
    ),
    Mutation(
        "barrier: decode's warps publish into rings in use",
        SM80 + "decode_kernel.h",
        "    __syncthreads();  // all warps are done with their rings\n",
        "",
        ("race", "late"),
    ),
    Mutation(
        "merge: parts weigh the same",
        COMMON + "merge.cu",
        "const float weight = expf(args.lses[part][lse_index] - largest);",
        "const float weight = args.lses[part][lse_index] > -INFINITY ? 1.0f : 0.0f;",
    ),
    Mutation(
        "merge: splits weigh the same",
        COMMON + "combine.cu",
        "weight[i] = exp2_approx((weight[i] - offset) * kLog2E);",
        "weight[i] = weight[i] > -INFINITY ? 1.0f : 0.0f;",
    ),
    Mutation(
        "merge: warps of a decode tile weigh the same",
        SM80 + "decode_kernel.h",
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
        "append: values go to the slot before",
        COMMON + "rotate.cu",
        "Cached* const value = row_of<Cached>(p.v_cache, batch, slot, head);",
        "Cached* const value = row_of<Cached>(p.v_cache, batch, slot > 0 ? slot - 1 : slot, head);",
    ),
    Mutation(
        "e4m3: Q keeps the order of its columns",
        SM80 + "decode_kernel.h",
        "std::conditional_t<Traits::kE4M3, EvenColumnsFirst, ColumnsInPlace>{}",
        "ColumnsInPlace{}",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: O keeps the order of its columns",
        SM80 + "decode_kernel.h",
        "{o(r, c), o(r, c + 2), o(r, c + 1), o(r, c + 3)}",
        "{o(r, c), o(r, c + 1), o(r, c + 2), o(r, c + 3)}",
        tests="*E4M3*",
    ),
    Mutation(
        "e4m3: all heads have the scales of the first",
        SM80 + "decode_kernel.h",
        "scale.of(tile_.kv_head)",
        "scale.of(0)",
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
        "e4m3: append truncates",
        COMMON + "e4m3.h",
        "+ 0x7ffffu + (bits >> 20 & 1u)) >> 20;",
        ") >> 20;",
        tests="*E4M3*",
    ),
    Mutation(
        "Hopper mask: one key too many",
        SM90 + "mainloop.h",
        ".position - first_key + 1);",
        ".position - first_key + 2);",
    ),
    Mutation(
        "Hopper mask: keys in front of a block that begins inside a page",
        SM90 + "mainloop.h",
        "if (column < begin || column >= limit)",
        "if (column >= limit)",
    ),
    Mutation(
        "Hopper segment switch: Q stays as it was",
        SM90 + "consumer.h",
        "if (block.segment != before) rotate_queries(tile, block.segment);",
        "if (false && block.segment != before) rotate_queries(tile, block.segment);",
    ),
    Mutation(
        "Hopper wait: K is not waited for",
        SM90 + "consumer.h",
        "Barrier::wait(&shared_.k_full[at_.stage()], at_.phase()); }",
        "}",
        ("late", "random"),
    ),
    Mutation(
        "Hopper wait: the producer does not wait for free places",
        SM90 + "producer.h",
        "    EmptyBarrier::wait(&empty[at.stage()], at.phase_before());",
        "    if (false) EmptyBarrier::wait(&empty[at.stage()], 0);",
        ("race", "random", "late"),
    ),
    Mutation(
        "Hopper wait: the producer does not wait for the tile before the last",
        SM90 + "producer.h",
        "      EmptyBarrier::wait(&shared_.tile_empty[slot.stage()], slot.phase_before());\n      WorkTile",
        "      WorkTile",
        ("race", "random", "late"),
    ),
    Mutation(
        "Hopper barrier: Q is rotated while other warps' products read it",
        SM90 + "consumer.h",
        "    wait_for_stores();\n    Barriers::warpgroup(warpgroup());\n",
        "    wait_for_stores();\n",
        ("race", "late", "random"),
    ),
    Mutation(
        "Hopper fence: Q is not made visible to wgmma",
        SM90 + "consumer.h",
        "        made_anew(thread_) % 128, 128);\n    cutlass::arch::fence_view_async_shared();\n",
        "        made_anew(thread_) % 128, 128);\n",
        ("race",),
    ),
    Mutation(
        "Hopper fence: O is not made visible to TMA",
        SM90 + "consumer.h",
        "first_row) const {\n    cutlass::arch::fence_view_async_shared();\n",
        "first_row) const {\n",
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
        "Hopper: values of other sequences are not cleared",
        SM90 + "consumer.h",
        "if (first_key < 0 || first_key + kBlockN > kv_len) clear_foreign",
        "if (false) clear_foreign",
    ),
    Mutation(
        "Hopper tiles: a cut tile is stored whole",
        SM90 + "consumer.h",
        "prefill_.out_by_tma && tile.num_positions() >= first_row + 64",
        "prefill_.out_by_tma",
    ),
]


def build(tree: Path, build_dir: Path) -> None:
    """Configures and builds dca_cuda_tests with one kernel of each kind."""
    options = [
        *("-DDCA_CUDA=ON", "-DDCA_BUILD_TESTS=ON", "-DDCA_CUDA_STATIC_RUNTIME=OFF", "-DDCA_CUDA_ARCHITECTURES=80;90a"),
        "-DDCA_CUDA_ALLOW_SPILLS=ON",  # a mutation may spill; that is not what it is here for
        *(
            "-DDCA_CUDA_INSTANCES=prefill-bf16-64;decode-bf16-64;decode-bf16-64-e4m3;sm90-prefill-bf16-64",
            f"-DCUTLASS_DIR={cutlass_dir()}",
        ),
    ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", tree, "-B", build_dir, *generator, *options],
        ["cmake", "--build", build_dir, "--parallel", str(os.cpu_count()), "--target", "dca_cuda_tests"],
    ):
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"the build failed:\n{result.stdout[-4000:]}{result.stderr[-2000:]}")


def is_green(build_dir: Path, mutation: Mutation, mode: str) -> bool:
    """Runs the tests in one mode."""
    program = [str(build_dir / "tests/cpp/cuda/dca_cuda_tests"), "--gtest_brief=1", f"--gtest_filter={mutation.filter}"]
    environment = {**os.environ, **MODES[mode]}
    if not has_gpu():
        program.insert(0, str(PTXSIM / "run"))
        environment["PTXSIM_BUILD"] = str(build_dir / "ptxsim")
    return subprocess.run(program, capture_output=True, env=environment, check=False).returncode == 0


def main() -> int:
    """Returns the number of mutations that no test saw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="mutations whose name contains TEXT, or one of several with commas between",
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    chosen = [mutation for mutation in MUTATIONS if any(text in mutation.name for text in wanted)]
    if arguments.list or not chosen:
        print("\n".join(mutation.name for mutation in MUTATIONS))
        return 0 if arguments.list else 2
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree, build_dir = Path(folder) / "tree", Path(folder) / "build"
        tree.mkdir()
        for name in ("csrc", "cmake", "tests/cpp"):
            shutil.copytree(ROOT / name, tree / name)
        (tree / "dca_ext").mkdir()
        shutil.copy(ROOT / "dca_ext/version.py", tree / "dca_ext")
        shutil.copy(ROOT / "CMakeLists.txt", tree)
        build(tree, build_dir)
        for mode in MODES:
            for file in (SM80, SM90):
                if not is_green(build_dir, Mutation("", file, "", ""), mode):
                    raise SystemExit(f"the tests are red without a mutation, in mode {mode}")
        for number, mutation in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {mutation.name} ... ", end="", flush=True)
            path = tree / mutation.file
            text = path.read_text()
            if text.count(mutation.old) != mutation.occurrences:
                raise SystemExit(f"{mutation.file} has {text.count(mutation.old)} times: {mutation.old}")
            path.write_text(text.replace(mutation.old, mutation.new))
            build(tree, build_dir)
            red = next((mode for mode in mutation.modes if not is_green(build_dir, mutation, mode)), None)
            path.write_text(text)
            print(f"red ({red})" if red else "GREEN: no test sees it", flush=True)
            if red is None:
                survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations turn a test red")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
