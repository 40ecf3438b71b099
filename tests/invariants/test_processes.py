"""A model sharded over two processes by torch's `fully_shard` (FSDP2) is the model in one.

Everything is compared to fp32 rounding. Two processes add the sum over rows in another order than one does, which moves
last digits (2⁻²³ ≈ 1.2e-7), and blocks, fast steps and both Adams pass these on: most gradients agree to 1e-6, the
longest chain (a Transformer prior) to 4e-6 of the largest gradient, whatever is sharded how. Hence 1e-5, of a number or
of the largest gradient; weights that are gathered wrongly are off by 4e-3 and more. The Adams' ε are far above
rounding: otherwise an entry whose gradient is rounding alone would move by a whole step.
"""

import pytest
import torch
from tests.invariants.sharded import LAYOUTS, half_precision, in_two_processes, scores, two_steps
from tests.toy import VARIANTS, small_variant, texts

ROUNDING = 1e-5
QUICK = [(variant, "blocks") for variant in ("autoregressive", "cooperative", "langevin", "gpt_vae")]
QUICK += [("ltm", layout) for layout in LAYOUTS] + [
    (variant, "as accelerate 1.15 does") for variant in ("cooperative", "gp_vae")
]
# batch norm of μ depends on how texts are shared out
SLOW = [(variant, layout) for variant in VARIANTS for layout in LAYOUTS if variant != "batch norm"]
SLOW = [case for case in SLOW if case not in QUICK]
SCORED = [("diagonal prior", "blocks, the root's weights freed, too"), ("cooperative", "as accelerate 1.15 does")]


def runner(calls, folder):
    """Looks a call's results up, in the order of processes."""
    names = [(work.__name__, *given) for work, given in calls]
    results = dict(zip(names, in_two_processes(calls, folder), strict=True))

    def of(work, *given):
        for result in results[(work.__name__, *given)]:
            assert not isinstance(result, str), result
        return results[(work.__name__, *given)]

    return of


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    steps = [(two_steps, (*case, False)) for case in QUICK] + [(two_steps, ("ltm", "blocks", True))]
    others = [*((scores, case) for case in SCORED), (half_precision, ("ltm",))]
    return runner([*steps, *others], tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return runner([(two_steps, (*case, True)) for case in SLOW], tmp_path_factory.mktemp("slow"))


def assert_two_steps_are_those_of_one_process(processes, variant):
    one = two_steps(variant)
    torch.testing.assert_close(
        torch.tensor([process["losses"] for process in processes]).sum(0),
        torch.tensor(one["losses"]),
        rtol=ROUNDING,
        atol=0,
    )
    for process in processes:
        assert process["norms"] == pytest.approx(one["norms"], rel=ROUNDING)
        assert process["moved"] == one["moved"]  # no weight that silently does not train
        for here, there in zip(process["gradients"], one["gradients"], strict=True):
            assert here.keys() == there.keys()
            largest = max(float(gradient.abs().max()) for gradient in there.values())
            for name, gradient in there.items():
                torch.testing.assert_close(here[name], gradient, rtol=ROUNDING, atol=ROUNDING * largest)
        assert process["weights"].keys() == one["weights"].keys()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(process["weights"][name], weight, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("variant", "layout"), QUICK)
def test_two_steps_are_those_of_one_process(quick, variant, layout):
    assert_two_steps_are_those_of_one_process(quick(two_steps, variant, layout, False), variant)


def test_accumulated_steps_are_those_of_one_process(quick):
    assert_two_steps_are_those_of_one_process(quick(two_steps, "ltm", "blocks", True), "ltm")


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout"), SLOW)
def test_every_variant_accumulates_in_every_layout_as_in_one_process(slow, variant, layout):
    assert_two_steps_are_those_of_one_process(slow(two_steps, variant, layout, True), variant)


@pytest.mark.parametrize("variant", ["ltm", "cooperative", "learned start", "transformer prior"])
def test_every_weight_that_has_a_gradient_moves(variant):
    # what the comparison above rests on
    model = small_variant(variant)
    assert two_steps(variant)["moved"] == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("variant", "layout"), SCORED)
def test_a_sharded_model_is_scored_outside_of_forward_and_trains_afterwards(quick, variant, layout):
    one = scores(variant)
    for process in quick(scores, variant, layout):
        for name, value in one["figures"].items():
            if not isinstance(value, str) and not name.endswith(("seconds", "per_second")):
                assert process["figures"][name] == pytest.approx(value, rel=1e-5), name
        assert process["norm"] == pytest.approx(one["norm"], rel=1e-5)


def test_weights_gathered_in_half_precision_find_nearly_the_same_posterior(quick):
    model = small_variant("ltm").train()
    with torch.no_grad():
        expected = model(texts(4, 9), seed=0)
    for mean, loss in quick(half_precision, "ltm"):
        assert float((mean - expected.posterior_mean).abs().mean()) < 0.1 * float(expected.posterior_mean.abs().mean())
        assert float(loss) == pytest.approx(float(expected.loss), rel=0.05)
