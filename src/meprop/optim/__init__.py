"""Optimizers for row-sparse gradients: torch's own, with steps that cost only the rows that have a gradient.

All of them can update in the backward pass.

A layer with ``sparse_grad=True`` computes a gradient for k rows of its weight. The dense optimizer would treat the
gradient of every other row as zero. The argument `sparse_rows` says what happens to these rows without a gradient:

- ``"exact"``: They get what the dense optimizer gives them. Momentum, Adam's moments and weight decay move them as
  well. This takes one pass over parameter and state, which reads no gradient for them.
- ``"decay"``: They stay where they are, and so does their state: they miss the step. When a row has a gradient again,
  its momentum, moments or sums first become what the missed steps make of them. They are then those that the dense
  optimizer has if it leaves the row's weights where they are, also under a schedule of any option.
- ``"lazy"``: They stay where they are, and so does their state. Missed steps are not made up for.
  `torch.optim.SparseAdam` does the same.

A gradient of zero changes nothing in SGD without momentum and in Adagrad, if there is no weight decay. All three modes
are exact there, and touch only the rows that have a gradient.

The mode ``"decay"`` makes up for two things in missed steps, each with the options of its own step:

- Factors: SGD's momentum, both betas of Adam and AdamW, and AdamW's weight decay with the learning rate of that step.
  Only this weight decay changes weights. In a step with a momentum of zero torch leaves the momentum buffer as it is,
  and so do we.
- Every other weight decay, as far as it is a part of the gradient that is added to momentum, moments and sums, with
  SGD's dampening. The row's weights do not move meanwhile. The sum over the missed steps is then a number for each row,
  times its weights or their squares. The largest second moment of AMSGrad is not made up for.

In the modes ``"decay"`` and ``"lazy"`` a row is moved only in steps in which it has a gradient, also by momentum and by
a weight decay other than AdamW's. The bias correction of Adam and the `lr_decay` of Adagrad count all steps of the
parameter, in all modes.

Dense gradients go to torch's own implementation: the fused one, where the user chooses none and it takes the group's
parameters as they are in that step. Those of large parameters, of 2^20 elements and more, go to native code instead,
where the user chooses no implementation and the parameter is float32 on the CPU. Its results are torch's but for
rounding. AMSGrad and `maximize` are always torch's. The choice shows neither in `param_groups` nor in a state_dict.

With ``in_backward=True`` the backward pass updates each large parameter, of 2^20 elements and more, as soon as its
gradient is complete, and frees the gradient. Memory never holds the gradients of all large parameters. `step` updates
the others, all at once. The loop stays as it is: ``optimizer.zero_grad()``, ``loss.backward()``, ``optimizer.step()``.
The results are those of the separate step, bit for bit. They differ by rounding in a group of several dtypes or memory
layouts: torch's fused implementation takes each parameter that it can, where the separate step needs a whole group that
it can take. They differ by rounding too where a weight is used three times or more, as its gradients may be added in
another order.

- The options of the moment of the backward pass count, such as the learning rate.
- After the backward pass the `grad` of a large parameter is None. `step` ends the step, and counts for schedulers and
  hooks. A closure has the backward pass in it.
- ``torch.autograd.grad`` updates nothing. Every other backward pass does.
- What needs all gradients before the first update is refused for large parameters: a second backward pass before
  `step` (accumulation), `meprop.optim.clip_grad_norm_`, ``create_graph=True``, and several processes. So is a weight in
  several checkpoints with ``use_reentrant=True``: each of them is a backward pass of its own. GradScaler is refused.
- A backward pass that fails has updated some parameters. Call `zero_grad`, and then `step`, to go on after it.
- torch's own `clip_grad_norm_` does not find the gradients of large parameters. A hook of a parameter still sees its
  gradient.
- A state_dict is that of the optimizer without `in_backward`, and loads both ways.

With ``state_dtype=torch.bfloat16`` momentum, moments and sums of float32 parameters are kept in bfloat16, in half the
memory. A step computes them in float32, goes on from that, and then rounds them at random: up with the probability that
keeps the mean. Rounded to the nearest, a second moment would stand still, as a step changes it by less than what
bfloat16 can tell apart. Native code does the steps of contiguous parameters on the CPU, of any size. Plain torch does
the others, which is slow. The results are the same bits.

- The random numbers are a function of the place of the parameter in the optimizer, of the number of its steps, and of
  the place of the entry. They are the same for any number of threads. ``torch.manual_seed`` has no influence, and no
  random state changes: several processes, with seeds of their own, have to round their copies of a parameter alike.
- The state has a whole number more, `rounding`, with which a resumed run goes on bit for bit.
- A state_dict loads both ways: states in bfloat16 become float32 in an optimizer without `state_dtype` and in torch's,
  and states in float32 become bfloat16.
- It is refused with ``foreach=True``, ``fused=True``, ``capturable=True``, ``differentiable=True`` and
  ``amsgrad=True``, under torch.compile, and for parameters of another dtype or type, such as the DTensors of
  ``fully_shard``.

With ``copy_dtype=torch.bfloat16`` a step also writes weights in bfloat16, for layers whose forward product is in it.
These are our layers with ``compute_dtype=torch.bfloat16``, and under autocast all but LSTMs. Their next forward pass
reads what the step has written, and does not cast the weight. The results are the same bits.

- It is for contiguous weights of 2^20 elements and more, on the CPU, whose steps are done here: those with row-sparse
  gradients, and dense ones that go to native code. Other weights are cast in each pass, as without it.
- A copy begins with the step after the first forward pass. It ends with a step before which no layer has used it. It
  takes 2 bytes a weight, and is no part of a state_dict.
- Each pass that trains makes sure that the copy is the weight's: that torch has counted no change since the step, and
  that some entries agree. Otherwise the weight is cast. Passes without gradients always cast.
- Changes through ``weight.data`` or a NumPy array can be missed, as torch does not count them. They are those of a few
  entries, and those that are too small to change most entries in bfloat16. The copy is then wrong until a step writes
  these entries. Change weights within ``torch.no_grad()`` instead, or leave `copy_dtype` out.
- The backward pass of an LSTM, and under autocast of every layer, reads the copy. It has to come before the next step,
  as without `compute_dtype` and autocast. Torch raises an error otherwise.

State and state_dict are torch's otherwise. The mode ``"decay"`` adds one tensor [O] for each state of a parameter
[O, *] that decays, such as `exp_avg_row_decay`: the product of the factors that each row has missed.
`param_row_decay` is that of AdamW's weights. With a weight decay other than AdamW's there is another tensor [O], such
as `exp_avg_row_weight_decay`: what is to be added to each row, as a multiple of its weights or their squares. The
method `wake` brings all rows up to date, and removes these tensors.
"""

from meprop.optim.adagrad import Adagrad
from meprop.optim.adam import Adam, AdamW
from meprop.optim.base import SparseRows
from meprop.optim.clip import clip_grad_norm_
from meprop.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "SparseRows", "clip_grad_norm_"]
