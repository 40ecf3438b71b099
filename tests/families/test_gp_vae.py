"""GP-VAE against integrals over its latents, slow obvious losses, and what its encoder and kernel promise."""

import math

import pytest
import torch
from tests.toy import EOS, VOCABULARY, moved, padded, small_model, small_variant, texts
from transformers import AutoModel

from latentlm import GPVAEConfig
from latentlm.distributions import Stream, noise_shape, sample_from_noise, sequence_keys, sequence_noise
from latentlm.families.gp_vae import LogVariance
from latentlm.objective import elbo, importance_weighted_bound

LENGTHS = [8, 5, 2, 6]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WHITENED = {"posterior": "whitened", "inference_steps": 2}
RAGGED = {"length_model": "categorical", "eos_token_id": EOS}


def model_of(**changes):
    return moved(small_model("gp_vae", **changes))


# ---- the bound -------------------------------------------------------------------------------------------------------

TINY = {"vocab_size": 4, "latent_size": 1, "kernel_groups": 1, "kernel_lengthscale": 1.0, "max_position_embeddings": 2}


def on_grid(model, row):
    """ELBO and log p(x) of one text of one or two tokens, by sums over a grid of z."""
    times = len(row) - 1
    line, step = torch.linspace(-7, 7, 141, dtype=torch.float64), 0.1
    points = torch.cartesian_prod(*[line] * times).view(-1, 1, times, 1)
    far = math.exp(-0.5)  # an RBF of lengthscale 1, one time apart; the nugget is 0.1
    covariance = torch.tensor([[1.1, far], [far, 1.1]], dtype=torch.float64)[:times, :times]
    prior = torch.distributions.MultivariateNormal(torch.zeros(times, dtype=torch.float64), covariance)
    joint = model.log_likelihood(points, row[None]).sum(-1)[:, 0] + prior.log_prob(points[:, 0, :, 0])
    said = model.infer(row[None]).log_prob(points)[:, 0]
    cell = step**times
    assert float(said.exp().sum() * cell) == pytest.approx(1, abs=1e-4)
    bound = (said.exp() * (joint - said)).sum() * cell
    return float(bound), float(joint.logsumexp(0) + math.log(cell))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("posterior", ["sites", "diagonal", "whitened"])
def test_bounds_are_below_log_p_and_come_near_it(posterior, side):
    model = small_model("gp_vae", posterior=posterior, inference_start_log_variance=1.0, **TINY).double()
    for layer in (model.encoder.mean, model.encoder.log_variance):
        layer.weight.mul_(0.2)  # near enough to p(z | x) for importance weights of a small variance
    ids = torch.tensor([[0, 1, 3], [0, 3, 3], [0, 2, 0], [0, 1, 1], [0, 3, 2]])
    lengths = [3, 3, 2, 3, 2]
    rows, mask = padded(ids, lengths, side)
    exact = torch.tensor([on_grid(model, ids[row, :length]) for row, length in enumerate(lengths)])
    q, prior = model.infer(rows, mask), model.prior(5, torch.tensor(lengths) - 1)
    generator = torch.Generator().manual_seed(0)
    z = sample_from_noise(q, torch.randn(10000, 5, *noise_shape(q), generator=generator))
    likelihoods = model.log_likelihood(z, rows, mask).sum(-1)
    bound = elbo(likelihoods, torch.distributions.kl_divergence(q, prior))
    weighted = importance_weighted_bound(likelihoods, prior.log_prob(z), q.log_prob(z))
    weights = (likelihoods + prior.log_prob(z) - q.log_prob(z)).exp()
    errors = likelihoods.std(0) / math.sqrt(len(z)), weights.std(0) / weights.mean(0) / math.sqrt(len(z))
    assert all((error < 0.04).all() for error in errors)
    assert ((bound - exact[:, 0]).abs() < 4 * errors[0]).all()
    assert ((weighted - exact[:, 1]).abs() < 4 * errors[1]).all()
    assert (exact[:, 1] - exact[:, 0] > 0.01).all()
    assert (bound < exact[:, 1]).all()


@torch.no_grad()
def test_what_all_texts_of_a_length_have_sums_to_one():
    model = small_model("gp_vae", **TINY).double()
    every = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(4), torch.arange(4))
    assert sum(math.exp(on_grid(model, row)[1]) for row in every) == pytest.approx(1, abs=1e-6)


# ---- the encoder -----------------------------------------------------------------------------------------------------


def what_a_change_moves(model, time=8):
    """Whether token t (rows) moves what the encoder says of time u (columns)."""
    input_ids = texts(1, time + 1)
    before = torch.cat(model.encode(input_ids), -1)[0]
    moves = torch.zeros(time, time, dtype=torch.bool)
    for t in range(time):
        changed = input_ids.clone()
        changed[0, t + 1] = (input_ids[0, t + 1] + 5) % VOCABULARY
        moves[t] = (torch.cat(model.encode(changed), -1)[0] - before).abs().amax(-1) > 1e-6
    return moves


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["separable", "full", "causal_transformer", "transformer"])
def test_which_encoders_are_causal(encoder):
    moves = what_a_change_moves(model_of(encoder_type=encoder, sliding_window=None))
    assert moves.diagonal().all()
    assert bool(moves.tril(-1).any()) == (encoder == "transformer")
    assert moves[0, -1] or encoder == "full"  # whose two blocks see seven times
    if encoder == "transformer":
        assert moves.all()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("encoder", ["separable", "full", "causal_transformer", "transformer"])
def test_padding_changes_nothing_that_an_encoder_says(encoder, side):
    model, input_ids = model_of(encoder_type=encoder), texts(4, 8)
    found = model.encode(*padded(input_ids, LENGTHS, side, total=11))
    for row, length in enumerate(LENGTHS):
        for together, alone in zip(found, model.encode(input_ids[row : row + 1, :length]), strict=True):
            torch.testing.assert_close(together[row, : length - 1], alone[0], **CLOSE)


def read_by_encoder(model, *batch, **options):
    """Which tokens x_1 … reach the encoder as themselves."""
    read = []
    handle = model.encoder.register_forward_pre_hook(
        lambda module, given: read.append((given[0] != module.unseen).any(-1))
    )
    model(*batch, **options)
    handle.remove()
    return read[0]


def test_a_text_that_begins_with_hidden_words_has_a_gradient_of_ordinary_size():
    """Zeros in their place made each of the convolutions' norms a factor of 300."""
    model = model_of(encoder_type="full", encoder_dilations=[1, 2, 4, 8] * 3, word_dropout=0.9).train()
    model(texts(8, 12), seed=0).loss.backward()
    assert max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None) < 100


@pytest.mark.parametrize("changes", [{}, {**WHITENED, "inference": "cooperative"}], ids=["amortised", "cooperative"])
def test_word_dropout_hides_tokens_from_the_encoder_while_training(changes):
    model = model_of(word_dropout=0.4, **changes)
    input_ids = texts(40, 21)
    assert read_by_encoder(model, input_ids, seed=0).all()
    seen = read_by_encoder(model.train(), input_ids, seed=0)
    assert abs(float(seen.float().mean()) - 0.6) < 0.05
    assert not torch.equal(seen, read_by_encoder(model, input_ids, seed=1))
    assert torch.equal(seen, read_by_encoder(model, input_ids, seed=0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_which_tokens_are_hidden_belongs_to_the_text(side):
    model, input_ids = model_of(word_dropout=0.4).train(), texts(4, 8)
    rows, mask = padded(input_ids, LENGTHS, side, total=11)
    together, output = read_by_encoder(model, rows, mask, seed=3), model(rows, mask, seed=3)
    assert not together.all()
    for row, length in enumerate(LENGTHS):
        alone = input_ids[row : row + 1, :length]
        assert torch.equal(read_by_encoder(model, alone, seed=3)[0], together[row, : length - 1])
        torch.testing.assert_close(model(alone, seed=3).nll[0], output.nll[row], **CLOSE)


# ---- what training charges beside the ELBO ---------------------------------------------------------------------------

EXTRAS = [
    {"label_smoothing": 0.3},
    {"horizons": 3, "horizon_weight": 0.7},
    {"embedding_regulariser": 0.4},
    {"label_smoothing": 0.1, "horizons": 2, "embedding_regulariser": 0.2},
]


def slow_charge(model, latents, row):
    """Of one text without padding, token by token."""
    config, tokens = model.config, row[1:].tolist()
    ragged = config.length_model != "none"
    kept = [v for v in range(VOCABULARY) if not (ragged and v == EOS)]
    embedding = model.embed_tokens.weight
    words = torch.stack([embedding[v] / embedding[v].norm() for v in kept])
    states = model.states(latents[None], torch.tensor([len(tokens)]))[0]
    total = states.new_zeros(())
    for t, (state, token) in enumerate(zip(states, tokens, strict=True)):
        logs = (words @ state).log_softmax(0)
        if token in kept:
            nll = -logs[kept.index(token)]
            total = total + (1 - config.label_smoothing) * nll + config.label_smoothing * (-logs).mean() - nll
        for k, horizon in enumerate(model.horizons, start=1):
            if t + k < len(tokens) and tokens[t + k] in kept:
                foretold = (words @ (horizon.weight @ state)).log_softmax(0)
                total = total - config.horizon_weight / k * foretold[kept.index(tokens[t + k])]
        e = embedding[token] / embedding[token].norm() * math.sqrt(len(state))  # of unit mean square
        cosine = (state @ e) / (state.norm() * e.norm())
        total = total + config.embedding_regulariser * (1 - cosine + ((state - e) ** 2).sum() / len(e))
    return total


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ragged", [{}, RAGGED], ids=["blocks", "ragged"])
@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "+".join(extras))
def test_what_is_charged_beside_the_elbo(extras, ragged, side):
    model = model_of(**extras, **ragged).double().train()
    input_ids, lengths = texts(4, 8), [8, 5, 1, 2]
    if ragged:
        for row, length in enumerate(lengths[:2]):
            input_ids[row, length - 1] = EOS
    rows, mask = padded(input_ids, lengths, side)
    output = model(rows, mask, seed=3)
    torch.testing.assert_close(output.loss, (output.nll + output.kl).sum() / 12)  # the ELBO, and nothing beside it
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    q = model.infer(rows, mask, seed=3)
    noise = sequence_noise(sequence_keys(rows, mask), noise_shape(q), seed=3, stream=Stream.SCORE)
    latents = sample_from_noise(q, noise)
    objective = q.kl().sum() - model.log_likelihood(latents, rows, mask).sum()
    beside = sum(
        slow_charge(model, latents[row, : length - 1], input_ids[row, :length])
        for row, length in enumerate(lengths)
        if length > 1
    )
    assert abs(float(beside.detach())) > 0.1
    ((objective + beside) / 12).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("time", [1, 2])
def test_texts_shorter_than_the_horizons_train(time):
    model = model_of(label_smoothing=0.1, horizons=3, embedding_regulariser=0.1).train()
    output = model(texts(2, time), seed=0)
    output.loss.backward()
    assert torch.isfinite(output.loss)


def test_evaluation_charges_nothing_beside():
    model, plain = model_of(label_smoothing=0.5, embedding_regulariser=1.0), model_of()
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        one(texts(3, 6)).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# ---- log variances, the kernel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(-6.0, 2.0), (-8.0, 12.0)])
@pytest.mark.parametrize("start", [-5.9, -2.0, 0.0, 1.9])
def test_a_log_variance_starts_where_it_is_told_and_stays_in_its_bounds(bounds, start):
    layer = LogVariance(1, 1, bounds, start).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(layer.start)
        line = layer(torch.linspace(-30, 30, 99).double()[:, None])
        far = layer(torch.tensor([[-1e6], [1e6]]).double())
    assert (line.diff(dim=0) >= 0).all()
    assert float(line[49]) == pytest.approx(start, abs=1e-4)
    assert far.flatten().tolist() == pytest.approx(bounds, abs=1e-3)
    ends = torch.tensor([[bounds[0] - 20], [bounds[1] + 20]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(ends).sum(), ends)
    assert (gradient > 0).all()


@pytest.mark.parametrize(
    "posterior, start", [("sites", None), ("diagonal", None), ("whitened", None), ("sites", 3.0), ("diagonal", -1.0)]
)
def test_an_encoder_begins_at_its_variance(posterior, start):
    model = small_model("gp_vae", posterior=posterior, inference_start_log_variance=start, initializer_range=1e-6)
    expected = {"sites": -2.0, "diagonal": -4.0, "whitened": -0.5}[posterior] if start is None else start
    _, log_variance = model.encode(texts(3, 5))
    torch.testing.assert_close(log_variance, torch.full((3, 4, 4), expected), atol=1e-3, rtol=0)


def test_lengthscales_are_spread_by_equal_ratios_over_groups_of_dimensions():
    changes = {"latent_size": 8, "kernel_groups": 4, "kernel_lengthscale": [2, 16], "kernel_variance": 1.5}
    model = small_model("gp_vae", kernel_nugget=0.2, **changes)
    torch.testing.assert_close(model.kernel.log_lengthscale.exp(), torch.tensor([2.0, 4.0, 8.0, 16.0]))
    torch.testing.assert_close(model.kernel.log_variance.exp(), torch.full((4,), 1.5))
    torch.testing.assert_close(model.log_nugget.exp(), torch.full((4,), 0.2))
    noise = torch.eye(3, dtype=torch.float64)[..., None].expand(3, 3, 8)
    factor = model.prior(1, 3).color(noise)  # column u of L for each dimension
    for dimension in range(8):
        scale = 2.0 ** (1 + dimension // 2)
        lag = torch.arange(3).double()[:, None] - torch.arange(3)
        covariance = 1.5 * (-0.5 * (lag / scale) ** 2).exp() + 0.2 * torch.eye(3)
        lower = factor[..., dimension].T
        torch.testing.assert_close(lower @ lower.T, covariance, atol=1e-5, rtol=1e-5)
    one = small_model("gp_vae", kernel_groups=2, kernel_lengthscale=3.0)
    torch.testing.assert_close(one.kernel.log_lengthscale.exp(), torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern32", "matern52", "rational_quadratic"])
def test_a_kernel_is_learned_and_saved(kernel, tmp_path):
    model = model_of(kernel=kernel).train()
    model(texts(3, 7), seed=0).loss.backward()
    learned = {name: p for name, p in model.named_parameters() if name.startswith(("kernel.", "log_nugget"))}
    assert len(learned) == (4 if kernel == "rational_quadratic" else 3)
    for parameter in learned.values():
        assert (parameter.grad != 0).all()
        with torch.no_grad():
            parameter.add_(0.3)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, parameter in learned.items():
        assert torch.equal(loaded.get_parameter(name), parameter)
    torch.testing.assert_close(loaded(texts(3, 7)).kl, model(texts(3, 7)).kl, **CLOSE)


def test_a_white_kernel_is_the_standard_normal_prior():
    model = small_variant("white gp_vae")
    z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(model.prior(3, 5).log_prob(z), expected, **CLOSE)
    assert not any(name.startswith(("kernel.", "log_nugget")) for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"latent_size": 0}, "latent_size must be at least 1"),
        ({"kernel_groups": 0}, "kernel_groups must be at least 1"),
        ({"encoder_kernel_size": 0}, "encoder_kernel_size must be at least 1"),
        ({"kernel_variance": 0.0}, "kernel_variance must be a number above 0"),
        ({"kernel_nugget": -1.0}, "kernel_nugget must be a number above 0"),
        ({"kernel_nugget": math.nan}, "kernel_nugget must be a number above 0"),
        ({"kernel_lengthscale": 0.0}, "kernel_lengthscale must be a number above 0"),
        ({"kernel_lengthscale": [1.0, 2.0, 3.0], "kernel_groups": 2}, "kernel_lengthscale must be a number above 0"),
        ({"kernel_lengthscale": []}, "kernel_lengthscale must be a number above 0"),
        ({"kernel_lengthscale": [1.0, 2.0]}, "two lengthscales need kernel_groups"),
        ({"kernel_groups": 3}, r"latent_size \(64\) must be a multiple of kernel_groups \(3\)"),
        ({"kernel": "white", "kernel_groups": 2}, "leave kernel_groups at 1"),
        ({"kernel": "periodic"}, "kernel"),
        ({"encoder_dilations": []}, "encoder_dilations must be numbers from 1 on"),
        ({"encoder_dilations": [1, 0]}, "encoder_dilations must be numbers from 1 on"),
        ({"inference": "gradient"}, "set posterior to whitened"),
        ({"inference": "cooperative", "posterior": "diagonal"}, "set posterior to whitened"),
        ({"inference": "langevin"}, "set posterior to whitened"),
        (
            {"inference": "gradient", "posterior": "whitened", "inference_start": "learned"},
            "inference_start learned is for latents of one shape",
        ),
        ({"encoder_batch_norm": 0.5}, "encoder_batch_norm is for latents of one shape"),
        ({"hidden_size": 36, "num_attention_heads": 2}, r"hidden_size \(36\) must be a multiple of 8"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"horizons": -1}, "horizons must be a number from 0 on"),
        ({"horizon_weight": -1.0}, "horizon_weight must be a number from 0 on"),
        ({"embedding_regulariser": math.inf}, "embedding_regulariser must be a number from 0 on"),
        ({"length_model": "poisson"}, "length_model"),
        ({"posterior": "full"}, "posterior"),
        ({"decoder_type": "recurrent"}, "decoder_type"),
        ({"encoder_type": "recurrent"}, "encoder_type"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(Exception, match=words):
        GPVAEConfig(**changes)
