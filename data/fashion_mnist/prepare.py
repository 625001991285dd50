"""Fashion-MNIST: 70,000 pictures of clothes, from Debian's package or four files in ./download."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import datasets

from nodepint_mpi.data.idx import read_idx, read_labelled_images
from nodepint_mpi.errors import DataError

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("usr/share/datasets/fashion-mnist")
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
NAMES = "T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
# Of the pixels and labels alone, since files may have been packed anew.
SHA256 = {
    "train-images-idx3-ubyte": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train-labels-idx1-ubyte": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "t10k-images-idx3-ubyte": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "t10k-labels-idx1-ubyte": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
FILES = [f"{name}.gz" for name in SHA256]


def prepare(folder: Path, *, source: str = "", check_sums: bool = True) -> datasets.DatasetDict:
    """Make splits train (60,000) and test (10,000) with columns `image` and `label`.

    Args:
        folder: Its subfolder `download` keeps the four files where they were fetched.
        source: Folder that holds the four files. Unless given they are looked for in `download`,
            then where Debian's package installs them, and are then fetched with apt-get.
        check_sums: Whether the files must hold what the canonical ones do.
    """
    place = Path(source).expanduser() if source else _find(folder / "download")
    for name, expected in SHA256.items():
        path = place / f"{name}.gz"
        if not path.is_file():
            raise DataError(f"{path} is missing: {_todo(folder / 'download')}")
        found = hashlib.sha256(read_idx(path).tobytes()).hexdigest()
        if check_sums and found != expected:
            raise DataError(
                f"{path} is not Fashion-MNIST's: the SHA-256 of its pixels or labels is {found} "
                f"instead of {expected}; delete it and run the command again"
            )
    names = NAMES.split(", ")
    return datasets.DatasetDict(
        {
            split: read_labelled_images(
                place / f"{IMAGES[split]}.gz", place / f"{LABELS[split]}.gz", names
            )
            for split in IMAGES
        }
    )


def _find(download: Path, root: Path = Path("/")) -> Path:
    """The folder with all four files."""
    for place in (download, root / INSTALLED):
        if all((place / name).is_file() for name in FILES):
            return place
    _fetch(download)
    return download


def _fetch(download: Path) -> None:
    """Take the files out of Debian's package, which needs no rights and installs nothing."""
    tools = [shutil.which(name) for name in ("apt-get", "dpkg-deb")]
    if None in tools:
        raise DataError(f"this is no Debian, whose package has the files: {_todo(download)}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _run(["apt-get", "download", PACKAGE], scratch)
            (package,) = Path(scratch).glob(f"{PACKAGE}_*.deb")
            _run(["dpkg-deb", "-x", str(package), "unpacked"], scratch)
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            said = getattr(error, "stderr", None) or str(error)
            reason = said.strip().splitlines()[-1]
            raise DataError(
                f"`apt-get download {PACKAGE}` failed ({reason}): {_todo(download)}"
            ) from error
        download.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy(Path(scratch) / "unpacked" / INSTALLED / name, download / name)


def _run(command: list[str], where: str) -> None:
    subprocess.run(command, cwd=where, check=True, timeout=300, capture_output=True, text=True)


def _todo(download: Path) -> str:
    return (
        f"`apt-get update && apt-get install {PACKAGE}` on Debian; or put the four files "
        f"({', '.join(FILES)}) in {download} or name their folder, "
        "`nodepint data prepare fashion_mnist --set source=DIR`; or use the hub: `source = "
        '"hub:zalando-datasets/fashion_mnist"` in the config'
    )
