"""Relaxations through a GPU: many run side by side, and what they ask of the potential is answered in batches.

Each relaxation is relax.relax, as on a CPU, in a thread of its own with a calculator that waits. When all of them wait, one call of
the network answers all: the same optimisers, the same rows, one launch where there were `size`.
"""

import threading
from collections import deque
from concurrent.futures import Future
from queue import Queue

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

SIZE = 64                      # relaxations side by side


class Gather:
    """Collects questions of `live` threads and lets the last one to ask answer them all with evaluate([Atoms]) -> [results]."""

    def __init__(self, evaluate):
        self.evaluate, self.lock, self.waiting, self.live, self.calls = evaluate, threading.Lock(), [], 0, 0

    def ask(self, atoms):
        """Results {energy, forces, stress} of one crystal; raises what evaluating it raised."""
        future = Future()
        with self.lock:
            self.waiting.append((atoms, future))
            batch = self._complete()
        self._answer(batch)
        return future.result()

    def enter(self):
        with self.lock:
            self.live += 1

    def leave(self):
        """A thread has no more work: nobody waits for it."""
        with self.lock:
            self.live -= 1
            batch = self._complete()
        self._answer(batch)

    def _complete(self):
        if not self.waiting or len(self.waiting) < self.live:
            return []
        batch, self.waiting = self.waiting, []
        return batch

    def _answer(self, batch):
        """All at once; when that fails, one by one, so that only the crystal that is to blame fails."""
        if not batch:
            return
        self.calls += 1
        try:
            found = self.evaluate([atoms for atoms, _ in batch])
        except Exception:                                            # whichever crystal it was says so below
            return self._one_by_one(batch)
        for (_, future), results in zip(batch, found, strict=True):
            future.set_result(results)

    def _one_by_one(self, batch):
        for atoms, future in batch:
            try:
                future.set_result(self.evaluate([atoms])[0])
            except Exception as error:
                future.set_exception(error)


class Waiting(Calculator):
    """An ASE calculator that asks a Gather."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, gather):
        super().__init__()
        self.gather = gather

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results = self.gather.ask(self.atoms)


def sevennet(calculator):
    """evaluate([Atoms]) of a SevenNetCalculator: one forward pass over the joined graphs of all crystals."""
    import sevenn._keys as key
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from torch_geometric.data import Batch
    model = calculator.model
    model.set_is_batch_data(True)

    def evaluate(crystals):
        graphs = [AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(a, calculator.cutoff)) for a in crystals]
        for graph in graphs if calculator.modal else ():
            graph[key.DATA_MODALITY] = calculator.modal
        out = model(Batch.from_data_list(graphs).to(calculator.device))
        plain = lambda name: out[name].detach().cpu().numpy().astype(float)
        energy, forces, stress = plain(key.PRED_TOTAL_ENERGY), plain(key.PRED_FORCE), -plain(key.PRED_STRESS)[:, [0, 1, 2, 4, 5, 3]]
        parts = np.split(forces, np.cumsum([len(a) for a in crystals])[:-1])
        return [{"energy": e, "free_energy": e, "forces": f, "stress": s} for e, f, s in zip(energy.tolist(), parts, stress, strict=True)]

    return evaluate


def _next(todo):
    try:
        return todo.popleft()
    except IndexError:                                               # empty, or another thread was quicker
        return None


def run(jobs, work, gather, size=SIZE):
    """work(job, calculator) of all jobs, `size` (1 or more) side by side; yields what each returns as it comes, raises what it raises."""
    if size < 1:
        raise ValueError(f"{size} relaxations side by side: 1 or more")
    todo, found = deque(jobs), Queue()

    def thread():
        try:
            while (job := _next(todo)) is not None:
                found.put((work(job, Waiting(gather)), None))
        except BaseException as error:
            found.put((None, error))
        finally:
            gather.leave()

    threads = [threading.Thread(target=thread, daemon=True) for _ in range(min(size, len(jobs)))]
    for _ in threads:                                                # all are counted before the first one asks
        gather.enter()
    for t in threads:
        t.start()
    try:
        for _ in jobs:
            row, error = found.get()
            if error is not None:
                raise error
            yield row
    finally:
        todo.clear()                                                 # an interrupted call starts nothing new
