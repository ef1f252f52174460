"""The worker in another Python: why it ended. What it answers is in test_potentials.py."""

import sys

import pytest
from ase.build import bulk

from meidnet_core.worker import WorkerCalculator, WorkerError


def test_a_missing_package_of_the_other_python_is_named():
    with pytest.raises(WorkerError, match="exit code 1: .*ModuleNotFoundError: No module named 'no_such_package'"):
        WorkerCalculator(sys.executable, "import no_such_package\n")
    with pytest.raises(WorkerError, match="exit code 3: .*libtorch is too old"):
        WorkerCalculator(sys.executable, "import os, sys\nprint('libtorch is too old', file=sys.stderr, flush=True)\nos._exit(3)\n")


def test_much_noise_neither_stops_the_worker_nor_hides_the_reason():
    source = "import sys\ndef make(path, device):\n    sys.stderr.write('noise\\n' * 100_000)\n    sys.exit('out of memory')\n"
    with pytest.raises(WorkerError, match="exit code 1: noise noise noise noise out of memory"):
        WorkerCalculator(sys.executable, source)


def test_a_worker_that_dies_at_work_tells_its_last_words():
    source = ("import os, sys\nfrom ase.calculators.emt import EMT\nclass Dies(EMT):\n    def calculate(self, *args):\n"
              "        print('last words', file=sys.stderr, flush=True)\n        os._exit(9)\n"
              "def make(path, device):\n    return Dies()\n")
    atoms = bulk("Cu")
    atoms.calc = WorkerCalculator(sys.executable, source)
    for _ in range(2):                                                # the second question finds it gone
        with pytest.raises(WorkerError, match="exit code 9: last words"):
            atoms.get_potential_energy()
