"""What pyproject.toml promises, tried: each Python that is found, the oldest torch and the newest, each extra alone.

`make matrix` runs all of it. An argument after `--` replaces the tests, e.g. `nox -s "promise-3.10(torch='oldest')" --
tests/ops`. pip may take torch from wherever its own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) say. The builds
without CUDA are a tenth of the size.
"""

import nox

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OLDEST = next(each.partition(">=")[2] for each in PROJECT["dependencies"] if each.startswith("torch>="))

# Tests that need no extra but transformers, and no data, of each folder some.
TESTS = [
    *("tests/ops", "tests/nn/test_linear.py", "tests/nn/test_conv.py", "tests/nn/test_lstm.py", "tests/optim"),
    *("tests/nn/test_attention.py", "tests/pruning/test_simplifier.py", "tests/pruning/test_trace.py"),
    *("tests/test_bad_input.py", "tests/test_convert.py", "tests/test_functional.py", "tests/test_modes.py"),
    *("tests/test_package.py", "tests/test_rules.py", "tests/test_sampled.py", "tests/test_selection.py"),
]
OF_EXTRAS = {
    "tasks": ["tests/tasks", "tests/training", "tests/reporting"],
    "lightning": ["tests/integrations/test_lightning.py"],
    "chip": ["tests/chip"],
    "hf": ["tests/integrations/test_huggingface.py", "tests/nn/test_huggingface.py"],
}

# Import, doctor, conversion and one step, of an installation that has nothing but torch.
SMOKE = """
import sys, torch, meprop
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
report = meprop.convert(model, meprop.TopK(0.1), min_features=8, when="always")
assert len(report.layers) == 2, report
optimizer = meprop.optim.Adam(model.parameters())
before = model[0].weight.detach().clone()
model(torch.randn(32, 256)).square().mean().backward()
optimizer.step()
assert not torch.equal(before, model[0].weight)
assert meprop.backend_info()["native"] == (sys.argv[1] == "compiled"), meprop.backend_info()
print(sys.version.split()[0], torch.__version__, meprop.backend_info()["isa"])
"""

nox.options.default_venv_backend = "venv"
nox.options.envdir = "build/matrix"
nox.options.error_on_missing_interpreters = False


def try_it(session: nox.Session, kind: str) -> None:
    """Imports, converts and steps, and asks the doctor."""
    session.run("python", "-c", SMOKE, kind)
    session.run("meprop", "doctor")


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("torch", ["oldest", "newest"])
def promise(session: nox.Session, torch: str) -> None:
    """The tests of the library on one Python and one torch, and a step of a build without a compiler."""
    wanted = f"torch=={OLDEST}" if torch == "oldest" else "torch"
    session.install(wanted, "numpy", "hypothesis", "pytest", "transformers>=5")
    session.install("--no-deps", ".")
    try_it(session, "compiled")
    session.run("python", "-m", "pytest", *(session.posargs or TESTS), env={"OMP_NUM_THREADS": "1"})
    session.install("--no-deps", "--force-reinstall", ".", env={"CXX": "false"})
    try_it(session, "pure")


@nox.session
@nox.parametrize("extra", list(OF_EXTRAS))
def extra(session: nox.Session, extra: str) -> None:
    """The tests of one extra, without the others."""
    session.install("torch==2.13.0", "hypothesis", "pytest", f".[{extra}]")  # in one line, as the Makefile says
    try_it(session, "compiled")
    session.run("python", "-m", "pytest", *OF_EXTRAS[extra], env={"OMP_NUM_THREADS": "1"})
