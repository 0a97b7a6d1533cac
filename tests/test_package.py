"""What `pip install` and `import meprop` give."""

import os
import shutil
import subprocess
import sys

import meprop
from meprop.ops import native


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_the_extension_is_built_wherever_there_is_a_compiler():
    """A compile error falls back to the pure-Python wheel; here it would be noticed."""
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        assert native.reason_missing() is None
        assert meprop.backend_info()["native"] is True


def test_another_build_is_tested_where_one_is_asked_for():
    """Or `make sanitize` would test the ordinary build."""
    asked = os.environ.get("MEPROP_TEST_EXTENSION")
    assert asked is None or native._extension.__file__ == asked


def test_the_fallback_without_the_extension_gives_the_same_results():
    work = (
        "import torch, meprop; torch.manual_seed(0)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(30, 200), torch.nn.ReLU(), torch.nn.Linear(200, 200))\n"
        "for scope in ('example', 'batch'):\n"
        "    meprop.convert(model, meprop.TopK(5, scope=scope), when='always')\n"
        "    model(torch.randn(4, 30)).square().sum().backward()\n"
        "for p in model.parameters(): print(*(f'{v:.3f}' for v in p.grad.norm(dim=-1, keepdim=True).flatten()))"
    )
    without = (
        "import sys; sys.modules['meprop._C'] = None\n"
        "import meprop\n"
        "assert meprop.backend_info()['native'] is False\n"
        "assert 'C++ compiler' in meprop.backend_info()['reasons']['native']\n"
    )
    assert python(without + work) == python(work)


def test_import_needs_only_torch_and_under_50_ms_of_its_own():
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter(); import meprop; seconds = time.perf_counter() - start\n"
        "extras = {'numpy', 'tyro', 'rich', 'pooch', 'matplotlib', 'lightning_fabric', 'tensorboard', 'lightning'}\n"
        "extras |= {'transformers', 'accelerate'}\n"
        "print(seconds, *sorted(extras & (set(sys.modules) - before)))"
    )
    # As a user has it: the first run leaves the modules compiled, unless the environment forbids that.
    runs = [python(code, PYTHONDONTWRITEBYTECODE="").split() for _ in range(4)]
    assert all(len(run) == 1 for run in runs), f"import meprop also imports {runs[0][1:]}"
    assert min(float(run[0]) for run in runs) < 0.05


def test_converting_imports_no_library_that_the_model_does_not_come_from():
    code = "import sys, meprop, torch; meprop.convert(torch.nn.Linear(7, 200), meprop.TopK(5)); print(*sys.modules)"
    assert not {"transformers", "lightning"} & set(python(code).split())


def test_every_public_name_exists_and_is_documented():
    for name in meprop.__all__:
        assert getattr(meprop, name).__doc__, name
