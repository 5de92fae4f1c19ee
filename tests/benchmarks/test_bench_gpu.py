"""The script for a rented GPU, with a Python that only writes down what it is asked for."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench_gpu.sh"
INSTALL = "-m pip install --quiet --no-deps --no-build-isolation -e ."
TESTS = "-m pytest -m gpu -q -p no:cacheprovider --tb=short --durations=15 --maxfail=60 --junitxml=OUT/tests.xml"
FAKE_PYTHON = r"""#!/bin/bash
echo "$*" >> "$CALLS"
out=$(dirname "$CALLS")/out
case "$*" in
    "-c import xdist") exit "${NO_XDIST:-0}" ;;
    "-c import matplotlib") exit "${NO_MATPLOTLIB:-0}" ;;
    *"-m pytest"*)
        echo "= FAILURES ="; echo "test_a.py:3: in test_a"; echo "= slowest 15 durations ="
        head -c 50000 /dev/zero | tr '\0' '.'; echo; echo "1 failed, 456 passed"
        touch "$out/tests.xml"; exit "${TESTS_STATUS:-0}" ;;
    *tools/sanitize.py*) echo "memcheck: 10 clean"; echo '{}' > "$out/sanitize.json"; exit "${SANITIZE_STATUS:-0}" ;;
    *"fast.benchmarks "*)
        echo "benchmark table"; for name in bars roofline scaling stages; do touch "$out/$name.png"; done
        echo '{}' > "$out/NVIDIA-H100.json" ;;
    *benchmarks.tuning*)
        if [ -n "${TUNE_SECONDS:-}" ]; then exec sleep "$TUNE_SECONDS"; fi
        echo "tuned"; echo '{}' > "$out/tuning.json" ;;
    *tools/profile_kernels.py*) echo "bound by latency" ; echo '{}' > "$out/profile.json" ;;
esac
"""


def run_script(command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, **options)


@pytest.fixture
def run(tmp_path):
    """Return what runs the script; its result has the calls of Python, less the imports tried, and the folder."""
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def go(*asked, budget="100", command=(), **environment):
        calls.write_text("")
        # Cores and GPU of the machine that runs this test have no say in the number of workers.
        (shadow := tmp_path / "shadow").mkdir(exist_ok=True)
        for tool, variable, value in (("nvidia-smi", "FREE", "80000"), ("nproc", "CORES", "16")):
            (shadow / tool).write_text(f"#!/bin/sh\necho {environment.pop(variable, value)}\n")
            (shadow / tool).chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if name not in ("WORKERS", "TESTS")}
        ours = {"PATH": f"{shadow}:{os.environ['PATH']}", "PYTHON": str(python), "CALLS": str(calls), **environment}
        done = run_script(command or [SCRIPT, out, budget, *asked], env=inherited | ours)
        lines = calls.read_text().replace(str(out), "OUT").splitlines()
        done.calls, done.out = [line for line in lines if not line.startswith("-c import")], out
        return done

    return go


def results(done):
    """Return part -> (result, exit status, files) of the summary."""
    rows = done.stdout.split("=== summary\n")[1].splitlines()[1:-1]
    fields = [row.replace("not run", "not-run").split() for row in rows]
    return {part: (result, int(status), files) for part, result, status, _, *files in fields}


def told(done, module):
    """Return the budget that a part was told."""
    (call,) = [call for call in done.calls if module in call]
    return int(call.split("--budget ")[1].split()[0])


def test_all_parts_in_their_order_with_shares_of_the_budget(run):
    done = run(budget="400", WORKERS="5")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["-m pip", "-m pytest", "fast.benchmarks ", "benchmarks.tuning", "tools/sanitize", "tools/profile_kernels"]
    assert [name for call in done.calls for name in names if name in call] == names
    assert done.calls[0] == INSTALL and done.calls[1] == f"{TESTS} -n 5 --dist worksteal"
    tuned = f"--plan benchmarks/results/tuning_plan_sm90.json --out OUT --budget {told(done, 'benchmarks.tuning')}"
    assert f"-u -m infimm_fast.benchmarks.tuning {tuned}" in done.calls
    files = {
        "tests": "tests.txt tests.xml",
        "sanitize": "sanitize.json sanitize.txt",
        "benchmarks": "NVIDIA-H100.json bars.png benchmarks.txt roofline.png scaling.png stages.png",
        "tune": "tune.txt tuning.json",
        "profile": "profile.json profile.txt",
    }
    assert results(done) == {part: ("passed", 0, names.split()) for part, names in files.items()}
    # Shares follow the weights, and time that is not used goes on.
    # Nothing takes any time here: 5 of 16, 5 of 11, 3 of 6 and all of 400 seconds, less a few for the script itself.
    expected = {"fast.benchmarks ": 125, "benchmarks.tuning": 181, "sanitize": 200, "profile_kernels": 400}
    for module, seconds in expected.items():
        assert seconds - 12 <= told(done, module) <= seconds, module
    assert "=== tests: 1" in done.stdout  # 6 of 22: 109 seconds at most


def test_two_calls_hold_what_matters_most(run):
    first = run("first", budget="400", WORKERS="5")
    assert first.calls[1] == f"{TESTS} -n 5 --dist worksteal tests/ops" and len(first.calls) == 3
    assert "fast.benchmarks ops cross --budget" in first.calls[2]
    second = run("second", budget="300")
    assert "fast.benchmarks decode vision --budget" in second.calls[1] and "benchmarks.tuning" in second.calls[2]
    assert len(second.calls) == 3


def test_one_part_gets_the_whole_budget(run):
    done = run("profile", budget="300")
    assert len(done.calls) == 2 and 290 <= told(done, "profile_kernels") <= 300


@pytest.mark.parametrize(
    ("asked", "environment", "status", "first", "words"),
    [
        # The last part gets all that the first one left.
        ("sanitize profile", {"budget": "15"}, 3, ("not-run", 3), "seconds are left"),
        pytest.param("tune", {"budget": "11", "TUNE_SECONDS": "60"}, 1, ("stopped", 124), "", marks=pytest.mark.slow),
        ("tests sanitize", {"TESTS_STATUS": "1"}, 1, ("failed", 1), ""),
        ("sanitize profile", {"SANITIZE_STATUS": "3"}, 3, ("not-run", 3), ""),
    ],
    ids=["no time left", "stopped", "failed", "could not run"],
)
def test_a_first_part_without_success_does_not_stop_the_rest(run, asked, environment, status, first, words):
    done = run(*asked.split(), **environment)
    (outcome, *others) = (results(done)[part] for part in asked.split())
    assert done.returncode == status and outcome[:2] == first and words in done.stdout
    assert all(other[0] == "passed" for other in others)


def test_the_output_is_short_and_shows_the_first_failure_and_the_counts(run):
    done = run(TESTS_STATUS="1")
    assert len(done.stdout) < 12000
    assert "test_a.py:3: in test_a" in done.stdout and "1 failed, 456 passed" in done.stdout
    assert "bound by latency" in done.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NO_XDIST": "1"}, ""),
        ({}, " -n 12 --dist worksteal"),
        ({"CORES": "6"}, " -n 4 --dist worksteal"),
        ({"CORES": "1"}, " -n 1 --dist worksteal"),
        ({"FREE": "25000"}, " -n 4 --dist worksteal"),
        ({"WORKERS": "3", "TESTS": '-k "decode and not views" -x'}, " -n 3 --dist worksteal -k decode and not views -x"),
    ],
)
def test_how_the_tests_are_run(run, environment, expected):
    done = run("tests", **environment)
    assert done.calls == [INSTALL, TESTS + expected]


def test_sections_of_the_benchmarks_without_matplotlib(run):
    done = run("ops", "e2e", NO_MATPLOTLIB="1")
    assert done.calls[1] == f"-u -m infimm_fast.benchmarks ops e2e --budget {told(done, 'fast.benchmarks ')} --out OUT"
    assert done.returncode == 0 and "no pictures" in (done.out / "benchmarks.txt").read_text()


def test_logs_and_pictures_are_packed_if_there_are_many_files(run):
    few = run("tests")
    assert {file.name for file in few.out.iterdir()} == {"tests.txt", "tests.xml", "summary.txt"}
    done = run()
    reports = {"NVIDIA-H100.json", "sanitize.json", "tuning.json", "profile.json"}
    assert {file.name for file in done.out.iterdir()} == {*reports, "summary.txt", "logs.tar.gz"}
    with tarfile.open(done.out / "logs.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
    assert {"tests.txt", "tests.xml", "bars.png", "sanitize.txt"} <= packed


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_hands_everything_on(run, tmp_path):
    variables = [f"OUT={tmp_path / 'out'}", "SECTIONS=tests", "BUDGET=90", "WORKERS=7", "TESTS=-k 'a or b'"]
    make = ["make", "-C", SCRIPT.parents[1], "bench-gpu", f"PYTHON={tmp_path / 'python'}", *variables]
    done = run(command=make)
    assert done.returncode == 0 and done.calls == [INSTALL, f"{TESTS} -n 7 --dist worksteal -k a or b"]
    assert "of 90 seconds" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"), [(["", "60"], "no folder was given"), (["out", "soon"], "accepted are whole seconds")]
)
def test_bad_arguments(arguments, message):
    done = run_script([SCRIPT, *arguments])
    assert done.returncode == 2 and message in done.stderr
