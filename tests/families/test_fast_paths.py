"""What is fast changes no result: each family beside itself done plainly, for the same noise.

Plainly is: attention by transformers' eager form under dense masks; logits of the whole vocabulary, their log_softmax,
and the targets' part of it; every sample and every step of an inference through the whole decoder.
"""

import jaxtyping
import pytest
import torch
from functorch.compile import make_boxed_func
from tests.toy import VARIANTS, padded, prior_latents, small_variant, texts
from torch._dynamo.backends.common import aot_autograd

from latentlm import InputError, LatentLM
from latentlm.evaluation.likelihood import score
from latentlm.families import LTM
from latentlm.inference import infer_by_gradient
from latentlm.inference.gradient import every_kth

LENGTHS = [19, 12, 2, 7]  # four blocks of 4 tokens and more: attention by blocks is at work in the first


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


def plainly(variant: str, **changes) -> LatentLM:
    model = small_variant(variant, attn_implementation="eager", **changes)
    kind = type(model)
    plain = {"log_likelihood": LatentLM.log_likelihood, "likelihood_of": LatentLM.likelihood_of}
    model.__class__ = type(kind.__name__, (kind,), plain)
    return model


def trained(model: LatentLM, input_ids, mask, **options):
    """Loss, and the gradient of each weight, of a step of training."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model.train()(input_ids, mask, seed=3, **options)
    output.loss.backward()
    return output.loss.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance as a part of the larger of both sizes; 0 for two zeros."""
    size = torch.maximum(found.norm(), expected.norm())
    return float((found - expected).norm() / size) if size else 0.0


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_step_of_training_is_the_plain_one(variant, side, monkeypatch):
    input_ids, mask = texts(4, 19), None
    if side == "none":
        products = ("latentlm.layers.transformer._FEW_KEYS", "latentlm.layers.transformer._MANY_QUERIES")
        for name, value in zip(products, (range(1, 16), 1), strict=True):
            monkeypatch.setattr(name, value)
    else:
        input_ids, mask = padded(input_ids, LENGTHS, side)
    # a tiny ε divides rounding by almost nothing where a gradient is almost nothing
    changes = {"inference_epsilon": 0.3} if VARIANTS[variant][0] not in ("autoregressive", "huggingface") else {}
    fast, plain = small_variant(variant, **changes), plainly(variant, **changes)
    loss, gradients = trained(fast, input_ids, mask)
    plain_loss, plain_gradients = trained(plain, input_ids, mask)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    largest = max(float(one.norm()) for one in plain_gradients.values())
    for name, gradient in gradients.items():
        if plain_gradients[name].norm() > 1e-4 * largest:
            assert relative(gradient, plain_gradients[name]) < 1e-4, name


def test_figures_are_the_plain_ones(variant):
    input_ids, mask = padded(texts(4, 19), LENGTHS, "right")
    changes = {"inference_epsilon": 0.3} if VARIANTS[variant][0] not in ("autoregressive", "huggingface") else {}
    found, expected = (
        score(model, input_ids, mask, seed=1, samples=2)
        for model in (small_variant(variant, **changes), plainly(variant, **changes))
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_in_half_precision_a_step_of_training_is_the_plain_one(variant):
    """bf16 has 8 bits: the loss agrees to 1%, as it does between one order of sums and another."""
    input_ids = texts(4, 19)
    losses = [
        float(trained(model.to(torch.bfloat16), input_ids, None)[0])
        for model in (small_variant(variant), plainly(variant))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# ---- some of the tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "length"), [("none", 1), ("none", 2), ("left", 9), ("right", 9)])
def test_likelihood_at_some_tokens_is_that_part_of_all(variant, side, length):
    model = small_variant(variant)
    input_ids, mask = texts(4, length), None
    if side != "none":
        input_ids, mask = padded(input_ids, [min(one, length) for one in (9, 6, 2, 4)], side)
    number = (length - 1 + 2) // 3
    at = torch.randint(length - 1, (4, number)) if length > 1 else torch.zeros(4, 0, dtype=torch.int64)
    likelihood = model.likelihood_of(input_ids, mask)
    for samples in ((), (2,)):
        latents = prior_latents(model, input_ids, *samples).requires_grad_()
        found = likelihood(latents, at)
        expected = likelihood(latents).gather(-1, at.expand(*samples, 4, number))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        if latents.numel() and number:
            gradients = [torch.autograd.grad(one.sum(), latents)[0] for one in (found, expected)]
            torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_an_ltm_projects_and_feeds_forward_only_what_is_asked_for():
    model, rows = small_variant("learned start"), []
    assert isinstance(model, LTM)
    model.layers[-1].feed_forward.register_forward_hook(lambda _, given, out: rows.append(given[0].shape[1]))
    model.layers[0].feed_forward.register_forward_hook(lambda _, given, out: rows.append(given[0].shape[1]))
    likelihood = model.likelihood_of(texts(2, 9))
    likelihood(prior_latents(model, texts(2, 9)), torch.tensor([[1, 5], [0, 7]]))
    assert rows == [8, 2]


@pytest.mark.parametrize("k", [1, 2, 3, 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kth_token_counts_once_in_k_cases(k, side):
    """Over texts, or seeds: each token is chosen as often as the others, and those of one draw are k apart."""
    input_ids, mask = padded(texts(3, 10), [10, 6, 2], side)
    scored = LatentLM.scored_tokens(input_ids, mask)
    draws, seeds, counts = 2000, 4, torch.zeros(3, 9)
    keys = torch.arange(3 * draws // seeds)
    for seed in range(seeds):
        at, chosen = every_kth(scored.repeat(draws // seeds, 1), k, keys, seed=seed, step=1)
        assert at.shape == (3 * draws // seeds, -(-9 // k))
        counts += torch.zeros(len(at), 9).scatter_add_(1, at, chosen.float()).view(-1, 3, 9).sum(0)
        for row, places in enumerate(at[:90]):
            order = scored[row % 3].cumsum(0)[places[chosen[row]]]
            assert (order.diff() == k).all() and (not len(order) or order[0] <= k)
    share = counts / draws
    if k > 1:  # by the seed, and by the step
        draw = [every_kth(scored.repeat(99, 1), k, keys[:297], seed=s, step=t)[0] for s, t in ((0, 0), (1, 0), (0, 1))]
        assert not torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert not share[~scored].any()
    # four deviations of a binomial share; exact where all are chosen
    assert ((share[scored] - 1 / k).abs() <= 4 * ((1 - 1 / k) / k / draws) ** 0.5).all()


def test_the_subsampled_objective_is_unbiased():
    """Its mean over the k places a draw may begin at is the objective, exactly."""
    model, input_ids, k = small_variant("learned start"), texts(3, 10), 4
    shape = (3, *model.latent_shape)
    whole, parts = [], []

    def objective(steps):
        return lambda step, bound, gradients: steps.append((bound, *gradients))

    given = {"start_mean": torch.zeros(shape), "start_log_variance": torch.zeros(shape) - 30.0, "steps": 1}
    infer_by_gradient(model, input_ids, learning_rate=lambda step: 0.1, on_step=objective(whole), **given)
    scored = LatentLM.scored_tokens(input_ids)
    for first in range(k):
        chosen = (torch.arange(9) % k == first).expand(3, -1)

        def chosen_ones(*_args, chosen=chosen, **_options):
            at = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :3]
            return at, chosen.gather(1, at)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("latentlm.inference.gradient.every_kth", chosen_ones)
            infer_by_gradient(
                model, input_ids, learning_rate=lambda step: 0.1, subsampling=k, on_step=objective(parts), **given
            )
    assert scored.all()
    for place in range(3):
        mean = torch.stack([part[place] for part in parts]).mean(0)
        # σ is e^-15, so that the noise, which differs by no token, tells nothing
        torch.testing.assert_close(mean, whole[0][place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_what_tokens_cannot_be_subsampled_by(wrong):
    model, zeros = small_variant("learned start"), torch.zeros(2, 2, 3, 8)
    given = {"start_mean": zeros, "start_log_variance": zeros, "steps": 1, "learning_rate": lambda step: 0.1}
    with pytest.raises(InputError, match="subsampling must be a whole number from 1 on"):
        infer_by_gradient(model, texts(2, 9), subsampling=wrong, **given)


@pytest.mark.parametrize("side", ["left", "right"])
def test_subsampling_is_the_same_in_any_batch_and_padding(side):
    changes = {"inference_subsampling": 3, "inference_epsilon": 0.3}
    model = small_variant("learned start", **changes)
    together = model.infer(*padded(texts(4, 19), LENGTHS, side))
    for row, length in enumerate(LENGTHS):
        alone = model.infer(texts(4, 19)[row : row + 1, :length])
        torch.testing.assert_close(together.mean[row], alone.mean[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.variance[row], alone.variance[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["gradient gp_vae", "gradient gpt_vae", "gradient lang_vae", "cooperative"])
def test_subsampling_serves_every_family_that_takes_steps(variant):
    whole, some = small_variant(variant), small_variant(variant, inference_subsampling=2)
    for model in (whole, some):
        model.train()
    losses = [float(model(texts(2, 9), seed=1).loss) for model in (whole, some)]
    assert torch.isfinite(torch.tensor(losses)).all() and losses[0] != losses[1]


# ---- activations computed anew ---------------------------------------------------------------------------------------


def kept_bytes(model: LatentLM, input_ids) -> int:
    """What autograd keeps for the backward of a loss, and the most that it keeps in any fast step before it."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.log_likelihood(prior_latents(model, input_ids).requires_grad_(), input_ids).sum()
    return sum(kept.values())


def test_layers_computed_anew_change_nothing(variant):
    changes = {"dropout": 0.3} if VARIANTS[variant][0] in ("ltm", "autoregressive", "gpt_vae", "gp_vae") else {}
    input_ids, mask = padded(texts(4, 19), LENGTHS, "right")
    plain, anew = (small_variant(variant, **changes) for _ in range(2))
    anew.activation_checkpointing_enable()
    assert anew.is_activation_checkpointing
    loss, gradients = trained(anew, input_ids, mask)
    expected, expected_gradients = trained(plain, input_ids, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_computed_anew_are_not_kept(variant):
    if VARIANTS[variant][0] == "gp_vae":
        pytest.skip("its decoder of latents is three layers that are kept; the encoder's are computed anew")
    model = small_variant(variant)
    kept = kept_bytes(model, texts(2, 30))
    model.activation_checkpointing_enable()
    assert kept_bytes(model, texts(2, 30)) < 0.7 * kept


def test_fast_steps_compute_layers_anew():
    """Also in evaluation mode: a model that is held drops nothing out, and still must not keep everything."""
    model, passes = small_variant("learned start"), []
    model.activation_checkpointing_enable()
    model.layers[1].feed_forward.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for mode in (True, False):
        passes.clear()
        model.train(mode).infer(texts(2, 9))
        assert len(passes) == 2 * model.config.inference_steps


# ---- a device that computes by itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["learned start", "diagonal prior", "cooperative", "gradient gpt_vae", "amortised"])
def test_fast_steps_ask_the_device_nothing(variant, monkeypatch):
    """A question to the data waits for a GPU in every step of T. A tensor without data refuses to answer any."""
    monkeypatch.setattr("latentlm.inference.gradient.check_finite", lambda *moments: None)  # once, after all
    autocast = torch.is_autocast_enabled  # which knows no device without data
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind))
    model = small_variant(variant, inference_subsampling=2).train()
    progress = model.training_progress
    model = model.to("meta")
    model.training_progress = progress  # read once for all steps
    output = model(torch.zeros(4, 20, dtype=torch.int64, device="meta"), seed=1)
    output.loss.backward()
    assert output.nll.shape == (4,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("variant", "recomputed"),
    [("learned start", False), ("learned start", True), ("cooperative", False), ("gradient gpt_vae", False)],
)
def test_a_compiled_fast_step_is_one_graph_of_gradients_of_latents_alone(variant, recomputed):
    """It keeps nothing for a backward, and computes no weight's gradient, as it would if weights asked for one."""
    graphs = []

    def noted(kind):
        def compiler(graph, _inputs):
            (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
            shapes = [tuple(one.meta["val"].shape) for one in outputs if isinstance(one, torch.fx.Node)]
            graphs.append((kind, shapes))
            return make_boxed_func(graph.forward)

        return compiler

    def step(model, seed):
        model.zero_grad()
        loss = model(input_ids, seed=seed).loss
        loss.backward()
        return loss, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    jaxtyping.config.update("jaxtyping_disable", True)  # checks of shapes cannot be compiled
    try:
        model, input_ids = small_variant(variant).train(), texts(4, 19)
        if recomputed:
            model.gradient_checkpointing_enable()
        plain = step(model, 1)
        kinds = ("fw_compiler", "bw_compiler", "inference_compiler")
        compiled = torch.compile(model, backend=aot_autograd(**{kind: noted(kind) for kind in kinds}))
        torch.testing.assert_close(step(compiled, 1), plain)
        step(compiled, 2)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        torch.compiler.reset()
    latents = (2, 4, *model.latent_shape)
    if recomputed:  # which one graph cannot have
        assert ("bw_compiler", [latents]) in graphs
    else:
        whole = [kind for kind, shapes in graphs if shapes == [(4,), latents]]
        assert whole == ["inference_compiler"]  # for all steps and both batches
        assert "bw_compiler" not in [kind for kind, shapes in graphs if latents in shapes]
