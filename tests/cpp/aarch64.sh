#!/usr/bin/env bash
# Builds the C++ tests for 64-bit ARM, where the portable micro-kernels become NEON, and runs them under QEMU.
#
#   apt-get install g++-aarch64-linux-gnu qemu-user googletest
#   tests/cpp/aarch64.sh [BUILD_FOLDER]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
build=${1:-$root/build/aarch64}
for program in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  command -v "$program" >/dev/null || { echo "$program is missing; see the first lines of $0" >&2; exit 1; }
done

configure() {  # source, build folder, further options
  cmake -S "$1" -B "$2" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc \
    -DCMAKE_BUILD_TYPE=Release "${@:3}" >/dev/null
}
configure /usr/src/googletest "$build/googletest" -DCMAKE_INSTALL_PREFIX="$build/installed" -DBUILD_GMOCK=OFF
cmake --build "$build/googletest" --target install --parallel >/dev/null
configure "$root" "$build/dca" -DDCA_BUILD_TESTS=ON -DGTest_ROOT="$build/installed"
cmake --build "$build/dca" --target dca_cpp_tests --parallel

# QEMU's user mode fails in the child of a process that has threads.
forking=Threading.AChildProcessHasAPoolOfItsOwn:Threading.FewerThreadsThanWantedWillDo
export DCA_NUM_THREADS=4
for isa in portable portable_bf16; do
  DCA_CPU_ISA=$isa qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/dca/tests/cpp/dca_cpp_tests" --gtest_brief=1 \
    --gtest_filter="-$forking"
done
