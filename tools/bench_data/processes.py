"""Processor time and memory of this process and its children, from Linux's /proc."""

import os
import time
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """Process ids of this process's children that still run."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def cpu_seconds() -> float:
    """Processor time of this process and its living children so far; the children's counts in hundredths."""
    total = time.process_time()
    for pid in children():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended in this moment
            continue
        total += (int(fields[11]) + int(fields[12])) / _TICK
    return total


def resident(pid: int) -> tuple[float, float]:
    """(resident memory, its part that belongs to this process alone), in MB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["RssAnon"].split()[0]) / 1024


def processor() -> str:
    """The processor's name, as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"
