"""What only Adam has: a sparse optimizer of torch's to be compared with."""

import torch

from meprop import optim
from optimizer_cases import gradients, parameters


def test_lazy_adam_is_sparse_adam():
    ours, theirs = parameters(torch.float64)[:1], parameters(torch.float64)[:1]
    optimizer, expected = optim.Adam(ours, 0.01, sparse_rows="lazy"), torch.optim.SparseAdam(theirs, 0.01)
    for step in [step for step in range(200) if step % 7 != 3]:
        ours[0].grad, theirs[0].grad = gradients(step, torch.float64)[0], gradients(step, torch.float64)[0]
        optimizer.step()
        expected.step()
    # SparseAdam adds eps to the root before it is corrected for the moments' start
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
