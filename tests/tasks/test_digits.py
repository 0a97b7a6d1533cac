"""The nets are the paper's, images are deformed anew, and a run goes on bit for bit where it was stopped."""

from __future__ import annotations

import copy
import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("pooch")

from interrupted import Stop, write_mnist
from meprop import cli
from meprop.tasks import mnist
from meprop.tasks.digits import NETS, DigitsConfig, DigitsTask, ScaledTanh, load
from meprop.training import tracking
from meprop.training.config import TrainingConfig
from meprop.training.loop import Trainer, fit

TRAIN, SIDE = 53, 5  # images of 4 x 4 pixels, with a pixel more


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"), TRAIN, packed=False)


def make(data, **changes):
    settings = {"hidden": (160, 130), "dev_size": 10, "batch_size": 8} | changes
    return DigitsTask(DigitsConfig(data, **settings))


def epoch(task, seed=0):
    return list(task.train_batches(torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- data


def test_images_have_a_pixel_more_and_are_from_minus_one_to_one(data):
    digits = load(DigitsConfig(data, dev_size=10))
    plain = mnist.read(data, 10)
    assert digits.image_shape == (SIDE, SIDE)
    for split in ("train", "dev", "test"):
        images = getattr(digits, f"{split}_images").view(-1, SIDE, SIDE)
        expected = getattr(plain, f"{split}_images").view(-1, 4, 4) * 255 / 127.5 - 1
        torch.testing.assert_close(images[:, :4, :4], expected)
        assert (images[:, 4] == -1).all()
        assert (images[:, :, 4] == -1).all()
    assert (len(digits.train_images), len(digits.dev_images)) == (TRAIN - 10, 10)


def test_the_training_images_themselves_can_be_the_development_set(data):
    task = make(data, dev_size=0)
    assert len(task.data.train_images) == TRAIN
    assert task.data.dev_images is task.data.train_images
    model = task.build_model()
    found = task.evaluate(model, "dev")["accuracy"]
    right = model(task.data.train_images).argmax(1) == task.data.train_labels
    assert found == pytest.approx(100 * right.float().mean().item())


def test_an_epoch_without_deformation_shows_each_image_once(data):
    task = make(data, deformation="off")
    batches = epoch(task)
    assert [len(labels) for _, labels in batches] == [8] * 5 + [3]
    assert len(batches) == task.steps_per_epoch
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images.unique(dim=0), task.data.train_images.unique(dim=0))


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_images_are_deformed_anew_in_each_epoch_as_the_generator_says(data, ahead):
    task, generator = make(data, ahead=ahead), torch.Generator().manual_seed(0)
    first, second = list(task.train_batches(generator)), list(task.train_batches(generator))
    for (images, labels), (expected, expected_labels) in zip(first, epoch(make(data)), strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)
    undeformed = task.data.train_images.unique(dim=0)
    shown = torch.cat([images for images, _ in first + second])
    assert len(torch.cat([shown, undeformed]).unique(dim=0)) == len(shown) + len(undeformed)


def test_a_stronger_deformation_changes_more(data):
    def images(strength):  # in one batch: the order is drawn before the deformations
        return epoch(make(data, batch_size=TRAIN, deformation=strength))[0][0]

    strengths = "weak", "paper", "strong"
    weak, paper, strong = ((images(strength) - images("off")).abs().mean() for strength in strengths)
    assert 0 < weak < paper < strong


def test_batches_ahead_leave_no_thread_behind(data):
    before = threading.active_count()
    batches = make(data, ahead=2).train_batches(torch.Generator().manual_seed(0))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


# ---------------------------------------------------------------- model


@pytest.mark.parametrize(("net", "millions"), [(1, 1.34), (2, 3.26), (3, 6.69), (4, 12.11), (5, 8.86)])
def test_the_nets_have_the_papers_numbers_of_weights(net, millions):
    widths = (29 * 29, *NETS[net], 10)
    weights = sum((width + 1) * following for width, following in pairwise(widths))
    assert weights / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_net_is_chosen_by_number_or_by_widths():
    assert DigitsConfig().widths == NETS[2]
    assert DigitsConfig(net=1).widths == NETS[1]
    assert DigitsConfig(hidden=(3,)).widths == (3,)


@pytest.mark.parametrize(("activation", "kind"), [("tanh", ScaledTanh), ("relu", nn.ReLU)])
def test_the_model_is_of_the_configured_shape(data, activation, kind):
    model = make(data, activation=activation).build_model()
    assert [type(layer) for layer in model] == [nn.Linear, kind, nn.Linear, kind, nn.Linear]
    widths = [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [(SIDE * SIDE, 160), (160, 130), (130, 3)]


def test_the_activation_is_the_papers():
    a = torch.linspace(-9, 9, 101, dtype=torch.float64)
    expected = 1.7159 * (1 - 2 / (1 + torch.exp(2 * 0.6666 * a)))
    torch.testing.assert_close(ScaledTanh()(a), expected)


def test_dropout_comes_after_each_hidden_layer(data):
    def layers(**changes):
        return [type(layer) for layer in make(data, activation="relu", **changes).build_model()]

    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    assert layers(dropout=0.3) == [*hidden, *hidden, nn.Linear]
    assert nn.Dropout not in layers()
    assert [each.p for each in make(data, dropout=0.3).build_model() if isinstance(each, nn.Dropout)] == [0.3, 0.3]


def test_initial_weights_are_uniform_or_those_of_torch(data):
    torch.manual_seed(0)
    task = make(data, hidden=(400,))
    weights = torch.cat([each.detach().flatten() for each in task.build_model().parameters()])
    assert 0.0499 < weights.abs().max() <= 0.05
    assert weights.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert make(data, hidden=(400,), initial="torch").build_model()[0].weight.abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": 3, "hidden": (5,)}, r"net is 3 and hidden is \(5,\): .*give one"),
        ({"hidden": (5, 0)}, r"hidden is \(5, 0\): each width must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0: it must be at least 0 and below 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"dev_size": -1}, "dev_size is -1: it must be at least 0"),
        ({"ahead": -1}, "ahead is -1: it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**settings)


# ---------------------------------------------------------------- training


def test_training_fits_the_data(data):
    torch.manual_seed(0)
    config = TrainingConfig(epochs=5, lr=3e-3, noise=0.25, accelerator="cpu", schedule="geometric")
    task = make(data, deformation="off")  # the deformations of digits are too strong for so few pixels
    for rule in (None, config.rule()):
        (run,) = fit([Trainer(task, config, rule, 0)], lambda _: None)
        assert run.test["accuracy"] > 90


@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("steps", [3, 6, 8])  # within the first epoch of 6, at its end, in the second
def test_a_run_is_resumed_bit_for_bit(data, ahead, steps):
    config = TrainingConfig(epochs=3, noise=0.25, accelerator="cpu", schedule="geometric")

    def trainer(ahead):
        return Trainer(make(data, ahead=ahead, dropout=0.2), config, config.rule(), 7)

    straight, first, second = trainer(0), trainer(ahead), trainer(ahead)
    (expected,) = fit([straight], lambda _: None)
    while first.steps_before + first.step < steps:
        first.advance(1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    (run,) = fit([second], lambda _: None)
    assert (run.dev, run.test) == (expected.dev, expected.test)
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight)


SMALL = ("--hidden", "160", "130", "--dev-size", "10", "--batch-size", "8", "--accelerator", "cpu")


def losses(folder):
    (run,) = json.loads((folder / "result.json").read_text())["runs"]
    return [(record["loss"], record["dev"], record["test"]) for record in run["curve"]]


def test_a_run_with_other_batches_ahead_is_the_same_run():
    now, other = (tracking.settings(DigitsConfig(ahead=ahead), TrainingConfig(), "topk") for ahead in (0, 4))
    assert now == other
    assert not tracking.changes({**now, "ahead": 4}, now, DigitsConfig)  # what was saved has it
    assert tracking.changes({**now, "net": 3}, now, DigitsConfig) == "net was 3, now None"


def test_the_command_line_trains_and_resumes(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "digits", "--data-dir", str(data), "--epochs", "3", "--schedule", "geometric", *SMALL]
    assert cli.main([*command, "--out", "straight"]) == 0
    with monkeypatch.context() as patch:
        Stop(patch, 1)
        assert cli.main([*command, "--out", "stopped"]) == 130
    assert cli.main([*command, "--out", "stopped", "--resume"]) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_the_command_line_compares_with_drawn_entries(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "digits", "--data-dir", str(data), "--epochs", "2", *SMALL]) == 0
    runs = json.loads(Path("runs/compare-digits/result.json").read_text())["runs"]
    assert [run["rule"] for run in runs] == ["dense", "sampled"]
