"""An ASE calculator that lives in another Python environment: one process, one JSON line per question and answer."""

import json
import subprocess
from collections import deque
from threading import Thread

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

SERVE = """
import json, sys
out, sys.stdout = sys.stdout, sys.stderr          # whatever the packages print must not end up between the answers
def answer(d):
    out.write(json.dumps(d) + chr(10)); out.flush()
try:
    calculator = make(*json.loads(sys.argv[1]))
    answer({"ready": True})
except Exception as e:
    answer({"error": f"{type(e).__name__}: {e}"}); sys.exit(1)
from ase import Atoms
for line in sys.stdin:
    try:
        q = json.loads(line)
        atoms = Atoms(numbers=q["numbers"], positions=q["positions"], cell=q["cell"], pbc=True)
        atoms.calc = calculator
        answer({"energy": float(atoms.get_potential_energy()), "forces": atoms.get_forces().tolist(),
                "stress": atoms.get_stress().tolist()})
    except Exception as e:
        answer({"error": f"{type(e).__name__}: {e}"})
"""


class WorkerError(RuntimeError):
    """The worker did not start, died, or its calculator failed; the message carries its reason."""


class WorkerCalculator(Calculator):
    """Energy (eV), forces (eV/angstrom), stress (eV/angstrom^3, Voigt) from `make(path, device)` run by another Python.

    source: code that defines make. WorkerError when the worker cannot start or answers with an error.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, python, source, path=None, device="cpu"):
        super().__init__()
        try:
            self.process = subprocess.Popen([python, "-c", source + SERVE, json.dumps([path, device])], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        except OSError as error:
            raise WorkerError(f"{python}: cannot be started ({error})") from error
        self.said = deque(maxlen=5)                    # read beside: a full pipe would stop the worker
        self.reader = Thread(target=self.said.extend, args=(self.process.stderr,), daemon=True)
        self.reader.start()
        self._answer()

    def _ended(self):
        """Exit code and the last lines of its stderr: a missing package, a library that does not load."""
        code = self.process.wait()
        self.reader.join(5)                            # not for ever: a process that it left behind may hold the pipe
        reason = " ".join("".join(self.said).split())
        return f"the worker ended with exit code {code}" + (f": {reason}" if reason else "")

    def _answer(self):
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": self._ended()}
        if "error" in found:
            raise WorkerError(found["error"])
        return found

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        question = {"numbers": atoms.numbers.tolist(), "positions": atoms.positions.tolist(), "cell": atoms.cell.tolist()}
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(self._ended()) from error
        found = self._answer()
        self.results = {"energy": found["energy"], "free_energy": found["energy"], "forces": np.array(found["forces"]),
                        "stress": np.array(found["stress"])}

    def __del__(self):
        if getattr(self, "process", None):
            self.process.kill()
