"""when="auto": each layer decides once, by measurement, and stays with it."""

import copy
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import meprop
from meprop import speed
from meprop.functional.conv import ConvShape
from meprop.functional.geometry import Geometry
from meprop.functional.linear import LinearShape
from meprop.nn.lstm import LstmShape
from meprop.ops import native

RULE = meprop.TopK(5)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement by given microseconds (dense, sparse), and records what was asked."""

    measured = SimpleNamespace(microseconds=(100.0, 10.0), shapes=[])

    def measure(rule, shape):
        measured.shapes.append(shape)
        return measured.microseconds

    monkeypatch.setattr(speed, "measure", measure)
    return measured


def model(features=200):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, features), torch.nn.ReLU(), torch.nn.Linear(features, 3))


def nonzero_rows(layer):
    return int((layer.weight.grad.abs().sum(1) > 0).sum())


def backward(net, rows=1):
    net.zero_grad()
    net(torch.randn(rows, 20)).square().sum().backward()


def test_a_faster_sparse_pass_is_taken_from_the_first_backward_on(measured):
    net = model()
    assert meprop.convert(net, RULE).layers[0].reason == "to be measured at its first backward pass"
    for _ in range(2):
        backward(net)
        assert nonzero_rows(net[0]) == 5
    assert len(measured.shapes) == 1
    layer = meprop.report(net).layers[0]
    assert layer.status == "sparse"
    assert layer.reason.startswith("10.0x as fast as dense with 1 rows")


@pytest.mark.parametrize("microseconds", [(10.0, 100.0), (10.0, 9.9)])
def test_a_slower_or_hardly_faster_one_is_not(measured, microseconds):
    measured.microseconds = microseconds
    net, plain = model(), model()
    meprop.convert(net, RULE)
    x = torch.randn(7, 20)
    for _ in range(2):
        for module in (net, plain):
            module.zero_grad()
            module(x).square().sum().backward()
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    layer = meprop.report(net).layers[0]
    assert (layer.status, layer.k, layer.density) == ("dense", None, 1.0)
    assert "sparse is not faster" in layer.reason
    assert type(net(x).grad_fn).__name__ == type(plain(x).grad_fn).__name__  # from now on it is torch's own pass


def test_the_question_says_what_the_pass_needs(measured):
    net = model()
    meprop.convert(net, RULE)
    net[0].bias.requires_grad_(False)
    backward(net, rows=9)
    assert measured.shapes == [LinearShape(9, 20, 200, torch.float32, "cpu", (False, True, False))]


def test_a_weight_of_one_input_feature_is_not_transposed(measured):
    """It is contiguous either way."""
    layer = torch.nn.Linear(1, 200)
    meprop.convert(layer, RULE)
    layer(torch.randn(3, 1)).sum().backward()
    assert [shape.transposed for shape in measured.shapes] == [False]


def test_a_forward_pass_alone_decides_nothing(measured):
    net = model()
    meprop.convert(net, RULE)
    net(torch.randn(1, 20))
    with torch.no_grad():
        net(torch.randn(1, 20))
    assert measured.shapes == []
    backward(net, rows=3)
    assert [shape.rows for shape in measured.shapes] == [3]


def test_the_decision_stays_when_the_number_of_rows_changes(measured):
    net = model()
    meprop.convert(net, RULE)
    backward(net, rows=8)
    measured.microseconds = (1.0, 100.0)
    backward(net, rows=5)
    assert len(measured.shapes) == 1
    assert net[0].decision.sparse


def test_a_layer_called_twice_in_a_step_decides_once(measured):
    layer = torch.nn.Linear(200, 200)
    meprop.convert(layer, RULE)
    layer(layer(torch.randn(4, 200)).relu()).square().sum().backward()
    assert len(measured.shapes) == 1


def test_each_layer_of_a_model_decides_for_itself(monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda _, shape: (100.0, 10.0 if shape.outputs == 300 else 200.0))
    net = torch.nn.Sequential(torch.nn.Linear(20, 200), torch.nn.ReLU(), torch.nn.Linear(200, 300))
    meprop.convert(net, RULE)
    backward(net)
    assert [net[0].decision.sparse, net[2].decision.sparse] == [False, True]


def test_a_layer_that_is_made_always_sparse_no_longer_does_as_measured(measured):
    measured.microseconds = (10.0, 100.0)
    net = model()
    meprop.convert(net, RULE)
    backward(net)
    assert nonzero_rows(net[0]) > 5
    net[0].when = "always"
    backward(net)
    assert nonzero_rows(net[0]) == 5
    assert (meprop.report(net).layers[0].status, meprop.report(net).layers[0].reason) == ("sparse", "always")
    net[0].when = "auto"  # what was measured is still known
    backward(net)
    assert nonzero_rows(net[0]) > 5
    assert len(measured.shapes) == 1


def test_always_never_asks(measured):
    net = model()
    assert meprop.convert(net, RULE, when="always").layers[0].reason == "always"
    backward(net)
    assert measured.shapes == []
    with pytest.raises(ValueError, match=r"when='never'.*'auto' or 'always'"):
        meprop.convert(net, RULE, when="never")


def test_converting_again_asks_again(measured):
    net = model()
    meprop.convert(net, RULE)
    backward(net)
    meprop.convert(net, meprop.TopK(7))
    assert net[0].decision is None
    backward(net)
    assert len(measured.shapes) == 2
    assert nonzero_rows(net[0]) == 7


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_keep_the_decision(measured, duplicate):
    net = model()
    meprop.convert(net, RULE)
    backward(net)
    assert str(meprop.report(duplicate(net))) == str(meprop.report(net))


def test_the_answer_is_remembered_on_disk(measured, cache):
    for _ in range(2):
        net = model()
        meprop.convert(net, RULE)
        backward(net)
    assert len(measured.shapes) == 1
    (file,) = (cache / "speed").iterdir()
    assert json.loads(file.read_text()) == {"TopK(k=5, scope='example') cpu float32 1x20x200 wb": [100.0, 10.0]}


def test_measurements_of_other_layers_are_kept(measured, cache):
    for features in (200, 300, 200, 300):
        net = model(features)
        meprop.convert(net, RULE)
        backward(net)
    assert [shape.outputs for shape in measured.shapes] == [200, 300]
    (file,) = (cache / "speed").iterdir()
    assert len(json.loads(file.read_text())) == 2


def test_another_number_of_threads_is_measured_anew(measured, threads):
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        net = model()
        meprop.convert(net, RULE)
        backward(net)
    assert len(measured.shapes) == 2


@pytest.mark.skipif(len(native.levels()) < 2, reason="there are no two levels of native kernels here")
def test_other_kernels_are_measured_anew(measured):
    before, levels = native.level(), native.levels()[:2]
    try:
        for level in (*levels, *levels):
            native.use_level(level)
            net = model()
            meprop.convert(net, RULE)
            backward(net)
    finally:
        native.use_level(before)
    assert len(measured.shapes) == 2


def test_row_sparse_gradients_leave_nothing_to_measure(measured):
    measured.microseconds = (10.0, 100.0)
    net = model()
    report = meprop.convert(net, meprop.TopK(5, scope="batch"), sparse_grad=True, when="auto")
    assert report.layers[0].reason == "always"
    backward(net)
    assert measured.shapes == []
    assert net[0].weight.grad.is_sparse


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"{\"TopK(k=5, scope='example') cpu float32 1x20x200 wb\": 3}", b"\xff"]
)
def test_a_damaged_memory_is_measured_anew_and_mended(measured, cache, content):
    net = model()
    meprop.convert(net, RULE)
    backward(net)
    (file,) = (cache / "speed").iterdir()
    file.write_bytes(content)
    net = model()
    meprop.convert(net, RULE)
    backward(net)
    assert len(measured.shapes) == 2
    assert len(json.loads(file.read_text())) == 1


def test_measurements_of_several_at_once_are_all_remembered(measured, monkeypatch, cache):
    """Each reads the file, adds a line and writes it: one after the other."""
    write = speed.machine.write_atomically

    def slow_write(*args):
        time.sleep(0.01)
        write(*args)

    monkeypatch.setattr(speed.machine, "write_atomically", slow_write)
    shapes = [LinearShape(rows, 3, 4, torch.float32, "cpu", (True, True, True)) for rows in range(1, 17)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shape: speed.decide(RULE, shape), shapes))
    (file,) = (cache / "speed").iterdir()
    assert len(json.loads(file.read_text())) == len(shapes)


def test_a_cache_that_cannot_be_written_is_no_obstacle(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path / "file"))
    net = model()
    meprop.convert(net, RULE)
    backward(net)
    assert net[0].decision.sparse


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_a_real_measurement_leaves_everything_as_it_was(scope):
    rule = meprop.TopK(5, scope=scope)
    state = torch.get_rng_state()
    shape = LinearShape(16, 64, 300, torch.float32, "cpu", (True, True, True))
    dense, sparse = speed.measure(rule, shape)
    assert 0 < dense < 1e6
    assert 0 < sparse < 1e6
    assert torch.equal(state, torch.get_rng_state())


class Watched:
    """A shape whose passes note in which modes they run."""

    rows, dtype, device = 1, torch.float32, "cpu"

    def __init__(self) -> None:
        self.modes: set[tuple[bool, bool]] = set()

    def passes(self, rule):
        def run():
            self.modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            torch.ones(2, requires_grad=True).square()  # which saves a tensor

        return run, run


def test_the_modes_of_the_pass_that_decides_do_not_matter():
    packed: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    )
    shape = Watched()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        speed.measure(RULE, shape)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert shape.modes == {(True, False)}
    assert packed == []


def test_a_real_decision_in_the_middle_of_a_backward_pass(monkeypatch):
    """The measurement runs backward passes of its own inside a backward pass, under autocast too."""
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    net = model()
    meprop.convert(net, RULE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.mse_loss(net(torch.randn(16, 20)), torch.zeros(16, 3))
        loss.backward()
    assert net[0].decision is not None
    assert net[0].weight.grad.isfinite().all()


def test_a_large_sparse_layer_is_faster_than_dense_here():
    if not meprop.backend_info()["native"]:
        pytest.skip("without the native kernels it is not")
    shape = LinearShape(256, 1024, 1024, torch.float32, "cpu", (True, True, True))
    assert speed.decide(meprop.TopK(0.04), shape).sparse


def test_compiled_before_it_decided_a_layer_is_sparse(measured):
    torch._dynamo.reset()
    net = model()
    meprop.convert(net, RULE)
    torch.compile(net, fullgraph=True, backend="aot_eager")(torch.randn(1, 20)).square().sum().backward()
    assert measured.shapes == []
    assert nonzero_rows(net[0]) == 5


def test_compiled_after_it_decided_a_layer_does_as_decided(measured):
    measured.microseconds = (10.0, 100.0)
    net, plain, x = model(), model(), torch.randn(1, 20)
    meprop.convert(net, RULE)
    backward(net)
    for each in (net, plain):
        torch._dynamo.reset()
        each.zero_grad()
        torch.compile(each, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)
    assert nonzero_rows(net[0]) > 5


@pytest.mark.parametrize("microseconds", [(100.0, 10.0), (10.0, 100.0)], ids=["sparse", "dense"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_deciding_between_a_forward_pass_and_its_repetition(measured, microseconds, use_reentrant):
    """Checkpointing repeats the forward pass within the backward pass, and compares what both have saved."""
    measured.microseconds = microseconds
    layer, plain = torch.nn.Linear(40, 300), torch.nn.Linear(40, 300)
    plain.load_state_dict(layer.state_dict())
    meprop.convert(layer, RULE)
    x = torch.randn(2, 4, 40, requires_grad=True)
    for _ in range(2):
        for module in (layer, plain):
            module.zero_grad()
            y = sum(checkpoint(module, x, use_reentrant=use_reentrant) for _ in range(3))
            y.square().sum().backward()
        assert len(measured.shapes) == 1
        if microseconds[0] < microseconds[1]:
            torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
        else:
            assert nonzero_rows(layer) < 300


def test_an_empty_batch_decides_nothing(measured):
    net = model()
    meprop.convert(net, RULE)
    backward(net, rows=0)
    assert measured.shapes == []
    assert net[0].decision is None


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_rule_that_cannot_be_known_again_is_not_remembered(measured, cache, blocks):
    class Anonymous(meprop.Rule):
        def count(self, features):
            return 5

        def select(self, grad_output_NO):
            return RULE.select(grad_output_NO)

    net = model()
    meprop.convert(net, Anonymous() if blocks == 1 else meprop.InBlocks(Anonymous(), blocks))
    backward(net)
    assert len(measured.shapes) == 1
    assert not (cache / "speed").exists()


@pytest.mark.parametrize(("microseconds", "sparse"), [((100.0, 10.0), True), ((10.0, 9.9), False)])
@pytest.mark.parametrize("form", ["padded", "batch first", "packed", "unbatched", "unbatched, batch first"])
def test_an_lstm_decides_at_its_first_forward_pass_with_gradients(measured, microseconds, sparse, form):
    measured.microseconds = microseconds
    torch.manual_seed(0)
    net = torch.nn.LSTM(20, 200, batch_first="batch first" in form)
    assert "first forward pass" in meprop.convert(net, RULE).layers[0].reason
    x = {
        "padded": torch.randn(6, 4, 20),
        "batch first": torch.randn(4, 6, 20),
        "packed": pack_sequence([torch.randn(length, 20) for length in (6, 6, 5, 5)]),
        "unbatched": torch.randn(6, 20),
        "unbatched, batch first": torch.randn(6, 20),
    }[form]
    with torch.no_grad():
        net(x)
    assert not measured.shapes
    for _ in range(2):
        net.zero_grad()
        output, _ = net(x)
        (output.data if form == "packed" else output).sum().backward()
        assert bool((net.weight_ih_l0.grad == 0).all(dim=1).any()) == sparse
    batch = 1 if "unbatched" in form else 4
    assert measured.shapes == [LstmShape(6, batch, 20, 200, 1, 1, torch.float32, "cpu", False)]
    assert meprop.report(net).layers[0].status == ("sparse" if sparse else "dense")


def test_an_lstm_under_autocast_is_measured_as_it_will_run(measured):
    net = torch.nn.LSTM(20, 200, num_layers=2, bidirectional=True)
    meprop.convert(net, RULE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.randn(6, 4, 20, requires_grad=True))
    assert measured.shapes == [LstmShape(6, 4, 20, 200, 2, 2, torch.bfloat16, "cpu", True)]


def test_a_real_measurement_of_an_lstm_leaves_everything_as_it_was():
    state = torch.get_rng_state()
    dense, sparse = speed.measure(meprop.TopK(5), LstmShape(3, 4, 10, 150, 2, 2, torch.float32, "cpu", True))
    assert 0 < dense < 1e6
    assert 0 < sparse < 1e6
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("microseconds", "sparse"), [((100.0, 10.0), True), ((10.0, 9.9), False)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_decides_at_its_first_backward_pass(measured, microseconds, sparse, channels_last):
    measured.microseconds = microseconds
    layer, plain = (torch.nn.Conv2d(3, 100, 3, stride=2, padding=1, padding_mode="circular") for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    assert "first backward pass" in meprop.convert(layer, meprop.TopK(5, scope="batch")).layers[0].reason
    x = torch.randn(4, 3, 9, 10)
    if channels_last:
        layer, plain, x = (each.to(memory_format=torch.channels_last) for each in (layer, plain, x))
    with torch.no_grad():
        layer(x)
    assert not measured.shapes
    for _ in range(2):
        for module in (layer, plain):
            module.zero_grad()
            module(x).square().sum().backward()
        assert (layer.weight.grad.flatten(1) != 0).any(1).sum() == (5 if sparse else 100)
        if not sparse:
            torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    geometry, padded = Geometry((2, 2), (0, 0), (1, 1)), torch.Size((4, 3, 11, 12))
    needs = (False, True, True)
    assert measured.shapes == [ConvShape(padded, 100, (3, 3), geometry, 25, channels_last, torch.float32, "cpu", needs)]
    assert meprop.report(layer).layers[0].status == ("sparse" if sparse else "dense")
    if not sparse:  # from now on it is torch's own pass
        assert type(layer(x).grad_fn).__name__ == type(plain(x).grad_fn).__name__


@pytest.mark.parametrize("dims", [1, 2])
def test_a_real_measurement_of_a_convolution_leaves_everything_as_it_was(dims):
    geometry = Geometry((1,) * dims, (1,) * dims, (1,) * dims)
    needs = (False, True, False)
    shape = ConvShape(
        torch.Size((2, 3, *[6] * dims)), 70, (3,) * dims, geometry, 6**dims, dims == 2, torch.float32, "cpu", needs
    )
    state = torch.get_rng_state()
    dense, sparse = speed.measure(meprop.TopK(5, scope="batch"), shape)
    assert 0 < dense < 1e6
    assert 0 < sparse < 1e6
    assert torch.equal(state, torch.get_rng_state())
    assert "to 70 w" in str(shape)


def test_tensors_without_memory_decide_nothing(measured):
    net = model()
    meprop.convert(net, RULE)
    meta = copy.deepcopy(net).to("meta")
    meta(torch.empty(2, 20, device="meta")).sum().backward()
    with FakeTensorMode():
        fake = model()
        meprop.convert(fake, RULE)
        backward(fake)
    assert measured.shapes == []
    assert meta[0].decision is fake[0].decision is None


def test_a_mode_does_not_see_what_is_timed():
    shape = LinearShape(8, 16, 24, torch.float32, "cpu", (True, True, True))
    with FlopCounterMode(display=False) as counter:
        speed.measure(RULE, shape)
    assert counter.get_total_flops() == 0
