"""meprop.distributed: what holds for several processes, in two of them, and what one process sees of it.

The checks are in two_processes.py. They run in one pair of processes, as starting these takes longest.
"""

import doctest
import fcntl
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import meprop
import two_processes
from cases import GRADIENTS, bits, gradient
from meprop import distributed
from meprop.distributed import SynchronizedTopK
from meprop.rules import synchronized

SCRIPT = Path(two_processes.__file__)
TIMEOUT = 240  # seconds; a deadlock, or an end that nobody wrote down, shows as a check that did not finish


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what became of each check; of several workers of pytest the first runs them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            run(folder)
            (folder / "done").touch()
    return folder


def run(folder: Path) -> None:
    processes = []
    for rank in range(2):
        command = [sys.executable, str(SCRIPT), str(folder), str(rank)]
        with (folder / f"log-{rank}").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in processes:
            process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_every_function_of_the_rank_alone_is_registered_as_a_check():
    """A check that is not registered would never run."""
    functions = inspect.getmembers(two_processes, inspect.isfunction)
    own = {name: each for name, each in functions if each.__module__ == two_processes.__name__}
    of_the_rank = {name for name, each in own.items() if [*inspect.signature(each).parameters] == ["rank"]}
    assert of_the_rank == set(two_processes.CHECKS)
    assert of_the_rank


@pytest.mark.parametrize("name", two_processes.CHECKS)
def test_in_two_processes(folder, name):
    for rank in range(2):
        result = folder / f"{name}-{rank}"
        if not result.exists():
            pytest.fail(f"process {rank} did not finish this check:\n{(folder / f'log-{rank}').read_text()[-3000:]}")
        if result.read_text():
            pytest.fail(f"in process {rank}:\n{result.read_text()}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_in_one_process_the_rule_is_unified_top_k_bit_for_bit(kind, dtype):
    layers = [
        meprop.nn.Linear(9, 33, dtype=dtype, rule=rule) for rule in (SynchronizedTopK(5), meprop.TopK(5, scope="batch"))
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x, grad = torch.randn(6, 9, dtype=dtype), gradient(kind, 6, 33, dtype)
    found, expected = (torch.autograd.grad(layer(x), layer.parameters(), grad) for layer in layers)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_the_rule_is_a_value():
    assert SynchronizedTopK(3) == SynchronizedTopK(3) != meprop.TopK(3, scope="batch")
    assert repr(SynchronizedTopK(0.5)) == "SynchronizedTopK(k=0.5, scope='batch')"
    assert SynchronizedTopK(0.1).count(200) == 20
    assert pickle.loads(pickle.dumps(SynchronizedTopK(3))) == SynchronizedTopK(3)
    with pytest.raises(ValueError, match="k=0 keeps nothing"):
        SynchronizedTopK(0)
    with pytest.raises(TypeError, match="group='gloo'; it is a process group"):
        SynchronizedTopK(3, "gloo")
    with pytest.raises(TypeError, match="scope"):
        SynchronizedTopK(3, scope="example")


def test_nothing_is_measured_as_processes_could_decide_differently():
    model = torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.Linear(200, 200))
    report = meprop.convert(model, SynchronizedTopK(5), when="auto")
    assert [layer.reason for layer in report.layers] == ["always", "always"]
    assert model[0].when == "always"


def test_lstms_are_refused():
    with pytest.raises(meprop.NotSupportedError, match="wait for other processes at each time step"):
        meprop.nn.LSTM(4, 8, rule=SynchronizedTopK(2))
    weights = torch.zeros(32, 4), torch.zeros(32, 8)
    with pytest.raises(meprop.NotSupportedError, match="wait for other processes at each time step"):
        meprop.functional.lstm(torch.zeros(2, 3, 4), None, *weights, rule=SynchronizedTopK(2))
    model = torch.nn.ModuleList([torch.nn.LSTM(4, 200), torch.nn.Linear(4, 200)])
    report = meprop.convert(model, SynchronizedTopK(2))
    assert [layer.status for layer in report.layers] == ["dense", "sparse"]
    assert "wait for other processes" in report.layers[0].reason


def test_one_process_compiles_whole():
    torch._dynamo.reset()
    model = torch.nn.Sequential(meprop.nn.Linear(8, 200, rule=SynchronizedTopK(5)))
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(3, 8)).square().sum().backward()
    assert int(model[0].weight.grad.any(dim=1).sum()) == 5


def test_what_needs_a_process_group_says_so():
    with pytest.raises(ValueError, match="init_process_group"):
        distributed.RowSparseState()
    with pytest.raises(ValueError, match="has not been initialized"):  # torch's
        distributed.average_gradients([torch.nn.Parameter(torch.ones(2))])


def test_a_single_tensor_is_not_taken_for_its_rows():
    with pytest.raises(TypeError, match="parameters is a tensor"):
        distributed.average_gradients(torch.nn.Parameter(torch.ones(2, 2)))


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(synchronized) == (0, 2)


def test_without_torch_distributed_meprop_is_imported_all_the_same():
    code = (
        "import sys, torch.distributed as dist; dist.is_available = lambda: False; import meprop, meprop.rules; "
        "assert not {'meprop.distributed', 'meprop.rules.synchronized'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
