"""Optimizers for row-sparse gradients: torch's own, with steps that cost only the rows that have a gradient.

All of them can update in the backward pass.

A layer with ``sparse_grad=True`` computes a gradient for k rows of its weight. The dense optimizer would treat the
gradient of every other row as zero. The argument `sparse_rows` says what happens to these rows without a gradient:

- ``"exact"``: They get what the dense optimizer gives them. Momentum, Adam's moments and weight decay move them as
  well. This takes one pass over parameter and state, which reads no gradient for them.
- ``"decay"``: They stay where they are, and so does their state: they miss the step. When a row has a gradient again,
  its momentum, or its moments, first decay by the product of the factors of the steps that it missed. They are then
  those that the dense optimizer has if it leaves the row's weights where they are, also under a schedule of any option.
- ``"lazy"``: They stay where they are, and so does their state. Missed steps are not made up for.
  `torch.optim.SparseAdam` does the same.

A gradient of zero changes nothing in SGD without momentum and in Adagrad, if there is no weight decay. All three modes
are exact there, and touch only the rows that have a gradient.

The mode ``"decay"`` makes up for these factors of missed steps, each with the options of its own step:

- SGD's momentum. In a step with a momentum of zero torch leaves the momentum buffer as it is, and so do we.
- Both betas of Adam and AdamW.
- AdamW's weight decay, with the learning rate of that step. It is the only one that changes weights.

Every other weight decay is a part of the gradient. It acts, in the modes ``"decay"`` and ``"lazy"``, only in steps in
which the row has a gradient. Dampening, Nesterov's momentum and `maximize` concern the gradient as well. The bias
correction of Adam and the `lr_decay` of Adagrad count all steps of the parameter, in all modes.

Dense gradients go to native code, where the user chooses no implementation and the parameter is float32 on the CPU. Its
results are torch's but for rounding, and the same bits on every machine and for every number of threads. Other dense
gradients, AMSGrad and `maximize` go to torch's own implementation: the fused one, where the user chooses none and it
takes the group's parameters as they are in that step. The choice shows neither in `param_groups` nor in a state_dict.

With ``in_backward=True`` the backward pass updates each parameter as soon as its gradient is complete, and frees the
gradient. Memory never holds the gradients of all parameters. The loop stays as it is: ``optimizer.zero_grad()``,
``loss.backward()``, ``optimizer.step()``. The results are those of the separate step, bit for bit.

- The options of the moment of the backward pass count, such as the learning rate.
- After the backward pass each `grad` is None. `step` ends the step, and counts for schedulers and hooks. A closure has
  the backward pass in it.
- ``torch.autograd.grad`` updates nothing. Every other backward pass does.
- What needs all gradients before the first update is refused: a second backward pass before `step` (accumulation),
  `meprop.optim.clip_grad_norm_`, ``create_graph=True``, GradScaler, and several processes.
- torch's own `clip_grad_norm_` finds no gradient, and has no effect. A hook of a parameter still sees its gradient.
- A state_dict is that of the optimizer without `in_backward`, and loads both ways.

State and state_dict are torch's. The mode ``"decay"`` adds one tensor [O] for each state of a parameter [O, *] that
decays, such as `exp_avg_row_decay`: the product of the factors that each row has missed. `param_row_decay` is that of
AdamW's weights. The method `wake` brings all rows up to date, and removes these tensors.
"""

from meprop.optim.adagrad import Adagrad
from meprop.optim.adam import Adam, AdamW
from meprop.optim.base import SparseRows
from meprop.optim.clip import clip_grad_norm_
from meprop.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "SparseRows", "clip_grad_norm_"]
