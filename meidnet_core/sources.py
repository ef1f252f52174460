"""Where the data files come from: a local mirror, else the public CDVAE repository at a pinned commit.

Mirror files are checked by SHA-256. The bytes of downloads differ from the mirror's (columns, row
order), so they are checked after parsing, by a fingerprint of their cells (`check_cells`).
"""

import hashlib
import json
import os
from pathlib import Path

COMMIT = "f857f598d6f6cca5dc1ea0582d228f12dcc2c2ea"                  # txie-93/cdvae
URL = f"https://raw.githubusercontent.com/txie-93/cdvae/{COMMIT}/data/{{}}/{{}}.csv"


class DataError(ValueError):
    """A data file is missing, altered or unreadable; the message names file, row and cure."""


class MissingTable(DataError):
    """A table that only a mirror folder holds is not there."""


def registry():
    """Known files: {'perov_5/train': {'sha256', 'rows', 'fingerprint'}}, see data/README of the repository."""
    return json.loads((Path(__file__).parent / "registry.json").read_text())


def cache_dir():
    if "MEIDNET_CACHE" in os.environ:
        return Path(os.environ["MEIDNET_CACHE"])
    import pooch
    return Path(pooch.os_cache("meidnet"))


def locate(name, split):
    """Path of the CSV of one split: mirror first, then download. DataError when neither can be had."""
    mirror = os.environ.get("MEIDNET_DATA_MIRROR")
    if mirror:
        for path in (Path(mirror) / name / f"{split}.csv.gz", Path(mirror) / name / f"{split}.csv"):
            if path.exists():
                return check_bytes(path, registry().get(f"{name}/{split}", {}))
    return _download(name, split, mirror)


def mirror(name, file, suffix=".csv.gz"):
    """Path of a table that only a mirror folder holds, `name`/`file``suffix`. MissingTable says where it was looked for."""
    folder = os.environ.get("MEIDNET_DATA_MIRROR")
    path = Path(folder or ".") / name / f"{file}{suffix}"
    if not folder or not path.exists():
        raise MissingTable(f"{name}/{file}{suffix}: not found in MEIDNET_DATA_MIRROR={folder}. This table has no public download: "
                           "point MEIDNET_DATA_MIRROR at the folder that holds it.")
    return check_bytes(path, registry().get(f"{name}/{file}", {}))


def check_bytes(path, known):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".gz" and known.get("sha256") not in (None, digest):
        raise DataError(f"{path}: wrong checksum (SHA-256 {digest[:12]}..., expected {known['sha256'][:12]}...). The file is "
                        "damaged or another version: copy it again, or unset MEIDNET_DATA_MIRROR to download it.")
    return path


def _download(name, split, mirror):
    import pooch
    url = URL.format(name, split)
    try:                                                             # the pinned commit fixes the content; cells are checked below
        return Path(pooch.retrieve(url, known_hash=None, fname=f"{name}-{split}-{COMMIT[:8]}.csv", path=cache_dir()))
    except Exception as error:
        where = f"no {name}/{split}.csv(.gz) in MEIDNET_DATA_MIRROR={mirror}" if mirror else "MEIDNET_DATA_MIRROR is not set"
        raise DataError(f"{name}/{split}: no source reachable: {where}, and the download of {url} failed ({error}). "
                        "Connect to the internet once, or point MEIDNET_DATA_MIRROR at a folder that holds the file.") from error


def fingerprint(crystals):
    """SHA-256 over sorted 'formula volume' of all cells: independent of row order, site order and file format."""
    rows = sorted(f"{sorted(int(z) for z in zs if z)} {v:.2f}" for zs, v in zip(crystals.numbers, crystals.volume))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def check_cells(crystals, path):
    known = registry().get(f"{crystals.name}/{crystals.split}", {})
    if path.suffix == ".gz" or not known or not known.get("same_cells", True):
        return                                                       # checked by its bytes, or no reference for its cells
    if fingerprint(crystals) != known["fingerprint"]:
        raise DataError(f"{path}: {len(crystals)} cells, but not those of the published split. Delete the file and download it again.")
