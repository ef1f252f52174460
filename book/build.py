"""Execute the notebooks with papermill and build the book with Jupyter Book."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
SOURCES = ROOT / "notebooks"
EXECUTED = BOOK / "notebooks"
UNFINISHED = BOOK / "_build" / "unfinished"  # a failed run is kept here to be looked at


def declared_parameters(notebook):
    """The wanted parameters can only be passed where the notebook declares them."""
    return set(papermill.inspect_notebook(str(notebook)))


def newest_input(notebook):
    """Time of the last change to the notebook, the package or the data."""
    files = [notebook]
    for folder in (ROOT / "meidnet_core", ROOT / "data"):
        files += [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    return max(f.stat().st_mtime for f in files)


def is_current(notebook, executed, parameters):
    """True when the executed copy is newer than its inputs and had the same parameters."""
    if not executed.exists() or executed.stat().st_mtime < newest_input(notebook):
        return False
    metadata = nbformat.read(executed, as_version=4).metadata
    used = metadata.get("papermill", {}).get("parameters", {})
    return used | {"fresh": None} == parameters | {"fresh": None}


def execute(notebook, executed, parameters):
    """Run one notebook in its own folder; the copy appears only when it went through."""
    unfinished = UNFINISHED / notebook.name
    started = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(unfinished),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            progress_bar=sys.stderr.isatty(),
        )
    except PapermillExecutionError as error:
        sys.exit(f"{error}\n{notebook.name} failed; see {unfinished.relative_to(ROOT)}")
    os.replace(unfinished, executed)
    print(f"    {time.monotonic() - started:.0f} s", flush=True)


def execute_all(wanted):
    """Execute every notebook, in order of name."""
    notebooks = sorted(SOURCES.glob("*.ipynb"))
    if not notebooks:
        sys.exit(f"no notebooks in {SOURCES}")
    for folder in (EXECUTED, UNFINISHED):
        folder.mkdir(parents=True, exist_ok=True)
    for number, notebook in enumerate(notebooks, 1):
        declared = declared_parameters(notebook)
        parameters = {name: value for name, value in wanted.items() if name in declared}
        executed = EXECUTED / notebook.name
        current = not wanted["fresh"] and is_current(notebook, executed, parameters)
        note = "up to date" if current else parameters
        print(f"[{number}/{len(notebooks)}] {notebook.name} {note}", flush=True)
        if not current:
            execute(notebook, executed, parameters)


def remove_stale():
    """Drop executed copies whose notebook is gone."""
    for executed in EXECUTED.glob("*.ipynb"):
        if not (SOURCES / executed.name).exists():
            executed.unlink()


def write_tables():
    """Write the tables of claims that the first page and the page of all claims include."""
    from meidnet_core.results import full_markdown, headline_markdown

    generated = BOOK / "generated"
    generated.mkdir(exist_ok=True)
    for name, text in (("headline", headline_markdown()), ("claims", full_markdown())):
        (generated / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def build_html():
    """Strict build of all pages: a warning or an unresolved reference is an error."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    options = ["--path-output", BOOK, "--config", ROOT / "_config.yml"]
    options += ["--all", "-n", "-W", "--keep-going"]
    return subprocess.run([jupyter_book, "build", BOOK, *options], cwd=ROOT).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=["quick", "paper"], default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="execute and train everything again")
    args = parser.parse_args()
    execute_all({"profile": args.profile, "seed": args.seed, "fresh": args.fresh})
    remove_stale()
    write_tables()
    return build_html()


if __name__ == "__main__":
    sys.exit(main())
