"""The verdict's statistics on simulated runs: how often it is wrong, and how often it decides."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from statistics import mean, stdev

import pytest

pytest.importorskip("scipy")

import numpy as np
from scipy import integrate, stats

from meprop.training import verdict
from meprop.training.paired import LEAST_SPEED_SPREAD, Sample
from meprop.training.verdict import judge, judge_all
from simulated import made, simulated

SEED = 20
SPREADS = (0.05, 0.1, 0.2, 0.3)  # those of paired differences in recorded runs on MNIST, in points
NOISES = (0.01, 0.05)  # and of the logarithms of times


@pytest.fixture
def no_advice(monkeypatch):
    """Without the number of seeds that is advised, which takes most of the time."""
    monkeypatch.setattr(verdict._Evidence, "seeds_needed", lambda self: None)


def words(rng, sets, seeds, budget="epochs", margin=0.2, **kind):
    return Counter(judge(*simulated(rng, seeds, **kind), "accuracy", margin, budget).word for _ in range(sets))


# ---------------------------------------------------------------- how often it is wrong


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize(
    ("kind", "spreads"),
    [
        ({}, SPREADS),
        ({"gain": -0.5, "speed": 1.5}, SPREADS),
        ({"spent": 60, "budget": "seconds"}, SPREADS[:3]),  # of the last, 0.3% with three seeds
    ],
    ids=["identical", "a loss of 0.5 and faster", "identical, equal seconds"],
)
def test_use_is_never_said_of_what_is_not_better(kind, spreads):
    rng, found = np.random.default_rng(SEED), Counter()
    for seeds in range(1, 11):
        for spread in spreads:
            for noise in NOISES:
                found += words(rng, 20, seeds, spread=spread, noise=noise, **kind)
    assert sum(found.values()) == 400 * len(spreads)
    assert found["USE"] == 0


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize(("spread", "seeds"), [(0.05, 4), (0.1, 7), (0.2, 18), (0.3, 36)])
@pytest.mark.parametrize("noise", NOISES)
def test_two_identical_configurations_are_a_tie(spread, seeds, noise):
    rng = np.random.default_rng(SEED)
    found = words(rng, 20, seeds, spread=spread, noise=noise)
    assert found["TIE"] >= 18
    assert found["USE"] == 0


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_tests_are_wrong_as_rarely_as_they_say(count):
    """Quality at the margin itself is called good enough by 5% of samples, a ratio of 1.03 larger by 2.5% or fewer."""
    rng, sets = np.random.default_rng(SEED), 4000
    at_margin = [Sample.of(rng.normal(-0.2, 0.1, count).tolist()) for _ in range(sets)]
    assert mean(sample.p_above(-0.2) < 0.05 for sample in at_margin) == pytest.approx(0.05, abs=0.012)
    assert mean(sample.p_below(-0.2) < 0.05 for sample in at_margin) == pytest.approx(0.05, abs=0.012)
    inside = [sample.estimate() for sample in at_margin]
    assert mean(each.low < -0.2 < each.high for each in inside) == pytest.approx(0.95, abs=0.012)
    ratios = [Sample.of_ratios([(1.03 * math.exp(x), 1.0) for x in rng.normal(0, 0.05, count)]) for _ in range(sets)]
    assert mean(sample.p_above(math.log(1.03)) < 0.025 for sample in ratios) < 0.03


# ---------------------------------------------------------------- how often it decides


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize(("spread", "noise", "seeds"), [(0.05, 0.01, 3), (0.05, 0.05, 4), (0.1, 0.02, 6)])
def test_what_is_faster_at_equal_quality_is_used_as_often_as_is_promised(spread, noise, seeds):
    """One dev score at the end of each run, so that the times to the target are those of the whole runs."""
    rng, sets = np.random.default_rng(SEED), 300
    found = words(rng, sets, seeds, spread=spread, noise=noise, speed=1.5, epochs=1, margin=0.25)
    quality, time = Sample(0.0, spread, seeds), Sample(math.log(1.5), max(noise, LEAST_SPEED_SPREAD), seeds)
    counts = np.array([seeds])
    promised = quality.power_above(-0.25, 0.05, counts)[0] * time.power_above(math.log(1.03), 0.025, counts)[0]
    assert found["USE"] / sets == pytest.approx(promised, abs=0.07)
    assert promised > 0.6


FOUND = [  # mean and spread of the differences, ratio of times and the spread of its logarithm
    pytest.param(0.0, 0.1, 1.0, 0.03, "TIE", id="a tie"),
    pytest.param(-0.05, 0.15, 1.0, 0.05, "TIE", id="nearly a tie"),
    pytest.param(-0.05, 0.2, 1.5, 0.05, "USE", id="faster"),
    pytest.param(-0.05, 0.2, 0.8, 0.05, "DON'T", id="slower"),
    pytest.param(-0.5, 0.3, 1.5, 0.05, "DON'T", id="worse"),
]


@pytest.mark.parametrize(("gain", "spread", "ratio", "noise", "word"), FOUND)
def test_as_many_seeds_as_are_said_to_decide_do(gain, spread, ratio, noise, word):
    quality = Sample(gain, spread, 3)
    time = Sample(math.log(ratio), noise, 3)
    needed = verdict._Evidence(0.2, "epochs", quality, time, None, hopeless=False).seeds_needed()

    def decided(seeds):
        rng, sets, found = np.random.default_rng(SEED), 400, Counter()
        for _ in range(sets):
            gains, logs = rng.normal(gain, spread, seeds), rng.normal(math.log(ratio), noise, seeds)
            drawn = Sample.of_ratios([(math.exp(x), 1.0) for x in logs])
            found[verdict._Evidence(0.2, "epochs", Sample.of(gains.tolist()), drawn, None, hopeless=False).word()] += 1
        assert found.most_common(1)[0][0] in (word, "UNDECIDED")
        return 1 - found["UNDECIDED"] / sets

    assert 0.75 <= decided(needed) <= 0.95
    if needed > 4:
        assert decided(needed - 1) < 0.87


@pytest.mark.parametrize(
    ("quality", "step", "needed"),
    [
        (Sample(-0.2, 0.1, 4), Sample(0.4, 0.03, 4), None),  # at the margin
        (Sample(0.5, 0.1, 4), Sample(0.0, 0.03, 4), None),  # better, and as fast
        (Sample(0.0, 0.0, 4), Sample(math.log(1.03), 0.03, 4), 5),
        (Sample(0.0, 0.0, 1), Sample(0.5, 0.0, 1), 3),
    ],
)
def test_where_more_seeds_would_not_decide_none_are_asked_for(quality, step, needed):
    assert verdict._Evidence(0.2, "epochs", quality, step, None, hopeless=False).seeds_needed() == needed


# ---------------------------------------------------------------- against other formulas


def test_the_p_values_are_those_of_two_one_sided_t_tests():
    gains = [0.05, -0.12, 0.02, 0.11]
    found = judge(*made(gains=gains), "accuracy", 0.2)
    error = stdev(gains) / 2
    for p, statistic in ((found.p_worse, (mean(gains) + 0.2) / error), (found.p_better, (0.2 - mean(gains)) / error)):
        # Student's density, integrated: Gamma(2) / (sqrt(3 pi) Gamma(3/2)) (1 + x^2 / 3)^-2
        scale = 1 / (math.sqrt(3 * math.pi) * math.gamma(1.5))
        tail, _ = integrate.quad(lambda x, scale=scale: scale * (1 + x * x / 3) ** -2, statistic, math.inf)
        assert p == pytest.approx(tail, rel=1e-6)
    assert found.p_worse == pytest.approx(stats.ttest_1samp(gains, -0.2, alternative="greater").pvalue)
    assert found.p_better == pytest.approx(stats.ttest_1samp(gains, 0.2, alternative="less").pvalue)
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (found.dev.low, found.dev.high) == pytest.approx(tuple(interval))
    assert found.test == found.dev


def test_times_are_geometric_means_of_paired_ratios():
    ratios = [1.4, 1.6, 1.9]
    found = judge(*made(gains=[0.0, 0.01, -0.01], ratios=ratios), "accuracy")
    logs = np.log(ratios)
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    for ratio in (found.step, found.total, found.to_target):
        assert ratio.value == pytest.approx(stats.gmean(ratios))
        assert (ratio.low, ratio.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))


def test_the_power_is_that_of_the_noncentral_t():
    found = Sample(0.05, 0.2, 3).power_above(-0.2, 0.05, np.array([4, 9]))
    for n, power in zip((4, 9), found, strict=True):
        expected = stats.nct.sf(stats.t.isf(0.05, n - 1), n - 1, (0.05 + 0.2) * math.sqrt(n) / 0.2)
        assert power == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- the rules of decision


SCATTER = np.array([0.01, -0.02, 0.01])  # of mean 0
DECISIONS = [
    ("epochs", 0.0, 1.5, "USE"),
    ("epochs", 0.0, 1.0, "TIE"),
    ("epochs", 0.0, 1.05, "TIE"),  # of three seeds a ratio so near to 1 shows nothing
    ("epochs", 0.0, 0.7, "DON'T"),
    ("epochs", -0.1, 1.5, "USE"),
    ("epochs", -0.5, 1.5, "DON'T"),
    ("epochs", -0.19, 1.5, "UNDECIDED"),
    ("epochs", 0.5, 1.5, "USE"),
    ("epochs", 0.5, 1.0, "UNDECIDED"),
    ("epochs", 0.5, 0.7, "DON'T"),
    ("seconds", 0.0, 1.5, "USE"),
    ("seconds", 0.0, 1.0, "TIE"),
    ("seconds", 0.0, 0.7, "DON'T"),
    ("seconds", -0.5, 1.5, "DON'T"),
    ("seconds", 0.5, 1.0, "USE"),
    ("seconds", 0.5, 0.7, "USE"),
    ("seconds", 0.19, 1.0, "UNDECIDED"),
]


@pytest.mark.parametrize(("budget", "gain", "ratio", "word"), DECISIONS)
def test_the_table_of_decisions(budget, gain, ratio, word):
    found = judge(*made(gains=gain + SCATTER, ratios=ratio * np.exp(SCATTER)), "accuracy", 0.2, budget)
    assert found.word == word
    assert (found.seeds_needed is None) or word == "UNDECIDED"


@pytest.mark.parametrize(
    ("gain", "word"), [(0.0, "UNDECIDED"), (5.0, "UNDECIDED"), (-1.9, "UNDECIDED"), (-11.0, "DON'T")]
)
def test_one_seed_is_undecided_unless_it_lost_ten_margins(gain, word):
    found = judge(*made(gains=[gain], ratios=[2.0]), "accuracy", 0.2)
    assert found.word == word
    assert (found.p_worse, found.p_better, found.dev.low, found.step.high) == (1, 1, None, None)
    assert found.seeds_needed == (3 if word == "UNDECIDED" else None)


@pytest.mark.parametrize("gains", [[-11.0], [-11.0, -11.2, -10.9], [-4.0, -30.0]])
def test_a_great_loss_is_said_first_however_fast_it_is(gains):
    found = judge(*made(gains=gains, ratios=[3.0] * len(gains)), "accuracy")
    assert found.word == "DON'T"
    assert found.why.startswith(f"loses {-mean(gains):.2f} points of accuracy")


def test_two_seeds_are_never_used():
    found = judge(*made(gains=[0.0, 0.001], ratios=[2.0, 2.0]), "accuracy")
    assert (found.word, found.seeds_needed) == ("UNDECIDED", 3)
    assert "two seeds are too few" in found.why


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("budget", ["epochs", "seconds"])
def test_the_same_bits_on_both_sides_are_a_tie(seeds, budget):
    dense, _ = simulated(np.random.default_rng(SEED), seeds)
    found = judge(dense, [replace(run, rule="topk") for run in dense], "accuracy", 0.2, budget)
    assert (found.word, found.dev.value, found.dev.low, found.p_worse, found.p_better) == ("TIE", 0, 0, 0, 0)
    assert found.step.value == 1
    assert found.step.low < 1 < found.step.high  # timings are not taken to be free of noise


def test_dense_can_be_judged_beside_dense():
    dense, sparse = made(gains=[0.0, 0.01, -0.01], ratios=[1.5, 1.6, 1.7])
    as_dense = judge(dense, [replace(run, rule="dense") for run in sparse], "accuracy")
    assert replace(as_dense, rule="sampled") == judge(dense, sparse, "accuracy")


def test_the_last_epoch_counts_and_the_first_that_reaches_the_target():
    dense, sparse = made(gains=[0.0, 0.0], ratios=[2.0, 2.0])
    peaks = [  # the best epoch is the first of two, and the last is lower
        replace(
            run,
            epochs=2,
            curve=[
                {**run.curve[0], "dev": {"accuracy": 99.9}},
                {**run.curve[0], "epoch": 2, "seconds": 2 * run.curve[0]["seconds"]},
            ],
        )
        for run in sparse
    ]
    found = judge([replace(run, epochs=2) for run in dense], peaks, "accuracy")
    assert found.dev.value == 0
    assert found.target == pytest.approx(98.0 - 0.2)
    assert (found.dense_seconds_to_target, found.seconds_to_target) == ([60.0, 60.0], [30.0, 30.0])


def test_a_target_that_was_not_reached_gives_no_ratio():
    dense, sparse = made(gains=[0.0, -0.02, 0.01, 0.0], ratios=[1.5] * 4)
    low = [
        replace(run, dev={"accuracy": 97.4}, curve=[{**run.curve[0], "dev": {"accuracy": 97.4}}])
        for run in (dense[0], sparse[0])
    ]
    found = judge([low[0], *dense[1:]], [low[1], *sparse[1:]], "accuracy")
    assert found.seconds_to_target[0] is None
    assert found.to_target is None
    assert found.word == "USE"  # in the whole time all came as far
    assert "not every run reached" in found.why
    assert judge([low[0], *dense[1:]], [low[1], *sparse[1:]], "accuracy", 0.2, "seconds").word == "TIE"


def test_a_cheaper_step_is_no_tie_while_the_time_to_the_target_is_open():
    dense, sparse = made(gains=[0.0, 0.01, -0.01], ratios=[1.5] * 3)
    late = [replace(run, curve=[{**run.curve[0], "seconds": s}]) for run, s in zip(sparse, (20, 60, 110), strict=True)]
    found = judge(dense, late, "accuracy")
    assert found.word == "UNDECIDED"
    assert "not shown" in found.why


@pytest.mark.parametrize("gain", [0.0, -11.0])
def test_that_nothing_was_sparse_is_said_and_a_loss_before_it(gain):
    dense, sparse = made(gains=[gain] * 3)
    found = judge(dense, [replace(run, density=1.0) for run in sparse], "accuracy")
    assert found.why.endswith("; no layer was sparse")
    assert found.why.startswith("loses 11.00" if gain else "as good as dense")


def test_all_rules_of_a_comparison_are_judged_and_the_verdict_is_plain_data():
    dense, sparse = made(gains=[0.0, 0.01, 0.02])
    found = judge_all([*dense, *sparse, *(replace(run, rule="topk") for run in sparse)], "accuracy")
    assert [each.rule for each in found] == ["sampled", "topk"]
    content = json.loads(json.dumps(asdict(found[0]), allow_nan=False))
    assert content["dev"]["value"] == pytest.approx(0.01)
    assert judge_all(dense, "accuracy") == []


BAD = [
    (lambda d, s: (d[1:], s, 0.2, "epochs"), r"dense runs of the seeds \[1, 2\] and others of \[0, 1, 2\]"),
    (lambda d, s: (d, [*s, s[0]], 0.2, "epochs"), r"paired by seed.*\[0, 0, 1, 2\]"),
    (lambda d, s: ([*d, d[0]], [*s, s[0]], 0.2, "epochs"), "one run of each"),
    (lambda d, s: ([], s, 0.2, "epochs"), "paired by seed"),
    (lambda d, s: (d, [replace(s[0], epochs=2), *s[1:]], 0.2, "epochs"), r"same epochs, got \[1, 2\]"),
    (lambda d, s: (d, s, 0.0, "epochs"), "margin must be a positive number of points, got 0.0"),
    (lambda d, s: (d, s, math.nan, "epochs"), "margin must be"),
    (lambda d, s: (d, s, 0.2, "steps"), "budget must be 'epochs' or 'seconds', got 'steps'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_cannot_be_judged_is_refused(arguments, message):
    dense, sparse, margin, budget = arguments(*made(gains=[0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=message):
        judge(dense, sparse, "accuracy", margin, budget)
