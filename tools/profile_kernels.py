"""Profile the Triton kernels with Nsight Compute: ``python tools/profile_kernels.py --out FOLDER``.

Each case of `launch.py` at a model's sizes runs twice in a process of its own, one case after the other, and the second
run's kernels are profiled. What ncu prints of them lands in ``FOLDER/ncu.txt``.
"""

from __future__ import annotations

import re
import shutil

from infimm_fast.kernels.common.cases import PROFILE
from launch import cases_with, kernel_names
from watch import last_line, launch_command, parser_of, watch_cases

PROGRAM = "ncu"
# Whole sections, whose metrics have other names on every GPU generation, rather than metrics by name: one that is not
# known would end the run.
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "SchedulerStats", "LaunchStats")
SECTIONS += ("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")


def ncu_command(tool: str, name: str) -> list[str]:
    """Return the command that profiles the second run of a case; there is but one tool."""
    kernels = "|".join(kernel_names(*cases_with(PROFILE)[name]))
    command = [PROGRAM, "--page", "details", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--target-processes", "application-only"]
    command += ["--kernel-name-base", "function", "--kernel-name", f"regex:^({kernels})$"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    return [*command, *launch_command("--profile", name)]


def judge(name: str, status: int, output: str) -> tuple[str, str]:
    """Return the outcome and why: every kernel of the case has a heading of its own in what ncu prints."""
    expected = kernel_names(*cases_with(PROFILE)[name])
    seen = {kernel for kernel in expected if re.search(rf"^\s*{kernel}\b.*\(\d+, \d+, \d+\)", output, re.MULTILINE)}
    if not seen:
        refusal = re.search(r"^==ERROR== *(.*)$", output, re.MULTILINE)
        return "not run", refusal[1] if refusal else last_line(output)
    missing = [kernel for kernel in expected if kernel not in seen]
    if missing:
        return "failed", f"no launch of {', '.join(missing)} was seen"
    return ("failed", last_line(output)) if status else ("passed", "")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a case failed, else 3 if one was not run, else 0."""
    options = parser_of(__doc__, list(cases_with(PROFILE))).parse_args(arguments)
    missing = "" if shutil.which(PROGRAM) else f"{PROGRAM} is not installed"
    # One at a time: the profiler reads counters of the whole device.
    return watch_cases(options, "profile.json", ("ncu",), ncu_command, judge, missing=missing, workers=1)


if __name__ == "__main__":
    raise SystemExit(main())
