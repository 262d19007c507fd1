#!/usr/bin/env bash
# `make gpu`: build, check, test, measure and sanitize on a machine with a CUDA GPU and nvcc, in minutes. Uses the Python that
# has torch; mmkernels goes into build/gpu/site, nothing else is installed. Each step has a time limit and a log in
# build/gpu, a failed one does not stop the next, and build/gpu/report.md says what came of all. `run.sh build tests` runs
# these steps only.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null || {
  echo "make gpu: $python sees no CUDA GPU through torch; choose another Python with: make gpu PYTHON=..."
  exit 1
}
out=build/gpu
mkdir -p "$out"
export PYTHONPATH="$PWD/$out/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # torch's deterministic mode, which the tests use, may ask for it
status=0
: > "$out/steps.tsv"

# step NAME SECONDS COMMAND...: runs a command with a limit, its output in NAME.log, its result in steps.tsv.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" >> "$out/steps.tsv"
  printf '%-28s %s (%s s)\n' "$name" "$([ "$code" = 0 ] && echo passed || echo "FAILED, code $code")" "$((SECONDS - start))"
  [ "$code" = 0 ]
}

# One build gives the package and the driver, for the GPU of this machine alone.
build() {
  step build 300 "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
    --target "$out/site" --config-settings=build-dir="$out/build" --config-settings=cmake.define.MMKERNELS_CUDA=ON \
    --config-settings=cmake.define.MMKERNELS_GPU_CHECK=ON --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=native . || return
  "$python" -P -m mmkernels | tee "$out/info.txt"
}

ops() { for file in csrc/include/mmkernels/*.h; do basename "$file" .h; done | grep -xF -f <(ls mmkernels/ops); }

driver() {
  local failed=0
  for op in $(ops); do step "driver-$op" 60 "$out/build/mmkernels_gpu_check" "$op" || failed=1; done
  return $failed
}

# The ops on the device; in as many processes as there is pytest-xdist for.
tests() {
  local processes=()
  "$python" -c "import xdist" 2> /dev/null && processes=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  OMP_NUM_THREADS=1 step tests 240 "$python" -P -m pytest -q --tb=short --maxfail=200 -p no:cacheprovider \
    "${processes[@]}" --junitxml="$out/tests.xml" tests/gpu tests/ops -k "cuda or gpu"
}

benches() { step benches 240 "$python" -P -m benches --quick --seconds 1 --output "$out/benches.json"; }

# All at once: each takes one core, and little of the GPU.
sanitizers() {
  local failed=0 running=()
  for tool in memcheck racecheck initcheck synccheck; do
    for op in $(ops); do
      step "$tool-$op" 200 compute-sanitizer --tool "$tool" --error-exitcode 1 "$out/build/mmkernels_gpu_check" "$op" &
      running+=($!)
    done
  done
  for process in "${running[@]}"; do wait "$process" || failed=1; done
  return $failed
}

for name in ${*:-build driver tests benches sanitizers}; do
  "$name" || status=1
  [ "$name" = build ] && [ "$status" != 0 ] && tail -30 "$out/build.log" && break
done
"$python" -P tests/gpu/report.py "$out"
exit $status
