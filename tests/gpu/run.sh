#!/usr/bin/env bash
# `make gpu`: build, test, sanitize and measure on a machine with a CUDA GPU and nvcc, in minutes. Uses the Python that has torch;
# mmkernels goes into build/gpu/site, nothing else is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null || {
  echo "make gpu: $python sees no CUDA GPU through torch; choose another Python with: make gpu PYTHON=..."
  exit 1
}

echo "== build"
MMKERNELS_CUDA=ON "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
  --target build/gpu/site .
export PYTHONPATH="$PWD/build/gpu/site:$PWD"
"$python" -P -m mmkernels

echo "== tests"
status=0
"$python" -P -m pytest -q -x --maxfail=20 tests/gpu tests/ops -k "cuda or gpu" || status=$?

echo "== sanitizers"
cmake -S . -B build/gpu/check -G Ninja -DMMKERNELS_CUDA=ON -DMMKERNELS_GPU_CHECK=ON -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > build/gpu/check.log
cmake --build build/gpu/check --target mmkernels_gpu_check >> build/gpu/check.log
./build/gpu/check/mmkernels_gpu_check || status=$?
for tool in memcheck racecheck initcheck synccheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 ./build/gpu/check/mmkernels_gpu_check || {
    echo "compute-sanitizer $tool found errors, or does not run on this machine"
    status=1
  }
done

echo "== benches"
"$python" -P -m benches || status=$?
exit $status
