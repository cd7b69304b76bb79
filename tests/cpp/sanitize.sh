#!/usr/bin/env bash
# Builds and runs the C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer, then those that share work between
# threads with ThreadSanitizer. Ends with an error at the first finding.
#
#   tests/cpp/sanitize.sh [BUILD_FOLDER]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
build=${1:-$root/build/sanitize}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

# Several threads on any machine, so that there is something to race.
export DCA_NUM_THREADS=4
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 die_after_fork=0"  # a test starts threads in a child process

build_with() {  # folder, flags
  cmake -S "$root" -B "$1" "${generator[@]}" -DDCA_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS="$2 -fno-sanitize-recover=all -fno-omit-frame-pointer" >/dev/null
  cmake --build "$1" --target dca_cpp_tests --parallel
}

build_with "$build/address" "-fsanitize=address,undefined"
for isa in portable portable_bf16 avx2 avx512 avx512_bf16 amx_bf16; do
  status=0
  DCA_CPU_ISA=$isa "$build/address/tests/cpp/dca_cpp_tests" --gtest_brief=1 || status=$?
  if [ "$status" -ne 0 ] && [ "$status" -ne 77 ]; then exit "$status"; fi  # 77: this machine has not that set
done

build_with "$build/thread" "-fsanitize=thread"
"$build/thread/tests/cpp/dca_cpp_tests" --gtest_brief=1 \
  --gtest_filter='Threading*:Decode.PrefillAndDecode*:Append.PagedCache:Merge.Weighs*:AttentionShapes.*:Empty*'
echo "no findings"
