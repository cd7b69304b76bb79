#!/usr/bin/env bash
# Builds dca_ext on a machine with a CUDA GPU, checks it there and times it, without a network. See --help.
set -uo pipefail

usage() {
  cat <<'TEXT'
Builds dca_ext on a machine with a CUDA GPU, checks it there and times it, without a network.

  bench/gpu_check.sh [options]

  --build DIR            take this CMake build folder instead of building
  --cutlass DIR          folder that holds cute/ and cutlass/ (environment: CUTLASS_DIR)
  --gtest DIR            GoogleTest's source folder, where GoogleTest is not installed
  --python PROGRAM       the Python that has torch (python3)
  --architectures LIST   for DCA_CUDA_ARCHITECTURES ("80" or "90" by the GPU, else the project's default)
  --instances LIST       for DCA_CUDA_INSTANCES (the project's default)
  --variants             also build the variants of the prefill kernels and time them (step variants)
  --sanitize-filter P    GoogleTest filter for compute-sanitizer (bf16 at head_dim 64 and 128, append, merge)
  --only STEPS           these steps only, separated by commas
  --skip STEPS           not these
  --limit SECONDS        end after about so long (590); what is left then is reported as not run
  --out DIR              results folder (bench/results/DATE-DEVICE)
  --archive FILE         also pack the results folder into this .tar.gz
  --jobs N               parallel compilations and test processes (one per processor; at most 16 of the latter)

Steps: machine gtest configure build modules cuda_tests pytest memcheck racecheck dca_bench dca_bench_sm80 variants
bench_attention cache_steps.
Needs nvcc, cmake, a C++ compiler, and a Python with torch and pybind11. Each step's output is in STEP.log of the
results folder, the figures are in dca_bench.jsonl, attention.json and cache_steps.json. A failing step does not stop
the next ones; the exit status is 0 if all steps that ran succeeded, 1 if one failed, 2 if nothing can run here, 130 if
interrupted.
TEXT
}

die() { printf 'gpu_check.sh: %s\n' "$*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build='' cutlass=${CUTLASS_DIR:-} gtest='' python=python3 architectures='' instances='' filter='' only='' skip=''
limit=590 out='' archive='' variants='' jobs=$(nproc 2>/dev/null || echo 4)
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --variants) variants=1; shift; continue ;;
    --*=*) option=${1%%=*} value=${1#*=}; shift; set -- "$option" "$value" "$@"; continue ;;
  esac
  [ $# -ge 2 ] || die "$1 needs a value; gpu_check.sh --help lists the options."
  case $1 in
    --build) build=$2 ;;
    --cutlass) cutlass=$2 ;;
    --gtest) gtest=$2 ;;
    --python) python=$2 ;;
    --architectures) architectures=$2 ;;
    --instances) instances=$2 ;;
    --sanitize-filter) filter=$2 ;;
    --only) only=$2 ;;
    --skip) skip=$2 ;;
    --limit) limit=$2 ;;
    --out) out=$2 ;;
    --archive) archive=$2 ;;
    --jobs) jobs=$2 ;;
    *) die "unknown option '$1'; gpu_check.sh --help lists them." ;;
  esac
  shift 2
done
for number in "$limit" "$jobs"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "--limit and --jobs must be positive integers; got '$number'."
done
for folder in "$build" "$cutlass" "$gtest"; do
  [ -z "$folder" ] || [ -d "$folder" ] || die "there is no folder '$folder'."
done
known=(machine gtest configure build modules cuda_tests pytest memcheck racecheck dca_bench dca_bench_sm80 variants
  bench_attention cache_steps)
for step in ${only//,/ } ${skip//,/ }; do
  [[ " ${known[*]} " == *" $step "* ]] || die "there is no step '$step'; gpu_check.sh --help lists them."
done

# --- The machine ---

# The toolkit and its runtime library. nvcc may be a link or a script elsewhere, so what it suggests is only looked at.
nvcc=$(command -v nvcc) && nvcc=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
cuda_lib=''
for cuda in "${CUDA_HOME:-}" "$nvcc" /usr/local/cuda; do
  for folder in "$cuda/lib64" "$cuda"/targets/*/lib; do
    if [ -n "$cuda" ] && [ -e "$folder/libcudart.so" ]; then cuda_lib=$folder; break 2; fi
  done
done
PATH=$PATH:$cuda/bin
command -v "$python" >/dev/null || die "there is no '$python'; name the Python that has torch by --python."
python=$(command -v "$python")
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$device" ] || device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null)
[ -n "$device" ] || die "this machine has no CUDA device: neither nvidia-smi nor torch names one."
if [ -z "$architectures" ]; then
  # Only this GPU's own: it halves the compile time. Machine code for 8.0 runs on every 8.x, that for 9.0 on 9.0.
  case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) in
    8.*) architectures=80 ;;
    9.0) architectures=90 ;;
  esac
fi
name=$(printf '%s' "$device" | tr -cs 'A-Za-z0-9' '-')
out=${out:-$root/bench/results/$(date -u +%Y-%m-%d)-${name%-}}
mkdir -p "$out" || die "cannot create the results folder '$out'."
out=$(cd "$out" && pwd)
prebuilt=$build
build=${build:-$out/build}
mkdir -p "$build"
build=$(cd "$build" && pwd)
# The package dca_ext, Python sources and compiled modules: nothing is written into the source tree.
site=$out/build/site
if [ -z "${DCA_COMMIT:-}" ]; then DCA_COMMIT=$(git -C "$root" describe --always --dirty '--exclude=*' 2>/dev/null); fi
[ -n "$DCA_COMMIT" ] || unset DCA_COMMIT

# --- Steps: each is a function that runs in a shell of its own, under a time limit ---

step_machine() {
  date -u
  nvidia-smi
  # Read only: the settings of the card stay as they are.
  nvidia-smi --format=csv --query-gpu=name,driver_version,compute_cap,clocks.max.sm,clocks.max.mem,power.limit
  nvcc --version || return 1
  cmake --version | head -n 1
  c++ --version | head -n 1
  "$python" -c 'import sys, torch; print("Python", sys.version); print("torch", torch.__version__, torch.version.cuda)'
}

step_gtest() {
  cmake -S "$gtest" -B "$build/googletest" -DCMAKE_BUILD_TYPE=Release -DBUILD_GMOCK=OFF \
    -DCMAKE_INSTALL_PREFIX="$build/gtest" -DCMAKE_INSTALL_LIBDIR=lib &&
    cmake --build "$build/googletest" --parallel "$jobs" && cmake --install "$build/googletest"
}

# Whether CMake finds GoogleTest, asked in a project of one line.
has_gtest() {
  mkdir -p "$build/gtest_probe"
  printf 'cmake_minimum_required(VERSION 3.18)\nproject(probe CXX)\nfind_package(GTest REQUIRED)\n' \
    >"$build/gtest_probe/CMakeLists.txt"
  cmake -S "$build/gtest_probe" -B "$build/gtest_probe/build" -DCMAKE_PREFIX_PATH="$build/gtest" >/dev/null 2>&1
}

torch_dir() {
  "$python" -c 'import importlib.util as u; print(next(iter(u.find_spec("torch").submodule_search_locations)))'
}

step_configure() {
  local options=(-DDCA_CUDA=ON -DDCA_BUILD_PYTHON=ON -DDCA_BUILD_BENCH=ON -DCMAKE_BUILD_TYPE=Release)
  if has_gtest; then options+=(-DDCA_BUILD_TESTS=ON "-DCMAKE_PREFIX_PATH=$build/gtest"); fi
  if command -v ninja >/dev/null; then options+=(-G Ninja); fi
  if [ -n "$cutlass" ]; then options+=("-DCUTLASS_DIR=$(cd "$cutlass" && pwd)"); fi
  if [ -n "$architectures" ]; then options+=("-DDCA_CUDA_ARCHITECTURES=$architectures"); fi
  if [ -n "$instances" ]; then options+=("-DDCA_CUDA_INSTANCES=$instances"); fi
  if [ -n "$variants" ]; then options+=(-DDCA_CUDA_VARIANTS=ON); fi
  options+=("-DPython_EXECUTABLE=$python" "-DDCA_TORCH_DIR=$(torch_dir)")
  options+=("-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)")
  printf '%q ' cmake -S "$root" -B "$build/cmake" "${options[@]}"; echo
  cmake -S "$root" -B "$build/cmake" "${options[@]}"
}

step_build() {
  local targets=(_core _dca_torch dca_bench)
  if grep -q '^DCA_BUILD_TESTS:BOOL=ON' "$build/cmake/CMakeCache.txt"; then targets+=(dca_cuda_tests); fi
  # What one target lacks must not keep the others from being built.
  local keep_going=(-k)
  if [ -f "$build/cmake/build.ninja" ]; then keep_going=(-k 0); fi
  cmake --build "$build/cmake" --parallel "$jobs" --target "${targets[@]}" -- "${keep_going[@]}"
}

step_modules() {
  local suffix
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  rm -rf "$site" && mkdir -p "$site" && cp -r "$root/dca_ext" "$site/" || return 1
  rm -f "$site"/dca_ext/*.so
  cp "$tree"/_dca_torch*.so "$site/dca_ext/" || return 1
  if [ -f "$tree/_core$suffix" ]; then
    cp "$tree/_core$suffix" "$site/dca_ext/" || return 1
  else
    # The build folder is another Python's. The operators hold no Python, and this module is one file.
    echo "building _core for this Python"
    # shellcheck disable=SC2046  # two options
    c++ -O1 -shared -fPIC -std=c++17 -fvisibility=hidden -I"$root/csrc/include" $("$python" -m pybind11 --includes) \
      "$root/csrc/python/core_module.cpp" "$tree/libdca.a" -L"$cuda_lib" -Wl,-rpath,"$cuda_lib" -lcudart -pthread \
      -o "$site/dca_ext/_core$suffix" || return 1
  fi
  cd "$out" && PYTHONPATH=$site "$python" -c 'import dca_ext; print(dca_ext.build_info())'
}

# A build folder from elsewhere does not know where this machine keeps the CUDA runtime.
cuda_tests() { LD_LIBRARY_PATH=$cuda_lib:${LD_LIBRARY_PATH:-} "$@"; }

# Small shapes of every kind of kernel: the sanitizers take many times a test's own time.
sanitize_filter() {
  local small='*CudaPrefill*bf16_dim64:*CudaPrefill*bf16_dim128:*CudaDecode*bf16_dim64:*CudaDecode*bf16_dim128'
  small+=':*CudaE4M3*bf16_dim64:CudaE4M3Append*:CudaRotateKeys*:CudaAppend*:CudaMerge*'
  echo "${filter:-$small-*LongC*:*FarMemory*}"
}

# dca_cuda_tests in several processes that share the device: most of a test's time is the reference's, or the
# sanitizer's, on the host. Words go in front of the program; the tests of far memory need most of the device's memory.
test_shards() {  # filter, words...
  local filter=$1 shards=$((jobs < 16 ? jobs : 16)) shard children=() failed=0
  shift
  for ((shard = 0; shard < shards; ++shard)); do
    GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard cuda_tests "$@" "$tree/tests/cpp/cuda/dca_cuda_tests" \
      --gtest_brief=1 --gtest_filter="$filter" >"$out/$step.$shard.tmp" 2>&1 &
    children+=($!)
  done
  for ((shard = 0; shard < shards; ++shard)); do
    wait "${children[$shard]}" || failed=1
    cat "$out/$step.$shard.tmp"
    rm -f "$out/$step.$shard.tmp"
  done
  return "$failed"
}

step_cuda_tests() {
  local failed=0
  test_shards '*-*FarMemory*' || failed=1
  cuda_tests "$tree/tests/cpp/cuda/dca_cuda_tests" --gtest_brief=1 --gtest_filter='*FarMemory*' || failed=1
  return "$failed"
}

step_memcheck() {
  test_shards "$(sanitize_filter)" compute-sanitizer --tool memcheck --error-exitcode 9
}

step_racecheck() {
  test_shards "$(sanitize_filter)" compute-sanitizer --tool racecheck --error-exitcode 9
}

# From the results folder: in the source tree, the package's own folder would be imported.
step_pytest() {
  cd "$out" && PYTHONPATH=$site PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -m gpu -q -p no:cacheprovider \
    --continue-on-collection-errors -c "$root/pyproject.toml" --rootdir "$root" "$root/tests"
}

step_dca_bench() {
  local failed=0 line
  local small="--batch=2 --heads=8 --kv-heads=2 --head-dim=128 --seqlen=700 --chunk-len=256 --verify --repeat=3"
  rm -f "$out/dca_bench.jsonl"
  while read -r line; do
    echo "dca_bench $line --device=cuda"
    # shellcheck disable=SC2086  # words
    if cuda_tests "$tree/bench/cpp/dca_bench" $line --device=cuda --json "$out/dca_bench.tmp"; then
      cat "$out/dca_bench.tmp" >>"$out/dca_bench.jsonl"
    else
      failed=1
    fi
  done <<LINES
prefill $small
decode $small
decode $small --page-size=64 --queries=3
decode $small --cache-dtype=e4m3
append $small
append $small --cache-dtype=e4m3
append $small --page-size=64
merge $small
prefill --heads=32 --kv-heads=8 --seqlen=16384
prefill --heads=64 --kv-heads=8 --seqlen=16384
prefill --heads=32 --kv-heads=8 --head-dim=64 --seqlen=16384
prefill --heads=32 --kv-heads=8 --seqlen=65536 --repeat=5
prefill --heads=32 --kv-heads=8 --seqlen=131072 --repeat=3
decode --heads=64 --kv-heads=8 --seqlen=131072
decode --heads=64 --kv-heads=8 --seqlen=131072 --page-size=64
decode --heads=64 --kv-heads=8 --seqlen=32768 --batch=32
decode --heads=64 --kv-heads=8 --seqlen=131072 --cache-dtype=e4m3
decode --heads=64 --kv-heads=8 --seqlen=32768 --batch=32 --cache-dtype=e4m3
decode --heads=32 --kv-heads=8 --seqlen=32768 --queries=2048
decode --heads=32 --kv-heads=8 --seqlen=32768 --queries=2048 --cache-dtype=e4m3
append --kv-heads=8 --seqlen=131072
merge --heads=32 --seqlen=32768
prefill --heads=32 --kv-heads=8 --seqlen=1048576 --repeat=1 --warmup=0
LINES
  rm -f "$out/dca_bench.tmp"
  return "$failed"
}

# The kernels for every device, where the device would choose Hopper's.
step_dca_bench_sm80() {
  DCA_CUDA_KERNELS=sm80 cuda_tests "$tree/bench/cpp/dca_bench" prefill --heads=32 --kv-heads=8 --seqlen=16384 \
    --device=cuda --json "$out/dca_bench_sm80.json"
}

# What a GPU has to choose between, tested, and one line of JSON for each; docs/kernels.md names them.
step_variants() {
  local failed=0 kernels shape names=(sm90:other_turns sm90:per_tile)
  for kernels in "${names[@]}"; do
    [ -x "$tree/tests/cpp/cuda/dca_cuda_tests" ] || break
    echo "$kernels: tests"
    DCA_CUDA_KERNELS=$kernels test_shards 'Sm90/CudaPrefill*bf16_dim64:Sm90/CudaPrefill*bf16_dim128' || failed=1
  done
  rm -f "$out/variants.jsonl"
  while read -r shape; do
    for kernels in '' sm90 sm90:three_consumers "${names[@]}" sm80; do  # '': what calls get
      if [[ $kernels = *:* && $shape = decode* ]]; then continue; fi
      if [[ $kernels = sm90:three_consumers && $shape != *--head-dim=64* ]]; then continue; fi
      echo "$kernels $shape"
      # shellcheck disable=SC2086  # words
      if DCA_CUDA_KERNELS=$kernels cuda_tests "$tree/bench/cpp/dca_bench" $shape --device=cuda \
        --json "$out/variants.tmp"; then
        cat "$out/variants.tmp" >>"$out/variants.jsonl"
      else
        failed=1
      fi
    done
  done <<'LINES'
prefill --heads=32 --kv-heads=8 --head-dim=128 --seqlen=16384
prefill --heads=32 --kv-heads=8 --head-dim=128 --seqlen=65536 --repeat=5
prefill --heads=32 --kv-heads=8 --head-dim=64 --seqlen=16384
prefill --heads=32 --kv-heads=8 --head-dim=64 --seqlen=65536 --repeat=5
prefill --heads=32 --kv-heads=8 --head-dim=128 --seqlen=4096
prefill --heads=32 --kv-heads=8 --head-dim=128 --seqlen=16384 --chunk-len=6144
prefill --heads=32 --kv-heads=8 --head-dim=64 --seqlen=16384 --chunk-len=6144
decode --heads=64 --kv-heads=8 --seqlen=65536
decode --heads=64 --kv-heads=8 --seqlen=131072
decode --heads=64 --kv-heads=8 --seqlen=131072 --page-size=64
decode --heads=64 --kv-heads=8 --seqlen=131072 --cache-dtype=e4m3
decode --heads=32 --kv-heads=8 --seqlen=32768 --queries=2048
decode --heads=32 --kv-heads=8 --seqlen=32768 --queries=2048 --cache-dtype=e4m3
decode --heads=32 --kv-heads=8 --head-dim=64 --seqlen=131072
LINES
  rm -f "$out/variants.tmp"
  return "$failed"
}

step_bench_attention() {
  local options=(--quick --out "$out")
  if [ -n "$variants" ]; then options+=(--kernels sm90:other_turns); fi
  cd "$out" && PYTHONUNBUFFERED=1 PYTHONPATH=$site "$python" "$root/bench/bench_attention.py" "${options[@]}"
}

step_cache_steps() {
  cd "$out" && PYTHONUNBUFFERED=1 PYTHONPATH=$site "$python" "$root/bench/cache_steps.py" --random llama3-8b \
    --tokens 32768 --dtype bfloat16 --device cuda --json "$out/cache_steps.json"
}

# --- Running them ---

steps=() codes=() times=() notes=()
failed=0 interrupted=0 child=''

record() { steps+=("$1") codes+=("$2") times+=("$3") notes+=("$4"); }

wanted() {
  if [ -n "$only" ]; then [[ ",$only," == *",$1,"* ]]; else [[ ",$skip," != *",$1,"* ]]; fi
}

skip_step() {  # step, reason
  if wanted "$1"; then record "$1" skipped - "$2"; printf -- '--- %s skipped: %s\n' "$1" "$2"; fi
}

run_step() {  # step, seconds
  wanted "$1" || return 0
  local left=$((limit - SECONDS)) seconds=$2 begin=$SECONDS code note=''
  if [ "$interrupted" -eq 1 ]; then record "$1" 'not run' - interrupted; return 0; fi
  if [ "$left" -lt 5 ]; then record "$1" 'not run' - "--limit of $limit s reached"; failed=1; return 0; fi
  if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
  printf -- '--- %s (at most %d s)\n' "$1" "$seconds"
  # In the background, so that this shell hears of an interrupt at once.
  timeout --kill-after=10 "$seconds" bash -c "set -uo pipefail; step=$1; step_$1" >"$out/$1.log" 2>&1 &
  child=$!
  wait "$child"
  code=$?
  if [ "$interrupted" -eq 1 ]; then
    wait "$child"
    note=interrupted
  elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    note="ended after $seconds s"
  fi
  child=''
  if [ "$1" = pytest ] && [ "$code" -eq 5 ]; then
    code=skipped note='no test is marked gpu'
  elif [ "$code" -ne 0 ]; then
    failed=1
    tail -n 15 "$out/$1.log"
  fi
  record "$1" "$code" "$((SECONDS - begin))" "$note"
}

code_of() {  # step -> its code, empty if it did not run
  local i
  for i in "${!steps[@]}"; do
    if [ "${steps[$i]}" = "$1" ]; then echo "${codes[$i]}"; fi
  done
}

modules_ready() {
  local code
  code=$(code_of modules)
  [ -d "$site/dca_ext" ] && { [ -z "$code" ] || [ "$code" = 0 ]; }
}

interrupt() {
  interrupted=1
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap interrupt INT TERM

tree=${prebuilt:+$build}
tree=${tree:-$build/cmake}
export root build tree site out python cuda_lib cutlass gtest architectures instances filter variants jobs PATH
while read -r _ _ function; do
  case $function in step_* | cuda_tests | test_shards | has_gtest | torch_dir | sanitize_filter) export -f "${function?}" ;; esac
done < <(declare -F)
if [ -n "${DCA_COMMIT:-}" ]; then export DCA_COMMIT; fi

run_step machine 60
if [ -n "$prebuilt" ]; then
  for step in gtest configure build; do skip_step "$step" "--build was given"; done
else
  if [ -n "$gtest" ]; then run_step gtest 90; fi
  run_step configure 90
  run_step build 400
fi
run_step modules 90

if [ -x "$tree/tests/cpp/cuda/dca_cuda_tests" ]; then
  run_step cuda_tests 120
else
  skip_step cuda_tests "there is no dca_cuda_tests: no GoogleTest (see --gtest), or its build failed"
fi
if modules_ready; then
  run_step pytest 120
else
  skip_step pytest "the Python modules were not built"
fi
for step in memcheck racecheck; do
  if ! [ -x "$tree/tests/cpp/cuda/dca_cuda_tests" ]; then
    skip_step "$step" "there is no dca_cuda_tests"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip_step "$step" "there is no compute-sanitizer"
  else
    run_step "$step" 90
  fi
done
if [ -x "$tree/bench/cpp/dca_bench" ]; then
  run_step dca_bench 150
  run_step dca_bench_sm80 30
  if [ -n "$variants" ]; then run_step variants 150; fi
else
  skip_step dca_bench "there is no dca_bench: its build failed"
fi
if modules_ready; then
  run_step bench_attention 180
  run_step cache_steps 90
else
  for step in bench_attention cache_steps; do skip_step "$step" "the Python modules were not built"; done
fi

# --- Summary, last ---

summary() {
  local i
  printf '%s, commit %s, ' "$device" "${DCA_COMMIT:-unknown}"
  printf '%s, %d s in all\n\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$SECONDS"
  printf '%-16s  %7s  %7s  %s\n' step rc seconds note
  for i in "${!steps[@]}"; do
    printf '%-16s  %7s  %7s  %s\n' "${steps[$i]}" "${codes[$i]}" "${times[$i]}" "${notes[$i]}"
  done | sed 's/ *$//'
}

if [ -f "$out/bench_attention.log" ]; then sed -n '/^Results: /,$p' "$out/bench_attention.log"; echo; fi
summary | tee "$out/summary.txt"
echo "results: $out"
if [ -n "$archive" ]; then
  # Not what was built: the logs and the figures.
  tar -C "$out" --exclude=./build -czf "$archive" . || failed=1
fi
if [ "$interrupted" -eq 1 ]; then exit 130; fi
exit "$failed"
