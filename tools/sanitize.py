"""Run compute-sanitizer over every Triton kernel: ``python tools/sanitize.py --out FOLDER``.

Each tool watches each small case of `launch.py` in a process of its own, several at a time, with PyTorch's caching
allocator switched off: inside its large blocks a read beside a tensor would stay unseen. What could not be run is "not
run", never clean.
"""

from __future__ import annotations

import re
import shutil

from infimm_fast.kernels.common.cases import SMALL
from launch import cases_with
from watch import last_line, launch_command, parser_of, watch_cases

PROGRAM = "compute-sanitizer"
# In the order of what they find in kernels without atomics: where time is short, the last ones are left out.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Memory beside every allocation, so that a stray access does not land in the next one. PyTorch asks the driver questions
# whose answer is an error; those are not the kernels'.
_OPTIONS = {"memcheck": ["--padding", "65536", "--report-api-errors", "no"]}
# The exit status that the tool gives for errors; the program itself ends with 0, 1 or 2, or by a signal.
_ERROR_STATUS = 99
# The tool's own words where it watches nothing; it counts such a refusal as errors of the program.
_REFUSAL = re.compile(r"Device not supported|Failed to initialize|Internal Sanitizer Error|unrecogni[sz]ed option", re.I)


def judge(name: str, status: int, output: str) -> tuple[str, str]:
    """Return the outcome and why: a tool that found nothing says so in a summary, and the program succeeded too."""
    refusal = _REFUSAL.search(output)
    if refusal or "SUMMARY: " not in output:
        return "not run", refusal[0] if refusal else last_line(output)
    if status == 0:
        return "passed", ""
    complaint = re.search(r"^=+ (?!COMPUTE-SANITIZER)(\S.*)$", output, re.MULTILINE)
    return "failed", complaint[1] if status == _ERROR_STATUS and complaint else last_line(output)


def sanitizer_command(tool: str, name: str) -> list[str]:
    """Return the command that runs a case under a tool."""
    options = ["--tool", tool, "--error-exitcode", str(_ERROR_STATUS), *_OPTIONS.get(tool, [])]
    return [PROGRAM, *options, *launch_command(name)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if anything is wrong, else 3 if anything was not run, else 0."""
    parser = parser_of(__doc__, list(cases_with(SMALL)))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    options = parser.parse_args(arguments)
    missing = "" if shutil.which(PROGRAM) else f"{PROGRAM} is not installed"
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = (options, "sanitize.json", options.tools, sanitizer_command, judge)
    return watch_cases(*watched, missing=missing, environment=variables)


if __name__ == "__main__":
    raise SystemExit(main())
