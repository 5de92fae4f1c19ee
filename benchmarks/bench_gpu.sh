#!/usr/bin/env bash
# GPU tests, then benchmarks, on a machine with torch, triton, transformers and pytest, and nothing fetched.
# Usage: bench_gpu.sh FOLDER BUDGET [tests] [section ...]; without any both tests and all sections.
# Everything lands in FOLDER: gpu_tests.txt, benchmarks.txt, one JSON file, and pictures where matplotlib is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-}
budget=${2:-540}
shift 2
if [ -z "$folder" ]; then
    echo "error: no folder was given; say make bench-gpu OUT=folder" >&2
    exit 2
fi
mkdir -p "$folder" || exit 2

sections=()
tests=no
for name in "$@"; do
    if [ "$name" = tests ]; then tests=yes; else sections+=("$name"); fi
done
if [ $# -eq 0 ]; then tests=yes; fi

"$python" -m pip install --quiet --no-deps --no-build-isolation -e . || exit 2

failed=0
if [ $tests = yes ]; then
    "$python" -m pytest -m gpu 2>&1 | tee "$folder/gpu_tests.txt"
    status=${PIPESTATUS[0]}
    echo "exit status of the GPU tests: $status" | tee -a "$folder/gpu_tests.txt"
    if [ "$status" -ne 0 ]; then failed=1; fi
fi
if [ ${#sections[@]} -gt 0 ] || [ $# -eq 0 ]; then
    plot=()
    if "$python" -c "import matplotlib" 2>/dev/null; then
        plot=(--plot)
    else
        echo "no pictures: matplotlib is not installed"
    fi
    "$python" -u -m infimm_fast.benchmarks.run "${sections[@]}" --budget "$budget" --out "$folder" "${plot[@]}" 2>&1 |
        tee "$folder/benchmarks.txt"
    status=${PIPESTATUS[0]}
    echo "exit status of the benchmarks: $status" | tee -a "$folder/benchmarks.txt"
    if [ "$status" -ne 0 ]; then failed=1; fi
fi
exit $failed
