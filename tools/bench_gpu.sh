#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch, triton, transformers and pytest, and nothing fetched.
#
# Usage: bench_gpu.sh FOLDER BUDGET [part or benchmark section ...]      (make bench-gpu OUT=FOLDER SECTIONS="...")
#
# tools/README.md lists the parts and their files. BUDGET seconds hold for all of it. A part gets a share of what is left by
# its weight among the parts still to come, so that a short one leaves its time to the others and the last one gets the rest.
# It is told its share, and stopped GRACE seconds after it; tests that are stopped report what they have done.
#
# Only the end of each part and one summary go to the standard output, for callers who see no more than its tail.
#
# Environment: PYTHON; WORKERS, processes of the tests; TESTS, more arguments for pytest, as in TESTS='-k "decode and not
# views"'. Exit status: 1 if a part failed, 3 if one was not run, 2 for wrong arguments, else 0.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
folder=${1:-}
budget=${2:-540}
shift $(($# < 2 ? $# : 2))
if [ -z "$folder" ]; then
    echo "error: no folder was given; say make bench-gpu OUT=folder" >&2
    exit 2
fi
if ! [[ $budget =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the budget is '$budget'; accepted are whole seconds" >&2
    exit 2
fi
mkdir -p "$folder" || exit 2

readonly GRACE=15       # seconds between the end of a part's share and its stop
readonly LEAST=10       # seconds with which a part is worth beginning
readonly NOT_RUN=3      # exit status of a part that could not run; watch.py has the same
readonly MOST_FILES=7   # that come back unpacked
readonly WORKER_MIB=6000 # GPU memory of one process of the tests
declare -rA WEIGHT=([tests]=6 [sanitize]=3 [benchmarks]=5 [tune]=5 [profile]=3)
readonly ORDER=(tests benchmarks tune sanitize profile)

# --- what is asked for -------------------------------------------------------------------------------------------------
declare -A wanted=()
sections=()
test_paths=()
for name in "$@"; do
    case $name in
        first) wanted[tests]=yes && wanted[benchmarks]=yes && sections+=(ops cross) && test_paths=(tests/ops) ;;
        second) wanted[benchmarks]=yes && wanted[tune]=yes && sections+=(decode vision) ;;
        tests | sanitize | benchmarks | tune | profile) wanted[$name]=yes ;;
        *) wanted[benchmarks]=yes && sections+=("$name") ;;
    esac
done
parts=()
for name in "${ORDER[@]}"; do
    if [ $# -eq 0 ] || [ -n "${wanted[$name]:-}" ]; then parts+=("$name"); fi
done

# --- the parts; each takes the seconds it has, and its output goes to its log ------------------------------------------
# A tool in our package gets its share as --budget. Ctrl-C makes pytest report before it ends: sent once (a second one, to
# the whole group, would cut off the report), and not ignored, as it is by whatever a shell starts in the background.
limited() {
    local seconds=$1
    shift
    timeout --foreground --signal=INT --kill-after=20 $((seconds + GRACE)) env --default-signal=INT "$@"
}

test_workers() {
    local cores workers free
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc would print those instead
    workers=$((cores - 2))
    if ((workers > 12)); then workers=12; fi
    free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits 2>/dev/null | head -n 1)
    if [[ $free =~ ^[0-9]+$ ]] && ((workers > free / WORKER_MIB)); then workers=$((free / WORKER_MIB)); fi
    echo $((workers > 1 ? workers : 1))
}

run_tests() {
    local arguments=() parallel=()
    mapfile -t arguments < <(xargs -r printf '%s\n' <<<"${TESTS:-}")
    if "$python" -c "import xdist" 2>/dev/null; then
        parallel=(-n "${WORKERS:-$(test_workers)}" --dist worksteal)
    fi
    # pytest shortens its lines to the terminal's width unless it runs in CI.
    CI=1 limited $(($1 - GRACE)) "$python" -m pytest -m gpu -q -p no:cacheprovider --tb=short --durations=15 --maxfail=60 \
        --junitxml="$folder/tests.xml" "${parallel[@]}" "${arguments[@]}" "${test_paths[@]}"
}

run_sanitize() {
    limited "$1" "$python" -u tools/sanitize.py --out "$folder" --budget "$1"
}

run_benchmarks() {
    local plot=()
    if "$python" -c "import matplotlib" 2>/dev/null; then
        plot=(--plot)
    else
        echo "no pictures: matplotlib is not installed"
    fi
    limited "$1" "$python" -u -m infimm_fast.benchmarks "${sections[@]}" --budget "$1" --out "$folder" "${plot[@]}"
}

run_tune() {
    limited "$1" "$python" -u -m infimm_fast.benchmarks.tuning --plan benchmarks/results/tuning_plan_sm90.json \
        --out "$folder" --budget "$1"
}

run_profile() {
    limited "$1" "$python" -u tools/profile_kernels.py --out "$folder" --budget "$1"
}

# --- what is shown of them ---------------------------------------------------------------------------------------------
excerpt() {
    local log=$folder/$1.txt
    case $1 in
        tests)
            # The first failures with their tracebacks, then the list of all and the counts.
            sed -n '/^=* \(FAILURES\|ERRORS\) =*$/,/^=* \(slowest\|short test summary\|warnings summary\)/p' "$log" | head -c 2500
            tail -c 2000 "$log"
            ;;
        profile) tail -c 3200 "$log" ;;
        *) tail -c 1300 "$log" ;;
    esac
}

word_of() {
    case $1 in
        0) echo passed ;;
        "$NOT_RUN") echo "not run" ;;
        124 | 137) echo "stopped" ;;
        *) echo "failed" ;;
    esac
}

# --- run them ----------------------------------------------------------------------------------------------------------
"$python" -m pip install --quiet --no-deps --no-build-isolation -e . || exit 2

rm -f "$folder/summary.txt"
total=0
for name in "${parts[@]}"; do total=$((total + WEIGHT[$name])); done
failed=0
missing=0
for name in "${parts[@]}"; do
    left=$((budget - SECONDS))
    share=$((left > 0 ? left * WEIGHT[$name] / total : 0))
    total=$((total - WEIGHT[$name]))
    begun=$SECONDS
    touch "$folder/.begun"
    if ((share < LEAST)); then
        echo "not run: $left of $budget seconds are left" >"$folder/$name.txt"
        status=$NOT_RUN
    else
        echo "=== $name: $share seconds"
        "run_$name" "$share" >"$folder/$name.txt" 2>&1
        status=$?
    fi
    case $status in
        0) ;;
        "$NOT_RUN") missing=1 ;;
        *) failed=1 ;;
    esac
    excerpt "$name"
    echo
    files=$(find "$folder" -maxdepth 1 -type f -newer "$folder/.begun" ! -name '.*' -printf '%f\n' | sort | tr '\n' ' ')
    printf '%-11s %-8s %6s %7s  %s\n' "$name" "$(word_of $status)" "$status" "$((SECONDS - begun))" "$files" \
        >>"$folder/summary.txt"
done
rm -f "$folder/.begun"

if (($(find "$folder" -type f | wc -l) > MOST_FILES)); then
    # The paths are listed first, so that the archive does not find itself.
    mapfile -t packed < <(cd "$folder" && find . -type f ! -name '*.json' ! -name summary.txt ! -name logs.tar.gz)
    tar -C "$folder" -czf "$folder/logs.tar.gz" "${packed[@]}" && (cd "$folder" && rm -f "${packed[@]}")
fi

echo "=== summary"
printf '%-11s %-8s %6s %7s  %s\n' part result status seconds files
cat "$folder/summary.txt"
echo "$SECONDS of $budget seconds; in $folder: $(find "$folder" -type f -printf '%f ')"
if ((failed)); then exit 1; fi
if ((missing)); then exit $NOT_RUN; fi
