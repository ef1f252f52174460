"""Where a run took place: device, threads, processor, packages, commit and date, for its run file."""

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch numpy pandas pymatgen ase gpaw sevenn chgnet phonopy vibroml".split()
WRITTEN = ("results", "checkpoints", "candidates", "polymorphs", "dft", "phonons")


def commit(folder=ROOT):
    """Commit of the code, with "-dirty" when files differ from it; "unknown" outside git.

    What runs write into data/ (WRITTEN) does not count: it changes no code.
    """
    def git(*words):
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        head = git("rev-parse", "--verify", "HEAD")
        changed = git("status", "--porcelain", "--", ".", *(f":(exclude)data/{name}" for name in WRITTEN))
        return head + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu():
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return name[1] if name else platform.processor() or platform.machine()


def _versions():
    installed = {found.name: found.version for found in metadata.distributions()}
    known = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **known}


def environment():
    """Where a run took place: device, threads, cpu, packages, commit, date (UTC)."""
    torch = sys.modules.get("torch")  # not loaded: its device and threads were not used
    gpu = torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0     # one that this process used
    return {"device": torch.cuda.get_device_name() if gpu else "cpu",
            "threads": torch.get_num_threads() if torch is not None else None,
            "cpu": _cpu(), "packages": _versions(), "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds")}
