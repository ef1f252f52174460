"""From run files to the table of claims.

Every experiment leaves one JSON file per run under data/results/<experiment>/.
They are joined with data/reference/paper.csv, what the paper states, into
data/results/claims.csv, from which README and book print.

    python -m meidnet_core.results      # rebuild claims.csv, print the counts
"""

import json
import math
import os
from pathlib import Path

from .config import Config
from .provenance import ROOT, environment
from .seeds import mean_interval

REFERENCE = ROOT / "data" / "reference" / "paper.csv"
RESULTS = ROOT / "data" / "results"

REFERENCE_COLUMNS = "id where quantity unit paper sense tolerance target".split()
COLUMNS = "id where quantity unit paper ours sd n_seeds split verdict source".split()
BUILT = "by construction"                                       # in the split of a row that no run could miss
VERDICTS = ["exceeded", "reproduced", "undecided", "not reproduced", "not yet"]
KEYS = ("experiment run config seed data_set split n metrics claims wall_time_s "
        "device threads cpu packages commit date").split()
HEADLINE = ("abs.", "t1.", "f2", "f3b.", "s3.gap_mae", "f4.", "ts1.gap_dft_mae", "x.")  # prefixes
FEW = 4  # run files named one by one in `source`; more, and the folder is named


def read_reference(path=REFERENCE):
    """What the paper states, one row per claim: columns REFERENCE_COLUMNS.

    paper, tolerance and target are floats (NaN where empty), the rest text.
    Raises ValueError for wrong columns or a row that no verdict could use.
    """
    import pandas as pd
    text = {name: str for name in ["id", "where", "quantity", "unit", "sense"]}
    table = pd.read_csv(path, dtype=text)
    if list(table.columns) != REFERENCE_COLUMNS:
        raise ValueError(f"{path}: columns are {list(table.columns)}, expected {REFERENCE_COLUMNS}")
    table = table.fillna({name: "" for name in text})
    unequal, target = table["sense"].isin(["higher", "lower"]), table["target"].notna()
    for bad, reason in [
        (table["id"].duplicated(), "the id appears twice"),
        (~unequal & (table["sense"] != "match"), "sense must be higher, lower or match"),
        (table["paper"].notna() & table["tolerance"].isna(), "a number needs a tolerance"),
        (target & ~unequal, "a target needs higher or lower"),
    ]:
        if bad.any():
            raise ValueError(f"{path}: {table['id'][bad].iloc[0]}: {reason}")
    return table


def read_table_s1(path=None):
    """The paper's 19 materials: columns formula, target_gap_ev (eV), in_materials_project."""
    import pandas as pd
    return pd.read_csv(path or REFERENCE.parent / "table_s1_formulas.csv")


def done(experiment, seed, config=None):
    """Is there a run file of this experiment and seed, and, where a config is given, of that one?"""
    path = RESULTS / experiment / f"seed{seed}.json"
    return path.exists() and (config is None or _telling(config) == _telling(read_run(experiment, f"seed{seed}")["config"]))


def read_run(experiment, run):
    """One run file of data/results as a dict."""
    return json.loads((RESULTS / experiment / f"{run}.json").read_text())


def _telling(config):
    """A config as text, without its seed and what equals a default: an older run that lacks the newest fields says the same."""
    default = Config().to_dict()
    return json.dumps({k: v for k, v in config.items() if k != "seed" and (k, v) not in default.items()}, sort_keys=True, default=_plain)


def _missing(value):
    return value is None or math.isnan(value)


def verdict(paper, ours, sense, tolerance, target):
    """One of VERDICTS for a value of ours; missing numbers are None or NaN.

    not yet         no value of ours
    exceeded        sense higher or lower: ours is better than the paper by more
                    than the tolerance, or, where a target is given, reaches it
                    (no number in the paper: shown here, beyond what it reports;
                    99.85 of 100 %: no room for the tolerance)
    reproduced      within the tolerance of the paper or better than it (match:
                    within); or neither number nor target, and a run draws it too
    not reproduced  all else
    (undecided is for _row to say: of several seeds, or where a run says so)
    Raises ValueError for an unknown sense.
    """
    if sense not in ("higher", "lower", "match"):
        raise ValueError(f"unknown sense {sense!r}")
    if _missing(ours):
        return "not yet"
    if _missing(paper) and _missing(target):
        return "reproduced"
    tiny = 1e-9  # an edge such as 0.91 - 0.02 belongs to the band whatever its last bit says
    if sense == "match":
        return "reproduced" if abs(ours - paper) <= tolerance + tiny else "not reproduced"
    sign = 1 if sense == "higher" else -1
    if not _missing(target) and sign * (ours - target) >= -tiny:
        return "exceeded"
    if _missing(paper) or sign * (ours - paper) < -tolerance - tiny:
        return "not reproduced"
    beaten = _missing(target) and sign * (ours - paper) > tolerance + tiny
    return "exceeded" if beaten else "reproduced"


def _plain(value):
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def _refuse_nan(value, name, path):
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {name} is {value}; a run file holds finite numbers only")
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_nan(item, f"{name}.{key}", path)


def _write_atomic(path, text):
    """Write beside the file and rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _normalise(claims, split, known, path, reference):
    """Claims as {id: {"value": float, "split": text}}; refuses what no table could show."""
    out = {}
    for name, claim in claims.items():
        if name not in known:
            raise ValueError(f"{path}: unknown claim id {name!r}; {reference} lists the known ones")
        claim = claim if isinstance(claim, dict) else {"value": claim}
        value, where = claim.get("value"), claim.get("split", split)
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}: claim {name} is {value!r}, expected a finite number")
        if not isinstance(where, str) or not where:
            raise ValueError(f"{path}: claim {name} has the split {where!r}, expected a name")
        out[name] = {"value": float(value), "split": where} | ({"undecided": True} if claim.get("undecided") else {})
    return out


def write_run(experiment, run, *, config, seed, data_set, split, n, metrics, claims,
              wall_time_s, root=RESULTS, reference=REFERENCE, **extra):
    """Write data/results/<experiment>/<run>.json and return its path.

    config: dict, the same for all seeds of an experiment but for its "seed";
    seed: int, or None for a run without chance; split: what was scored ("train",
    "test", ...; figures on the training set must say "train"); n: how many items
    were scored; metrics: dict; claims: {id of paper.csv: number, or {"value":
    number, "split": name}, with "undecided": True where no run could tell}; wall_time_s: seconds. The environment is added;
    extra entries are kept and may replace those of the environment (device=...).
    Raises ValueError for an unknown claim id or a NaN or infinity anywhere,
    TypeError for what JSON cannot hold.
    """
    path = Path(root) / experiment / f"{run}.json"
    record = dict(experiment=experiment, run=run, config=config, seed=seed, data_set=data_set,
                  split=split, n=n, metrics=metrics, claims=claims, wall_time_s=wall_time_s)
    record = {**record, **environment(), **extra}
    record = json.loads(json.dumps(record, default=_plain))
    _refuse_nan(record, "run", path)
    known = set(read_reference(reference)["id"])
    record["claims"] = _normalise(record["claims"], split, known, path, reference)
    _write_atomic(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def restate(experiment, run, claims, root=RESULTS, reference=REFERENCE):
    """Replace the claims of a stored run by `claims` (as in `write_run`): its numbers stay, what they are called follows the code."""
    path = Path(root) / experiment / f"{run}.json"
    record = json.loads(path.read_text(), parse_constant=_no_constant)
    record["claims"] = _normalise(claims, record["split"], set(read_reference(reference)["id"]), path, reference)
    _write_atomic(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def _no_constant(name):
    raise ValueError(f"{name} is not standard JSON")


def read_runs(root=RESULTS):
    """All run files under root, in the order of their paths, each a dict with its "path" added.

    Raises ValueError naming the file for malformed JSON, a missing key, or a
    file whose place does not agree with its experiment and run.
    """
    runs = []
    for path in sorted(Path(root).rglob("*.json")):
        try:
            record = json.loads(path.read_text(), parse_constant=_no_constant)
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON run file: {error}") from error
        missing = [key for key in KEYS if key not in record] if isinstance(record, dict) else KEYS
        if missing:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        if (record["experiment"], record["run"]) != (path.parent.name, path.stem):
            raise ValueError(f"{path}: says it is {record['experiment']}/{record['run']}")
        runs.append({**record, "path": path})
    return runs


def _by_claim(runs, known, reference):
    """{claim id: [(run, claim as _normalise gives it), ...]}"""
    found = {}
    for run in runs:
        claims = _normalise(run["claims"], run["split"], known, run["path"], reference)
        for name, claim in claims.items():
            found.setdefault(name, []).append((run, claim))
    return found


def _check_alike(name, entries):
    """A mean over runs means something only if they differ in nothing but the seed."""
    def sole(what, values, text=json.dumps):
        texts = sorted({text(value) for value in values})
        if len(texts) > 1:
            paths = ", ".join(str(run["path"]) for run, _ in entries)
            raise ValueError(f"claim {name}: runs mix {what}: {', '.join(texts)} ({paths})")
    sole("experiments", [run["experiment"] for run, _ in entries])
    sole("splits", [claim["split"] for _, claim in entries])
    sole("data sets", [run["data_set"] for run, _ in entries])
    sole("configs", [run["config"] for run, _ in entries], _telling)
    seeds = [run["seed"] for run, _ in entries]
    if len(set(seeds)) < len(seeds):
        folder = entries[0][0]["path"].parent
        raise ValueError(f"claim {name}: seeds appear twice: {seeds} ({folder})")


def _source(entries):
    paths = [run["path"].resolve() for run, _ in entries]
    paths = paths if len(paths) <= FEW else [paths[0].parent]
    paths = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in paths]
    return ";".join(path.as_posix() for path in paths)


def _row(claim, entries):
    """One row of claims.csv from a row of the reference and the runs that carry its id."""
    import pandas as pd
    row = {**{name: getattr(claim, name) for name in COLUMNS[:5]},
           "ours": None, "sd": None, "n_seeds": None, "split": "", "source": ""}
    values = pd.Series([ours["value"] for _, ours in entries], dtype=float)
    if entries:
        _check_alike(claim.id, entries)
        row.update(ours=values.mean(), sd=values.std(ddof=1), n_seeds=len(values),
                   split=entries[0][1]["split"], source=_source(entries))
    unclear = any("undecided" in ours for _, ours in entries) or straddles(values, claim)
    return {**row, "verdict": "undecided" if unclear else decided(row["ours"], claim)}


def decided(value, claim):
    """`verdict` of a value on a row of the reference."""
    return verdict(claim.paper, value, claim.sense, claim.tolerance, claim.target)


def disagree(values, claim):
    """Do readings of one quantity get different verdicts on a row of the reference?"""
    return len({decided(value, claim) for value in values}) > 1


def straddles(values, claim):
    """Does the 95 % interval of the mean of values hold some that are "not reproduced" by a row of the reference, and others?

    Asked at both ends and where the interval is nearest to the paper's value: other seeds may turn such a row round.
    """
    if len(values) < 2:
        return False
    low, high = mean_interval(values)
    points = [low, high] + ([] if _missing(claim.paper) else [min(max(claim.paper, low), high)])
    return len({decided(value, claim) == "not reproduced" for value in points}) == 2


def join_claims(reference=REFERENCE, root=RESULTS):
    """The table of claims: one row per row of the reference, columns COLUMNS.

    ours is the mean over the seeds of the one experiment that carries the claim, sd
    their sample standard deviation (empty for one seed). Raises ValueError when the
    runs of a claim mix experiments, splits, data sets or configs (the seed aside) or
    repeat a seed, and for what read_runs refuses.
    """
    import pandas as pd
    table = read_reference(reference)
    found = _by_claim(read_runs(root), set(table["id"]), reference)
    rows = [_row(claim, found.get(claim.id, [])) for claim in table.itertuples(index=False)]
    numbers = {"paper": float, "ours": float, "sd": float, "n_seeds": "Int64"}
    return pd.DataFrame(rows, columns=COLUMNS).astype(numbers)


def write_claims(reference=REFERENCE, root=RESULTS, path=None):
    """Join, write claims.csv (to root unless a path is given) and return the table."""
    claims = join_claims(reference, root)
    text = claims.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    _write_atomic(Path(path or Path(root) / "claims.csv"), text)
    return claims


def read_claims(path=RESULTS / "claims.csv"):
    """claims.csv as a DataFrame: numbers as floats (NaN where empty), the rest as text."""
    import pandas as pd
    numbers = ["paper", "ours", "sd", "n_seeds"]
    claims = pd.read_csv(path, dtype={name: str for name in COLUMNS if name not in numbers})
    return claims.fillna({name: "" for name in COLUMNS if name not in numbers})


def counts_line(claims):
    """One sentence: how many rows have which verdict."""
    parts = ", ".join(f"{(claims['verdict'] == name).sum()} {name}" for name in VERDICTS)
    good = claims[claims["verdict"] == "reproduced"]
    count = {"have no number in the paper": good["paper"].isna().sum(), "hold by construction": good["split"].str.contains(BUILT).sum()}
    told = ", ".join(f"{n} {what}" for what, n in count.items() if n)
    note = f" (of the reproduced {told})" if told else ""
    return f"{len(claims)} rows: {parts}{note}."


def _number(value, digits=4):
    if _missing(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.{digits}g}"


def _ours(row):
    if _missing(row.ours):
        return "–"
    sd = "" if _missing(row.sd) else f" ± {_number(row.sd, 2)} ({row.n_seeds:.0f} seeds)"
    return _number(row.ours) + sd


def _markdown(claims, every):
    lines = ["| Claim | Where | Unit | Ours | Split | Paper | Verdict |",
             "|---|---|---|--:|---|--:|---|"]
    for row in claims.itertuples(index=False):
        cells = [row.quantity, row.where, row.unit, _ours(row), row.split, _number(row.paper)]
        cells = [cell.replace("|", r"\|") for cell in [*cells, row.verdict]]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) if len(claims) else "No run carries a headline claim yet."
    return f"{table}\n\n{counts_line(every)}\n"


def headline_markdown(claims_csv=RESULTS / "claims.csv"):
    """Markdown: the headline rows that are done as a table, then the verdicts over all rows."""
    claims = read_claims(claims_csv)
    return _markdown(claims[claims["id"].str.startswith(HEADLINE) & claims["ours"].notna()], claims)


def full_markdown(claims_csv=RESULTS / "claims.csv"):
    """Markdown: every row of claims.csv as a table, then the verdicts over all rows."""
    claims = read_claims(claims_csv)
    return _markdown(claims, claims)


if __name__ == "__main__":
    print(counts_line(write_claims()))
