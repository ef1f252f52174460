"""Answers that outlive a kill: what was asked of a potential once is read again, not computed again."""

import json
import time
from pathlib import Path

from . import relax


class Ledger:
    """Expensive answers as JSON lines: an equal question is not asked twice, so a killed run repeats its random stream and goes on."""

    def __init__(self, path):
        self.path, self.seconds, self.asked = Path(path), 0.0, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.known = relax.read_rows(self.path)
        relax._mend(self.path)

    def ask(self, kind, cells, answer, notes=None):
        """Rows for cells, in order. answer(cells) yields a dict per cell; each is written as it comes, with its note and CPU seconds."""
        keys = [relax.key_of(c, kind, "") for c in cells]
        new = {k: i for i, k in reversed(list(enumerate(keys))) if k not in self.known}
        start, order = time.process_time(), sorted(new.values())
        for i, row in zip(order, answer([cells[i] for i in order]) if order else ()):
            row = {"key": keys[i], "kind": kind, "seconds": round(time.process_time() - start, 3)} | (notes[i] if notes else {}) | row
            start, self.known[keys[i]] = time.process_time(), json.loads(json.dumps(row))          # what a resumed run will read
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.asked += len(cells)
        self.seconds += sum(self.known[k]["seconds"] for k in dict.fromkeys(keys))
        return [self.known[k] for k in keys]
