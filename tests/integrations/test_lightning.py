"""The callback for Lightning: converts in time, logs, and leaves checkpoints as they are."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import meprop
from meprop.integrations.lightning import MePropCallback

RULE = meprop.TopK(10, scope="batch")


class Module(pl.LightningModule):
    optimizer = torch.optim.Adam

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2))
        self.rows: list[int] = []

    def training_step(self, batch, batch_index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def on_after_backward(self) -> None:
        self.rows.append(int((self.model[2].weight.grad.abs().sum(1) > 0).sum()))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randint(0, 2, (16,)))
        return torch.utils.data.DataLoader(data, batch_size=8)


def trainer(folder, *callbacks: pl.Callback, **options) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pl.Trainer(max_epochs=1, default_root_dir=folder, callbacks=list(callbacks), **quiet, **options)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_is_sparse_and_logs_its_density(tmp_path, precision):
    module = Module()
    fit = trainer(tmp_path, MePropCallback(RULE, when="always"), precision=precision)
    fit.fit(module)
    assert module.rows == [10, 10]
    report = meprop.report(module)
    assert [layer.status for layer in report.layers] == ["sparse", "sparse", "dense"]
    expected = (0.05 * (6 * 200 + 200 * 200) + 200 * 2) / (6 * 200 + 200 * 200 + 200 * 2)
    assert report.density == pytest.approx(expected)
    assert float(fit.callback_metrics["meprop/density"]) == pytest.approx(expected)
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    plain = Module()
    plain.load_state_dict(torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(plain.model[2].weight, module.model[2].weight)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_numbers_of_an_epoch_are_logged_and_the_first_pass_is_measured(tmp_path):
    logged, measured = [], []

    class Watched(Module):
        def log_dict(self, dictionary, **options):
            logged.append(dictionary)
            super().log_dict(dictionary, **options)

    module = Watched()
    module.model[2].weight.register_hook(
        lambda _: measured.append(module.model[2].policy.record.energy is not None) or None
    )
    fit = trainer(tmp_path, MePropCallback(RULE, when="always", energy=True, layers=True))
    fit.fit_loop.max_epochs = 2
    fit.fit(module)
    assert measured == [True, False] * 2
    assert [set(each) for each in logged] == 2 * [
        {"meprop/density", "meprop/k", "meprop/energy"}
        | {f"meprop/density/model.{layer}" for layer in (0, 2, 4)}
        | {f"meprop/energy/model.{layer}" for layer in (0, 2)}
    ]
    assert [each["meprop/k"] for each in logged] == [10, 10]
    assert fit.callback_metrics["meprop/energy"].item() == pytest.approx(logged[-1]["meprop/energy"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_module_that_makes_its_layers_late_converts_them_itself(tmp_path):
    class Late(Module):
        def configure_model(self) -> None:
            meprop.convert(self, RULE, when="always")

    with pytest.raises(meprop.NotSupportedError, match=r"Late has a configure_model.*call meprop\.convert there"):
        trainer(tmp_path, MePropCallback(RULE)).fit(Late())
    module = Late()
    fit = trainer(tmp_path, MePropCallback())
    fit.fit(module)
    assert module.rows == [10, 10]
    assert float(fit.callback_metrics["meprop/density"]) < 0.1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightnings_clipping_is_that_of_dense_gradients(tmp_path, algorithm):
    trained = []
    for sparse_grad in (False, True):
        module = Module()
        module.optimizer = meprop.optim.SGD
        module.on_after_backward = lambda module=module, sparse_grad=sparse_grad: (
            module.rows.append(module.model[2].weight.grad.is_sparse == sparse_grad) or None
        )
        clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
        fit = trainer(tmp_path, MePropCallback(RULE, when="always", sparse_grad=sparse_grad), **clipping)
        torch.manual_seed(1)
        fit.fit(module)
        assert module.rows == [True, True]
        trained.append(module.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_an_optimizer_for_dense_gradients_is_refused_in_lightnings_closure(tmp_path):
    module = Module()
    module.on_after_backward = lambda: None
    before = module.model[0].weight.detach().clone()
    with pytest.raises(meprop.NotSupportedError, match=r"Take meprop\.optim\.Adam in its place"):
        trainer(tmp_path, MePropCallback(RULE, sparse_grad=True)).fit(module)
    assert torch.equal(module.model[0].weight, before)


def test_options_need_a_rule():
    with pytest.raises(ValueError, match="min_features without a rule"):
        MePropCallback(min_features=7)


@pytest.mark.parametrize("option", ["energy", "layers"])
def test_flags_are_checked(option):
    with pytest.raises(TypeError, match=f"{option}=1 is of type int; it is True or False"):
        MePropCallback(RULE, **{option: 1})


def test_a_wrapped_part_is_refused_before_training(tmp_path):
    module = Module()
    module.model = nn.DataParallel(module.model)
    with pytest.raises(meprop.NotSupportedError, match="DataParallel"):
        trainer(tmp_path, MePropCallback(RULE)).fit(module)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_clipping_that_would_find_no_gradient_is_refused(tmp_path):
    class Updated(Module):
        def configure_optimizers(self):
            return meprop.optim.Adam(self.parameters(), in_backward=True)

    with pytest.raises(meprop.NotSupportedError, match=r"gradient_clip_val=1.0 .* Leave gradient_clip_val out"):
        trainer(tmp_path, MePropCallback(RULE), gradient_clip_val=1.0).fit(Updated())
    trainer(tmp_path, MePropCallback(RULE)).fit(Updated())
