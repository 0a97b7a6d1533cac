"""Images deformed on a GPU."""

import pytest
import torch

from meprop.tasks.deform import STRENGTHS, Draws, deform

PAPER = STRENGTHS["paper"]


@pytest.mark.cuda
def test_what_is_drawn_deforms_as_on_the_cpu(device):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(20, 29, 27, generator=generator), torch.arange(20) % 10
    draws = PAPER.draw(labels, 29, 27, generator)
    expected = PAPER.apply(images, draws)
    found = PAPER.apply(images.to(device), Draws(*(each.to(device) for each in draws)))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.cuda
def test_nothing_waits_and_the_same_state_gives_the_same_bits(device):
    images, labels = torch.rand(20, 29, 29, device=device), torch.arange(20, device=device) % 10
    generator = torch.Generator(device).manual_seed(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one, other = (deform(images, labels, PAPER, generator) for _ in range(2))
        again = deform(images, labels, PAPER, generator.manual_seed(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.isfinite().all()
