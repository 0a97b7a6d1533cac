"""Optimizers for row-sparse gradients: torch's own, with steps that cost only the rows that have a gradient.

A layer with ``sparse_grad=True`` computes a gradient for k rows of its weight. The dense optimizer would treat the
gradient of every other row as zero. The argument `sparse_rows` says what happens to these rows without a gradient:

- ``"exact"``: They get what the dense optimizer gives them. Momentum, Adam's moments and weight decay move them as
  well. This takes one pass over parameter and state, which reads no gradient for them.
- ``"decay"``: They stay where they are, and so does their state: they miss the step. When a row has a gradient again,
  its momentum, or its moments, first decay in closed form for the steps that it missed. They are then those of the
  dense optimizer. The weights of the row have not moved in the meantime.
- ``"lazy"``: They stay where they are, and so does their state. Missed steps are not made up for.
  `torch.optim.SparseAdam` does the same.

A gradient of zero changes nothing in SGD without momentum and in Adagrad, if there is no weight decay. All three modes
are exact there, and touch only the rows that have a gradient.

AdamW's weight decay of missed steps is made up for by ``"decay"``, at the learning rate of the step in which the row
has a gradient again. Every other weight decay acts, in the modes ``"decay"`` and ``"lazy"``, only on rows with a
gradient.

Dense gradients go to torch's own implementation: the fused one, where the user chooses none and it takes the
parameters. There is one exception. A weight with a bfloat16 copy (`meprop.copies`) is updated here instead of by
torch's fused implementation, so that the copy is written in the same pass.

State and state_dict are torch's. The mode ``"decay"`` adds `row_step` [O] to the state of a parameter [O, *]: the step
until which each row's state is up to date. For SGD it also adds `step`. The method `wake` brings all rows up to date.
"""

from meprop.optim.adagrad import Adagrad
from meprop.optim.adam import Adam, AdamW
from meprop.optim.base import SparseRows
from meprop.optim.clip import clip_grad_norm_
from meprop.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "SparseRows", "clip_grad_norm_"]
