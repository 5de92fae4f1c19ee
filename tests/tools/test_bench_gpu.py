"""The script for a rented GPU, with a Python that only writes down what it is asked for."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench_gpu.sh"
FAKE = r"""#!/bin/bash
out=$(dirname "$0")/out
case "${0##*/} $*" in
    nvidia-smi*) echo "${FREE:-80000}" ;;
    nproc*) echo "${CORES:-16}" ;;
    *"-c import xdist") exit "${NO_XDIST:-0}" ;;
    *"-c import matplotlib") exit "${NO_MATPLOTLIB:-0}" ;;
    *) echo "$*" >> "$(dirname "$0")/calls" ;;&
    *"-m pytest"*)
        echo "= FAILURES ="; echo "test_a.py:3: in test_a"; echo "= slowest 15 durations ="
        head -c 50000 /dev/zero | tr '\0' '.'; echo; echo "1 failed, 456 passed"
        touch "$out/tests.xml"; exit "${TESTS_STATUS:-0}" ;;
    *"fast.benchmarks "*) touch "$out"/{NVIDIA-H100.json,{bars,roofline,scaling,stages}.png}; echo "benchmark table" ;;
    *benchmarks.tuning*) touch "$out/tuning.json"; echo "tuned"; exec sleep "${TUNE_SECONDS:-0}" ;;
    *tools/sanitize.py*) touch "$out/sanitize.json"; echo "memcheck: 10 clean"; exit "${SANITIZE_STATUS:-0}" ;;
    *tools/profile_kernels.py*) touch "$out/profile.json"; echo "bound by latency" ;;
esac
"""
# What Python is asked for.
INSTALL = "-m pip install --quiet --no-deps --no-build-isolation -e ."
TESTS = "-m pytest -m gpu -q -p no:cacheprovider --tb=short --durations=15 --maxfail=60 --junitxml=OUT/tests.xml"
PARALLEL = f"{TESTS} -n {{}} --dist worksteal".format
BENCHMARKS = "-u -m infimm_fast.benchmarks{} --budget N --out OUT".format
TUNE = "-u -m infimm_fast.benchmarks.tuning --plan benchmarks/results/tuning_plan_sm90.json --out OUT --budget N"
SANITIZE, PROFILE = (f"-u tools/{tool}.py --out OUT --budget N" for tool in ("sanitize", "profile_kernels"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return what runs the script; its result has what Python was asked, except for imports, and the folder."""
    calls, out = tmp_path / "calls", tmp_path / "out"
    # This machine's memory and cores have no say in the number of workers.
    for name in ("python", "nvidia-smi", "nproc"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    for name in ("WORKERS", "TESTS"):
        monkeypatch.delenv(name, raising=False)

    def go(asked="", budget="100", command=(), **environment):
        calls.write_text("")
        command, environment = command or [SCRIPT, out, budget, *asked.split()], os.environ | environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
        asked = calls.read_text().replace(str(out), "OUT")
        done.calls, done.out = re.sub(r"(--budget) \d+", r"\1 N", asked).splitlines(), out
        done.told = [int(seconds) for seconds in re.findall(r"--budget (\d+)", asked)]
        return done

    return go


def results(done):
    """Return part -> (result, exit status, files) of the summary."""
    rows = done.stdout.split("=== summary\n")[1].splitlines()[1:-1]
    fields = [row.replace("not run", "not-run").split() for row in rows]
    return {part: (result, int(status), files) for part, result, status, _, *files in fields}


@pytest.mark.parametrize(
    ("asked", "environment", "calls", "told"),
    [
        # Shares follow the weights, and time that is not used goes on.
        # Nothing takes any time here: 5 of 16, 5 of 11, 3 of 6 and all of 400 seconds, less a few for the script itself.
        ("", {"WORKERS": "5"}, [PARALLEL(5), f"{BENCHMARKS('')} --plot", TUNE, SANITIZE, PROFILE], [125, 181, 200, 400]),
        ("first", {"WORKERS": "5"}, [f"{PARALLEL(5)} tests/ops", f"{BENCHMARKS(' ops cross')} --plot"], [400]),
        ("second", {}, [f"{BENCHMARKS(' decode vision')} --plot", TUNE], [200, 400]),
        ("profile", {}, [PROFILE], [400]),
        ("ops e2e", {"NO_MATPLOTLIB": "1"}, [BENCHMARKS(" ops e2e")], [400]),
        ("tests", {"NO_XDIST": "1"}, [TESTS], []),
        ("tests", {}, [PARALLEL(12)], []),
        ("tests", {"CORES": "6"}, [PARALLEL(4)], []),
        ("tests", {"CORES": "1"}, [PARALLEL(1)], []),
        ("tests", {"FREE": "25000"}, [PARALLEL(4)], []),
        ("tests", {"WORKERS": "3", "TESTS": '-k "a or b" -x'}, [f"{PARALLEL(3)} -k a or b -x"], []),
    ],
)
def test_what_is_run_and_how_long(run, asked, environment, calls, told):
    done = run(asked, budget="400", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.calls == [INSTALL, *calls]
    assert all(most - 10 <= seconds <= most for seconds, most in zip(done.told, told, strict=True)), done.told
    assert ("no pictures" in done.stdout) == ("NO_MATPLOTLIB" in environment)


def test_every_part_leaves_its_files_and_many_are_packed(run):
    assert {file.name for file in run("tests").out.iterdir()} == {"tests.txt", "tests.xml", "summary.txt"}
    done = run(budget="400")
    files = {
        "tests": "tests.txt tests.xml",
        "sanitize": "sanitize.json sanitize.txt",
        "benchmarks": "NVIDIA-H100.json bars.png benchmarks.txt roofline.png scaling.png stages.png",
        "tune": "tune.txt tuning.json",
        "profile": "profile.json profile.txt",
    }
    assert results(done) == {part: ("passed", 0, names.split()) for part, names in files.items()}
    assert "=== tests: 1" in done.stdout  # 6 of 22: 109 seconds at most
    reports = {"NVIDIA-H100.json", "sanitize.json", "tuning.json", "profile.json"}
    assert {file.name for file in done.out.iterdir()} == {*reports, "summary.txt", "logs.tar.gz"}
    with tarfile.open(done.out / "logs.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
    assert {"tests.txt", "tests.xml", "bars.png", "sanitize.txt"} <= packed


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
    done = run(asked, **environment)
    (outcome, *others) = (results(done)[part] for part in asked.split())
    assert done.returncode == status and outcome[:2] == first and words in done.stdout
    assert all(other[0] == "passed" for other in others)


def test_the_output_is_short_and_shows_the_first_failure_and_the_counts(run):
    done = run(TESTS_STATUS="1")
    assert len(done.stdout) < 12000
    for words in ("test_a.py:3: in test_a", "1 failed, 456 passed", "bound by latency"):
        assert words in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_hands_everything_on(run, tmp_path):
    variables = [f"OUT={tmp_path / 'out'}", "SECTIONS=tests", "BUDGET=90", "WORKERS=7", "TESTS=-k 'a or b'"]
    done = run(command=["make", "-C", SCRIPT.parents[1], "bench-gpu", f"PYTHON={tmp_path / 'python'}", *variables])
    assert done.returncode == 0 and done.calls == [INSTALL, f"{PARALLEL(7)} -k a or b"]
    assert "of 90 seconds" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"), [(["", "60"], "no folder was given"), (["out", "soon"], "accepted are whole seconds")]
)
def test_bad_arguments(run, arguments, message):
    done = run(command=[SCRIPT, *arguments])
    assert done.returncode == 2 and message in done.stderr
