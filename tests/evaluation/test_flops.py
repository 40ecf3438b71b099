"""Operations of a training step against the count by hand, and that counting leaves no trace."""

import pytest
import torch
from tests.toy import Rows, small_model, texts, three_verbs

from latentlm import GPVAE, LTM, Autoregressive, AutoregressiveConfig, GPVAEConfig, LTMConfig
from latentlm.evaluation.flops import PARTS, training_cost, training_flops
from latentlm.evaluation.measure import measure

V, H, L, INNER, T, B = 331, 32, 3, 96, 17, 2
SHAPE = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
}
ATTENTION, FEED_FORWARD, SCORES = 4 * H * H, 3 * H * INNER, 2 * T * H  # multiplications of a token, forward


def ids(batch=B, length=T):
    return torch.randint(0, V, (batch, length + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_control_is_the_count_by_hand(batch):
    found = training_flops(Autoregressive(AutoregressiveConfig(**SHAPE)), ids(batch))
    # backward, products take twice their forward's operations, and attention 5 products to its 2
    decoder = L * (6 * (ATTENTION + FEED_FORWARD) + 7 * SCORES)
    assert found["training_flops_per_token_of_decoder"] == decoder
    assert found["training_flops_per_token_of_embeddings"] == 6 * V * H
    assert found["training_flops_per_token"] == decoder + 6 * V * H
    assert found["inference_flops_per_token"] == 0


def test_a_window_is_counted_by_the_blocks_that_are_computed():
    length, block = 96, 16
    found = training_flops(Autoregressive(AutoregressiveConfig(**SHAPE, sliding_window=5)), ids(2, length))
    scores = (2 * H * block**2 + (length // block - 1) * 2 * H * 2 * block**2) / length
    decoder = L * (6 * (ATTENTION + FEED_FORWARD) + 7 * scores)
    assert found["training_flops_per_token_of_decoder"] == pytest.approx(decoder)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_gradient_inference_is_the_count_by_hand(steps):
    latents = {"latents_per_layer": 2, "latent_size": 8, "inference": "gradient", "inference_steps": steps}
    found = training_flops(LTM(LTMConfig(**SHAPE, **latents)), ids())
    # a fast step moves no weight, and nothing below the first layer's latents, which is done once for all steps
    once = 2 * ATTENTION + 2 * SCORES
    backward = 2 * L * FEED_FORWARD + (L - 1) * (2 * ATTENTION + 5 * SCORES)
    fast = (L - 1) * once + 2 * L * FEED_FORWARD + backward
    slow = L * (6 * (ATTENTION + FEED_FORWARD) + 7 * SCORES)
    assert found["training_flops_per_token_of_decoder"] == once + steps * fast + slow
    assert found["training_flops_per_token_of_embeddings"] == (4 * steps + 6) * V * H
    assert found["training_flops_per_token_of_latents"] > 0
    if steps:
        inferred = found["training_flops_per_token"] - slow - 6 * V * H
        assert 0 < found["inference_flops_per_token"] < inferred


@pytest.mark.slow
def test_it_grows_as_the_formula_of_the_paper_says():
    """Kong et al. 2025, section 2.4: (T + 1) L (N H + N_z H + H²) + (T + 1) V H, up to factors of single terms."""

    def flops(**changes):
        latents = {"latents_per_layer": 2, "latent_size": H, "inference": "gradient", "inference_steps": 4}
        found = training_flops(LTM(LTMConfig(**{**SHAPE, **latents, **changes})), ids())
        return found["training_flops_per_token"], found

    whole, parts = flops()
    # N_z hardly matters, T nearly in proportion: a step of inference moves no weight, so it takes two thirds
    assert 1 < flops(latents_per_layer=4)[0] / whole < 1.05
    assert flops(inference_steps=9)[0] / whole == pytest.approx((9 + 1.5) / (4 + 1.5), rel=0.05)
    # the vocabulary's part is in proportion to V and does not know of L
    bigger = flops(vocab_size=10 * V)[1]
    words = "training_flops_per_token_of_embeddings"
    assert bigger[words] == 10 * parts[words]
    assert flops(num_hidden_layers=2 * L)[1][words] == parts[words]
    rest = {layers: flops(num_hidden_layers=layers)[0] - parts[words] for layers in (L, 2 * L, 3 * L)}
    assert rest[3 * L] - rest[2 * L] == pytest.approx(rest[2 * L] - rest[L])


@pytest.mark.parametrize(("name", "options"), [
    ("ltm", {"inference": "gradient", "inference_steps": 2}),
    ("ltm", {"inference": "cooperative", "inference_steps": 2}),
    ("ltm", {"inference": "amortised"}),
    ("autoregressive", {}),
])  # fmt: skip
def test_parts_sum_to_the_whole_and_nothing_is_moved(name, options):
    model = small_model(name, **options)
    model.eval()
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    batch = texts(3, 9)
    found = training_flops(model, batch)
    assert sum(found[f"training_flops_per_token_of_{part}"] for part in PARTS) == pytest.approx(
        found["training_flops_per_token"], rel=1e-12
    )
    assert not model.training
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(other.grad is None for other in model.parameters() if other is not parameter)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert found == training_flops(model, batch)


def test_an_inference_that_was_changed_after_training_changes_the_cost_of_inference_alone():
    model = small_model("ltm", inference="cooperative", inference_steps=2)
    before = training_flops(model, texts(2, 9))
    model.change_inference(inference_steps=6)
    after = training_flops(model, texts(2, 9))
    assert after["inference_flops_per_token"] > 2 * before["inference_flops_per_token"]
    of_training = [key for key in before if key.startswith("training")]
    assert {key: after[key] for key in of_training} == {key: before[key] for key in of_training}
    assert model.config.inference_steps == 6


def test_padding_is_computed_and_not_a_token():
    model = Autoregressive(AutoregressiveConfig(**SHAPE))
    mask = torch.ones(B, T + 1, dtype=torch.long)
    mask[0, 9:] = 0
    whole, padded = training_flops(model, ids()), training_flops(model, ids(), mask)
    scored = T + 8
    decoder = "training_flops_per_token_of_decoder"
    assert padded[decoder] * scored == pytest.approx(whole[decoder] * B * T)
    # the vocabulary is asked for real tokens alone
    words = "training_flops_per_token_of_embeddings"
    assert padded[words] == pytest.approx(whole[words])


def test_a_gaussian_process_costs_latents_and_a_parallel_decoder_scores_all():
    shape = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4}
    found = training_flops(GPVAE(GPVAEConfig(**shape, max_position_embeddings=T)), ids())
    assert found["training_flops_per_token_of_latents"] > 0
    assert found["training_flops_per_token_of_embeddings"] >= 6 * V * H


def test_a_model_of_three_verbs_is_counted_like_any_other():
    rows = Rows(list(texts(4, 9)))
    found = training_cost(three_verbs(), rows, 1000)
    assert found["training_flops"] == found["training_flops_per_token"] * 1000 > 0


def test_measure_counts_when_it_is_asked_to():
    rows, model = Rows(list(texts(4, 9))), small_model("autoregressive")
    trained = {"training_tokens": 50, "training_seconds": 2.0}
    found = measure(model, rows, iw_samples=1, flops=True, trained=trained)
    assert found["training_flops"] == 50 * found["training_flops_per_token"]
    assert found["training_seconds"] == 2.0
    assert "training_flops_per_token" not in measure(model, rows, iw_samples=1, trained=trained)
