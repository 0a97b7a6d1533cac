"""The settings of training: those that every task shares, and those of simplifying.

What they are made into is imported then: `meprop report` reads this file without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast

from meprop.errors import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Self

    import meprop
    from meprop.rules import Rule

DENSE = "dense"
"""What stands for a rule where a run has none."""
DEFAULT_RULE = "topk"
MARGIN = 0.2
"""Points of a score in percent that do not matter, by default."""


def rule_names(*others: str) -> Any:
    """Return the type of a rule's name: the Literal of all that `meprop.rules.named` has now, the default first.

    Args:
        others: What is allowed beside them, such as `DENSE`.
    """
    from meprop import rules

    return Literal[tuple(dict.fromkeys((DEFAULT_RULE, *rules.named(), *others)))]  # pyright: ignore[reportInvalidTypeForm]


OF_RULES = (
    *("k", "k_start", "k_ratio", "scope", "noise", "noise_of", "noise_start", "exact_sum"),
    *("dense_warmup_steps", "dense_end_steps", "when", "fuse"),
    *("compute_dtype", "skip_zeros", "sparse_rows"),
)
"""Settings that a run without a rule would ignore."""


def check_dense(given: Mapping[str, Any], default: RunConfig) -> None:
    """Check that no setting is given which a run without a rule would ignore.

    Args:
        given: Settings by name.
        default: The settings where none are given.

    Raises:
        ValueError: One is.
    """
    ignored = [name for name, value in given.items() if name in OF_RULES and value != getattr(default, name)]
    if ignored:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise ValueError(f"{options}: --rule {DENSE} keeps everything, and would ignore that; leave it out")


@dataclass(frozen=True)
class RunConfig:
    """Settings of the runs of every task, the user's own included.

    Raises:
        ValueError: If a setting is outside its range; the message names the option.
    """

    epochs: int = 5
    """Passes over the training data, with an evaluation after each."""
    budget_seconds: float | None = None
    """Seconds of training steps of each run, instead of passes. The schedules of learning rate and rule then end with
    these seconds, and the runs are evaluated at the same times, as often as there are epochs."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights, the order of the data and dropout. Each is a run of its own."""
    k: int | float = 20
    """How many entries of each output gradient are kept: a count (20), or a share of the features (0.05)."""
    k_start: int | float | None = None
    """k in the first sparse step. It goes to k linearly, which it reaches in the last sparse step. So the mean over the
    steps is halfway between the two. None: It is k in all steps."""
    k_ratio: tuple[float, ...] = ()
    """The ratio of the sparse layers' k, in the model's order, such as 1 3. Their mean is k. Empty: All have k."""
    scope: Literal["example", "batch", "global", "rows"] = "example"
    """What is chosen, and among what.
    example: k entries of each example, as in the paper.
    batch: The same k features for the whole batch (unified top-k).
    global: k entries of each example on average, of the whole gradient.
    rows: Whole examples (sampled), where k is a share of the examples."""
    noise: float | None = None
    """The budget of added variance of the rule sampled, as a share of the squared gradient. It decides how many entries
    are kept, so that k and scope have no meaning with it. None: k entries are drawn."""
    noise_of: Literal["layer", "model"] = "layer"
    """Of what noise is the budget.
    layer: Of each layer. The budgets of layers in series multiply.
    model: Of all layers together, which get equal shares."""
    noise_start: float | None = None
    """The budget in the first sparse step. It goes to noise geometrically, which it reaches in the last sparse step.
    None: It is noise in all steps."""
    dense_warmup_steps: int = 0
    """How many steps are dense at the start of a sparse run."""
    dense_end_steps: int = 0
    """How many steps are dense at the end of a sparse run."""
    exact_sum: bool | None = None
    """Whether each row also gets the batch's mean of what is left out. None: as the rule has it."""
    when: Literal["always", "auto"] = "always"
    """Which layers are sparse: all that can be (always), or those that measure faster on this machine (auto)."""
    fuse: bool = False
    """Compute dropout in one pass with the activation before it, in sparse runs. The random numbers are others than
    torch's, of the same distribution."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What sparse layers form their forward products in, in sparse runs. Weights and gradients stay in fp32, and so do
    the products of the backward pass. An LSTM rounds its weights instead. On a CPU the tasks of ours then have
    the optimizers of meprop.optim."""
    skip_zeros: bool = False
    """Leave zeros of the input out of the forward products of linear layers, in sparse runs, where that measures faster
    on this machine. After a ReLU most are zero. Results differ by rounding."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. With auto, that is a GPU if there is one."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic: fp32, or bf16 autocast with fp32 weights."""

    def __post_init__(self) -> None:
        from meprop.rules.base import checked_k, checked_share

        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        if self.budget_seconds is not None and not 0 < self.budget_seconds < inf:
            raise ValueError(f"--budget-seconds must be a positive number, got {self.budget_seconds}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**64 for s in self.seeds):
            raise ValueError(f"--seeds must be one or more different integers from 0 to 2**64 - 1, got {[*self.seeds]}")
        for name in ("dense_warmup_steps", "dense_end_steps"):
            if (steps := getattr(self, name)) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {steps}")
        if self.noise is None and (self.noise_of, self.noise_start) != ("layer", None):
            raise ValueError(
                f"--noise-of {self.noise_of} and --noise-start {self.noise_start} need --noise, the budget at the end"
            )
        if self.noise_start is not None:
            checked_share("--noise-start", self.noise_start, below_one=False)
        if (self.k_start is not None or self.k_ratio) and self.noise is not None:
            raise ValueError(
                f"--k-start {self.k_start} and --k-ratio {[*self.k_ratio]} need a rule with k: --noise {self.noise} "
                "decides how many entries are kept; give --noise None"
            )
        if self.k_start is not None:
            checked_k(self.k_start)
            if type(self.k_start) is not type(self.k):
                raise ValueError(f"--k-start {self.k_start} and --k {self.k}: give two counts, or two shares")
        for weight in self.k_ratio:
            checked_share("--k-ratio", weight, below_one=False)
        if self.compute_dtype != "float32" and self.precision != "32-true":
            raise ValueError(
                f"--compute-dtype {self.compute_dtype} needs --precision 32-true: {self.precision} is autocast, "
                "which chooses by itself"
            )
        self.rule()
        for k in (self.k, self.k_start or self.k) if self.k_ratio else ():
            of_layers = [k * weight / fmean(self.k_ratio) for weight in self.k_ratio]
            fits = min(of_layers) >= 0.5 if isinstance(k, int) else max(of_layers) <= 1 + 1e-9  # before rounding
            if not fits:
                raise ValueError(
                    f"--k-ratio {[*self.k_ratio]} makes k={k} {', '.join(f'{each:.3g}' for each in of_layers)} in the "
                    "layers: each needs a count of 1 or more, or a share of at most 1; give another --k or --k-ratio"
                )

    def rule(self, name: str | None = None) -> Rule:
        """Return the rule of this name, with these settings.

        Args:
            name: One of `meprop.rules.named`. None for the one that has a noise if that is given, else for the default.

        Raises:
            ValueError: There is no rule of this name, or it does not fit the settings.
        """
        from meprop import rules

        found = rules.named()
        name = name or (DEFAULT_RULE if self.noise is None else rules.Sampled.name)
        if name not in found:
            raise ValueError(f"rule is {name!r}; the rules are {', '.join(found)}{did_you_mean(name, found)}")
        return found[name].of_settings(self.k, self.scope, noise=self.noise, exact_sum=self.exact_sum)

    @property
    def budget(self) -> Literal["epochs", "seconds"]:
        """What all runs have the same of."""
        return "epochs" if self.budget_seconds is None else "seconds"

    @property
    def keeps_its_density(self) -> bool:
        """Whether a sparse run keeps one share of the entries from its first step to its last."""
        return self.noise is None and self.k_start is None and not (self.dense_warmup_steps or self.dense_end_steps)

    def rule_schedule(self, model: nn.Module, total_steps: int) -> meprop.RuleSchedule | None:
        """Return the schedule of a sparse run of so many steps. None if its rules stay what they are.

        Raises:
            ValueError: The dense steps leave none that is sparse.
        """
        from meprop import rules, schedule

        first, last = self.dense_warmup_steps, total_steps - self.dense_end_steps
        if first >= last:
            raise ValueError(
                f"--dense-warmup-steps {first} and --dense-end-steps {self.dense_end_steps} leave no sparse step: the "
                f"training has {total_steps}"
            )
        if self.noise_start is None and self.k_start is None and last - first == total_steps:
            return None

        def rule_at(step: int, rule: Rule) -> Rule | None:
            if not first <= step < last:
                return None
            done = (step - first) / max(1, last - first - 1)
            if self.k_start is not None:
                return _with_k(rule, done + (1 - done) * self.first_k)
            if self.noise is None or self.noise_start is None or not isinstance(rule, rules.Sampled):
                return rule
            assert rule.noise is not None  # it is of `noise`
            return replace(rule, noise=rule.noise * schedule.anneal(self.noise_start / self.noise, 1.0, done))

        return schedule.RuleSchedule(model, rule_at)

    @property
    def first_k(self) -> float:
        """k in the first sparse step, as a multiple of `k`."""
        return 1.0 if self.k_start is None else self.k_start / self.k

    def of_dense(self) -> Self:
        """Return the settings of a run without a rule. No layer of it is ours."""
        return replace(self, compute_dtype="float32")

    def convert(self, model: nn.Module, rule: Rule, *, sparse_grad: bool = False) -> None:
        """Convert the model of a sparse run.

        Raises:
            ValueError: `k_ratio` has another number of layers than the model.
        """
        import torch

        import meprop
        from meprop.nn.base import SparseLayer

        compute_dtype = torch.bfloat16 if self.compute_dtype == "bfloat16" else None
        meprop.convert(
            model,
            rule,
            sparse_grad=sparse_grad,
            compute_dtype=compute_dtype,
            when=self.when,
            fuse=self.fuse,
            skip_zeros=self.skip_zeros,
        )
        if self.k_ratio:
            layers = [each for each in model.modules() if isinstance(each, SparseLayer)]
            if len(layers) != len(self.k_ratio):
                raise ValueError(
                    f"--k-ratio {[*self.k_ratio]}: give a number for each sparse layer, {len(layers)} here"
                )
            for layer, weight in zip(layers, self.k_ratio, strict=True):
                layer.rule = _with_k(rule, weight / fmean(self.k_ratio))
        if self.noise is not None and self.noise_of == "model":
            meprop.share_noise(model, self.noise)


def _with_k(rule: Rule, factor: float) -> Rule:
    """Return a rule with so many times its k: a count stays one, of 1 or more, and a share is at most 1."""
    k: int | float | None = getattr(rule, "k", None)
    if k is None:
        raise ValueError(f"--k-start and --k-ratio need a rule with k, such as topk; this one has none: {rule}")
    more = k * factor
    return replace(cast("Any", rule), k=max(1, round(more)) if isinstance(k, int) else min(1.0, more))


@dataclass(frozen=True)
class ScriptTraining(RunConfig):
    """Settings of the user's own trainings. Their noise is a default, which a rule without one leaves aside."""

    noise: float | None = 0.25
    when: Literal["always", "auto"] = "auto"

    def rule(self, name: str | None = None) -> Rule:
        """See `RunConfig.rule`."""
        from meprop import rules

        if name not in (None, rules.Sampled.name) and self.noise == type(self).noise:
            return RunConfig(k=self.k, scope=self.scope, exact_sum=self.exact_sum).rule(name)
        return super().rule(name)


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """Settings that every task of ours shares: optimizer and learning rate too.

    Raises:
        ValueError: If a setting is outside its range; the message names the option.
    """

    sparse_rows: Literal["no", "exact", "decay", "lazy"] = "no"
    """What meprop.optim does with the rows of a weight that get no gradient. It needs scope batch, or entries of the
    whole gradient without the exact sum.
    no: Gradients are dense, and so are torch's optimizers.
    exact: The rows are updated as with dense gradients.
    decay: The rows wait, and their moments decay when the next gradient comes.
    lazy: The rows and their moments wait."""
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    """Optimizer, the same for dense and sparse. It is torch's fused implementation where there is one."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What adam and adagrad keep their moments and sums in. With bfloat16 the optimizer is that of meprop.optim."""
    in_backward: bool = False
    """Update each weight of a million elements or more in the backward pass, by meprop.optim. Its gradient is not kept.
    The time of the update counts as that of the backward pass. Smaller weights are updated in the step."""
    lr: float = 1e-3
    """Learning rate at the start."""
    schedule: Literal["cosine", "constant", "geometric"] = "cosine"
    """Learning rate over the steps.
    cosine: It falls to zero along half a cosine.
    constant: It stays what it is, as in the paper.
    geometric: It falls to lr_end, by the same factor in each step."""
    lr_end: float | None = None
    """Learning rate after the last step, with --schedule geometric. None: a thousandth of the one at the start."""
    weight_decay: float = 0.0
    """Weight decay of all weights and biases. With adam it is decoupled, as in AdamW. With the others it is the factor
    of an L2 penalty."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and isfinite(self.lr)):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        if self.lr_end is not None and self.schedule != "geometric":
            raise ValueError(f"--lr-end {self.lr_end} needs --schedule geometric: {self.schedule} has its own end")
        if self.lr_end is not None and not 0 < self.lr_end <= self.lr:
            raise ValueError(f"--lr-end must be above 0 and at most --lr, which is {self.lr}, got {self.lr_end}")
        if not 0 <= self.weight_decay < inf:
            raise ValueError(f"--weight-decay must be a number, 0 or more, got {self.weight_decay}")
        if self.sparse_rows != "no" and self.scope not in ("batch", "global") and self.exact_sum is not False:
            raise ValueError(
                f"--sparse-rows {self.sparse_rows} needs --scope batch, or entries of the whole gradient without the "
                "exact sum (--exact-sum False): other choices leave no rows out"
            )
        if self.state_dtype != "float32" and self.optimizer == "sgd":
            raise ValueError(f"--state-dtype {self.state_dtype} needs --optimizer adam or adagrad: sgd keeps nothing")
        super().__post_init__()

    def of_dense(self) -> Self:
        """See `RunConfig.of_dense`. Its gradients have all rows."""
        return replace(super().of_dense(), sparse_rows="no")

    def convert(self, model: nn.Module, rule: Rule, *, sparse_grad: bool = False) -> None:
        """Convert the model of a sparse run. Its weights get row-sparse gradients if the optimizer is for them."""
        super().convert(model, rule, sparse_grad=sparse_grad or self.sparse_rows != "no")


@dataclass(frozen=True)
class SimplifyConfig:
    """How runs are simplified (meSimp). Cycles and checks are those of the paper's code.

    Raises:
        ValueError: If a setting is outside its range; the message names the option.
    """

    threshold: float | None = None
    """Units that a smaller share of the examples selects are removed. It is for rules with a fixed number of entries in
    each row; the paper's code has 0.1."""
    of_mean: float | None = None
    """Units that are selected less often than this share of the layer's mean are removed. The default is 0.5 without
    --threshold."""
    checks: int = 8
    """How many times an epoch the run looks for units to remove."""
    cycle: int = 5
    """Epochs in a cycle. Cycles that remove units and cycles that only train take turns."""
    warmup: int = 0
    """Epochs before the first cycle. Nothing is removed in them."""
    max_removal: float = 1.0
    """The largest share of a layer's units that is removed at once. The least active units go first."""
    min_units: int = 1
    """At least so many units of each layer stay."""

    def __post_init__(self) -> None:
        if self.threshold is not None and self.of_mean is not None:
            raise ValueError(f"--threshold {self.threshold} and --of-mean {self.of_mean} are two measures: give one")
        for name in ("threshold", "of_mean"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be from 0 to 1, got {share}")
        if not 0 < self.max_removal <= 1:
            raise ValueError(f"--max-removal must be above 0 and at most 1, got {self.max_removal}")
        for name, least in {"checks": 1, "cycle": 1, "warmup": 0, "min_units": 1}.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")

    def simplifier(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int, example_inputs: Sequence[Any]
    ) -> meprop.Simplifier:
        """Return one with these settings."""
        from meprop.pruning import Simplifier

        return Simplifier(
            model,
            self.threshold,
            of_mean=self.of_mean,
            optimizer=optimizer,
            check_every=max(1, steps_per_epoch // self.checks),
            cycle=self.cycle * steps_per_epoch,
            warmup=self.warmup * steps_per_epoch,
            max_removal=self.max_removal,
            min_units=self.min_units,
            example_inputs=example_inputs,
        )
