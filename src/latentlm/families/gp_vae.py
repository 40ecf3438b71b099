"""GP-VAE: a Gaussian process over a latent trajectory, every token decoded in parallel (arXiv 2512.09535).

p(z)      = GP(0, k + nugget) over t = 0, 1, 2, …, independently for each of latent_size dimensions
p(x | z)  = Π_t p(x_t | z_1 … z_T): no token sees another token
q(z | x)  from an encoder, causal or not: diagonal over time (the paper's), or with the prior's own correlations

Where we differ from the published code: time counts steps instead of running from 0 to 1, so that a prefix means the
same at every length; encoders called causal are; the loss is the ELBO, and the KL is that of the whole trajectory, raw
wherever it is reported; what bounds a KL keeps a gradient (`kl_threshold`, `kl_target`). What the paper trains with
beside the ELBO are options: label smoothing, horizons, the embedding regulariser.
"""

import math
from dataclasses import field
from typing import Any, Literal, cast

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from latentlm.distributions import (
    RBF,
    DiagonalTrajectory,
    GaussianProcess,
    Kernel,
    Matern,
    RationalQuadratic,
    SitesPosterior,
    Stream,
    White,
    WhitenedGaussian,
    diagonal_gaussian,
    sequence_keys,
)
from latentlm.distributions.kernels import log_parameter
from latentlm.layers import CausalBlock, TransformerEncoder
from latentlm.parallel_lm import ParallelConfig, ParallelLatentLM, score_tokens
from latentlm.variational import VariationalConfig, VariationalLM

# of a diagonal posterior, as published; observations may say nothing at all, which is a large variance
_LOG_VARIANCES = {"diagonal": (-6.0, 2.0), "whitened": (-6.0, 2.0), "sites": (-8.0, 12.0)}
_START_LOG_VARIANCES = {"diagonal": -4.0, "whitened": -0.5, "sites": -2.0}


@strict
class GPVAEConfig(ParallelConfig, VariationalConfig):
    """GP-VAE; see `TransformerConfig` for sizes, `ParallelConfig` for the length, `VariationalConfig` for inference.

    Args:
        num_hidden_layers: of the decoder.
        decoder_type: "convolution" as in the paper (a map of each time's z, then width-3 convolutions), or "attention"
            over all times.
        max_position_embeddings: the longest text, T, in tokens after BOS.
        sliding_window: tokens that a causal Transformer encoder sees; None for all until then.
        word_dropout: share of the tokens in place of which the encoder sees a learned vector while training.
        latent_size: dimensions of the trajectory, d_z (of `ParallelConfig`).
        kernel: of the prior; "matern32" is ν = 3/2. "white" is the isotropic prior N(0, I), for comparison.
        kernel_groups: 1: one kernel for all dimensions; a number of groups of neighbouring dimensions; `latent_size`:
            one for each.
        kernel_lengthscale: ℓ at the beginning, in tokens: one number, or two, between which the groups' ℓ are spread
            by equal ratios. Learned, as are the next two.
        kernel_variance: σ² at the beginning.
        kernel_nugget: variance at the beginning of what is independent from time to time.
        posterior: "sites": q ∝ p(z) Π_t N(m_t; z_t, v_t), the prior updated by the encoder's m and v; "diagonal" over
            time, as in the paper, which cannot come near a smooth prior (sites of a kernel without state space, any but
            Matérn's, take T² numbers for each text and dimension); "whitened": diagonal in w, z = L w, K = L Lᵀ.
            Gradient steps and Langevin are in w, and need the last.
        encoder_type: causal convolutions, "separable" (the paper's SEQ) or "full" (its PARA), or a "transformer", which
            sees the whole text, or a "causal_transformer", of `encoder_layers`.
        encoder_kernel_size, encoder_dilations: of the convolutions, a block for each dilation.
        inference_start_log_variance: None is −4 for a diagonal posterior (as published), −2 for sites, −0.5 in w. Sites
            that begin with less to say leave a decoder nothing to learn from, and z dies (docs/results.md).
        label_smoothing: ε; training charges (1 − ε) NLL + ε mean over tokens v of −log p(v) (paper's notebooks: 0.01 to
            0.03).
        horizons: training has the state of each time foretell the next 1 … k tokens, too, by a linear map for each.
        horizon_weight: w; the k-th of them is charged w / k.
        embedding_regulariser: λ; training charges λ Σ_t [1 − cos(s_t, e_t) + mean (s_t − e_t)²] for the decoder's state
            and the embedding of its token.
    """

    model_type = "latentlm_gp_vae"

    hidden_size: int = 256
    num_hidden_layers: int = 1
    max_position_embeddings: int = 64
    decoder_type: Literal["convolution", "attention"] = "convolution"
    kernel: Literal["rbf", "matern12", "matern32", "matern52", "rational_quadratic", "white"] = "rbf"
    kernel_groups: int = 1
    kernel_lengthscale: float | int | list[float | int] = 8.0
    kernel_variance: float | int = 1.0
    kernel_nugget: float | int = 0.01
    posterior: Literal["sites", "diagonal", "whitened"] = "sites"
    inference: Literal["gradient", "amortised", "cooperative", "langevin"] = "amortised"
    encoder_type: Literal["separable", "full", "transformer", "causal_transformer"] = "separable"
    encoder_kernel_size: int = 3
    encoder_dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    inference_start_log_variance: float | int | None = None  # type: ignore[assignment]  # never after __post_init__
    label_smoothing: float | int = 0.0
    horizons: int = 0
    horizon_weight: float | int = 0.5
    embedding_regulariser: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.inference_start_log_variance is None:
            self.inference_start_log_variance = _START_LOG_VARIANCES.get(self.posterior)
        super().__post_init__(**kwargs)

    @property
    def lengthscales(self) -> list[float | int]:
        """The numbers of `kernel_lengthscale`, one or two."""
        return self.kernel_lengthscale if isinstance(self.kernel_lengthscale, list) else [self.kernel_lengthscale]

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("latent_size", "kernel_groups", "encoder_kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("kernel_variance", "kernel_nugget"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)}")
        scales = self.lengthscales
        if len(scales) not in (1, 2) or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"kernel_lengthscale must be a number above 0, or two, not {self.kernel_lengthscale}")
        if len(scales) == 2 and self.kernel_groups == 1:
            raise ValueError("two lengthscales need kernel_groups to be spread over, and kernel_groups is 1")
        if self.latent_size % self.kernel_groups:
            raise ValueError(
                f"latent_size ({self.latent_size}) must be a multiple of kernel_groups ({self.kernel_groups})"
            )
        if self.kernel == "white" and self.kernel_groups > 1:
            raise ValueError("the white kernel has nothing to learn: leave kernel_groups at 1")
        if not self.encoder_dilations or min(self.encoder_dilations) < 1:
            raise ValueError(f"encoder_dilations must be numbers from 1 on, not {self.encoder_dilations}")
        if self.inference != "amortised" and self.posterior != "whitened":
            raise ValueError(
                f"inference {self.inference} takes its steps in whitened coordinates: set posterior to whitened"
            )
        if self.inference_start == "learned" or self.encoder_batch_norm is not None:
            name = "inference_start learned" if self.inference_start == "learned" else "encoder_batch_norm"
            raise ValueError(f"{name} is for latents of one shape, and a trajectory is as long as its text")
        if self.encoder_type == "separable" and self.has_encoder and self.hidden_size % 8:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of 8 for the separable encoder")

    def validate_beside(self) -> None:
        """Part of the validation of `@strict`."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        for name in ("horizons", "horizon_weight", "embedding_regulariser"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")


class LogVariance(nn.Linear):
    """A linear map to log σ², held softly between two bounds, so that a gradient is left at each of them.

    A class, since transformers initialises modules by class.
    """

    def __init__(self, inputs: int, outputs: int, bounds: tuple[float, float], start: float):
        super().__init__(inputs, outputs)
        self.low, self.high = bounds
        margin = 1e-3
        start = min(max(start, self.low + margin), self.high - margin)
        below = self.high - math.log(math.expm1(self.high - start))  # the inverse of what forward does
        self.start = self.low + math.log(math.expm1(max(below - self.low, margin)))

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        raised = self.low + F.softplus(super().forward(x).float() - self.low)
        return self.high - F.softplus(self.high - raised)


class TrajectoryEncoder(nn.Module):
    """Two numbers for each number of the trajectory, of the texts' embedded tokens."""

    def __init__(self, config: GPVAEConfig, latent_shape: tuple[int, ...]):
        super().__init__()
        size = config.hidden_size
        if config.word_dropout:
            # not 0: of a text that begins with zeros a convolution makes zeros, and norms of nothing have no slope
            self.unseen = nn.Parameter(torch.zeros(size))
        if config.encoder_type in ("separable", "full"):
            self.blocks = nn.ModuleList(
                CausalBlock(size, config.encoder_kernel_size, dilation, config.dropout, config.encoder_type)
                for dilation in config.encoder_dilations
            )
            self.norm = nn.LayerNorm(size)
        else:
            causal = config.encoder_type == "causal_transformer"
            self.transformer = TransformerEncoder(config, config.encoder_layers, causal)
        self.mean = nn.Linear(size, config.latent_size)
        assert config.inference_start_log_variance is not None  # set by the config
        bounds, start = _LOG_VARIANCES[config.posterior], config.inference_start_log_variance
        self.log_variance = LogVariance(size, config.latent_size, bounds, start)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], attention_mask: Int64[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch time size"], Float[Tensor, "batch time size"]]:
        if hasattr(self, "transformer"):
            x = self.transformer(x, attention_mask)
        else:
            x = x.transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            x = self.norm(x.transpose(1, 2))
        return self.mean(x).float(), self.log_variance(x)


class ConvolutionDecoder(GradientCheckpointingLayer):
    """z plus its position, a map of each time by itself, LayerNorm, and convolutions over three times (the paper's)."""

    def __init__(self, config: GPVAEConfig):
        super().__init__()
        size = config.hidden_size
        self.positions = nn.Embedding(config.max_position_embeddings, config.latent_size)
        self.first, self.second = nn.Linear(config.latent_size, size), nn.Linear(size, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(config.num_hidden_layers))
        self.convolutions = nn.ModuleList(nn.Conv1d(size, size, 3, padding=1) for _ in range(config.num_hidden_layers))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, latents: Float[Tensor, "rows time size"], real: Int64[Tensor, "rows time"]
    ) -> Float[Tensor, "rows time hidden"]:
        x = latents + self.positions.weight[: latents.shape[1]]
        x = self.second(F.gelu(self.first(x)))
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = norm(x) * real[..., None]  # what comes after the end must look like nothing at all
            x = x + self.dropout(F.gelu(convolution(x.transpose(1, 2)).transpose(1, 2)))
        return x


class AttentionDecoder(nn.Module):
    """A Transformer over the trajectory in which every time sees every other."""

    def __init__(self, config: GPVAEConfig):
        super().__init__()
        self.first = nn.Linear(config.latent_size, config.hidden_size)
        self.transformer = TransformerEncoder(config, config.num_hidden_layers)

    def forward(
        self, latents: Float[Tensor, "rows time size"], real: Int64[Tensor, "rows time"]
    ) -> Float[Tensor, "rows time hidden"]:
        return self.transformer(self.first(latents), real)


class GPVAE(ParallelLatentLM, VariationalLM):
    """Every token of a text from a trajectory that a Gaussian process lays."""

    config: GPVAEConfig
    config_class = GPVAEConfig
    encoder_weights = (*VariationalLM.encoder_alone, "embed_tokens.")
    _supports_sdpa = True

    def __init__(self, config: GPVAEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.kernel = _kernel(config)
        if config.kernel != "white":
            self.log_nugget = log_parameter("kernel_nugget", [config.kernel_nugget] * config.kernel_groups)
        self.decoder = (AttentionDecoder if config.decoder_type == "attention" else ConvolutionDecoder)(config)
        self.horizons = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(config.horizons)
        )
        self.add_inference(TrajectoryEncoder, (config.max_position_embeddings, config.latent_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LogVariance):
            nn.init.constant_(module.bias, module.start)
        elif isinstance(module, TrajectoryEncoder) and hasattr(module, "unseen"):
            nn.init.normal_(module.unseen)

    # ---- the three sentences ---------------------------------------------------------------------------------------

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> GaussianProcess:
        each = torch.as_tensor(lengths, device=self.device).expand(batch_size)
        times = torch.arange(int(each.max()) if batch_size else 0, device=self.device, dtype=torch.float64)
        nugget = 1.0 if self.config.kernel == "white" else self.log_nugget.double().exp()
        return GaussianProcess(self.kernel, times, self.config.latent_size, nugget, lengths=each)

    def posterior(self, mean: Tensor, log_variance: Tensor, prior: Distribution) -> Distribution:
        assert isinstance(prior, GaussianProcess)
        if self.config.posterior == "sites":
            return SitesPosterior(prior, mean, log_variance)
        each = diagonal_gaussian(mean, log_variance)
        return (WhitenedGaussian if self.config.posterior == "whitened" else DiagonalTrajectory)(prior, each)

    def prior_moments(self, prior: Distribution) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(*prior.batch_shape, *prior.event_shape, device=self.device)
        return zeros, zeros  # of the noise that the prior is made of

    def encode(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch times size"], Float[Tensor, "batch times size"]]:
        text = self.aligned(input_ids, attention_mask)
        x = self.embedded(text.tokens)
        if self._seen is not None:
            x = torch.where(text.take(self._seen[:, 1:])[..., None], x, cast(Tensor, self.encoder.unseen).to(x.dtype))
        if not x.shape[1]:  # BOS alone, which convolutions and attention refuse
            nothing = x.new_zeros(len(x), 0, self.config.latent_size).float()
            return nothing, nothing
        return self.encoder(x, text.real.long())

    def states(
        self, latents: Float[Tensor, "rows time size"], lengths: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows time hidden"]:
        real = torch.arange(latents.shape[1], device=latents.device) < lengths[:, None]
        return self.decoder(latents.to(self.dtype), real.long())

    def embedded(self, tokens: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time hidden"]:
        """What the encoder reads: of unit mean square, beside which the outputs of its blocks are not large.

        With the small numbers that embeddings begin with, convolutions drown the token itself in its neighbours, and z
        dies (docs/results.md).
        """
        return math.sqrt(self.config.hidden_size) * F.normalize(self.embed_tokens(tokens), dim=-1)

    def vocabulary(self) -> Float[Tensor, "vocabulary hidden"]:
        weight = self.embed_tokens.weight
        if hasattr(weight, "full_tensor"):  # sharded by itself (accelerate), it is whole in its own forward alone
            weight = self.embed_tokens(torch.arange(self.config.vocab_size, device=self.device))
        return F.normalize(weight, dim=-1)

    @torch.no_grad()
    def published_nll(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        *,
        seed: int = 0,
    ) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
        """NLL in nats and number of tokens of what "PPL(cont)" is the perplexity of: **a reconstruction, no bound**.

        The model itself writes the second half of each text (the likeliest tokens of a trajectory that goes on from the
        first half's), and the encoder has seen all of it when it gives the z that this half is scored with. What stands
        after the EOS of a text that ends is neither seen nor counted.
        """
        text = self.aligned(input_ids, attention_mask)
        nll, tokens = torch.zeros(len(input_ids), device=input_ids.device), torch.zeros_like(text.lengths)
        bos = input_ids.gather(1, text.scored.long().argmax(1, keepdim=True))
        for length in text.lengths[text.lengths > 0].unique().tolist():
            rows, begun = text.lengths == length, length // 2
            # each prompt once: one that comes again would be written otherwise, and figures would know of batches
            prompts, place = torch.cat((bos[rows], text.tokens[rows, :begun]), dim=1).unique(dim=0, return_inverse=True)
            own = self.generate(prompts, max_new_tokens=length - begun, seed=seed)[place]
            mask = self.until_eos(own, begun + 1)
            posterior = self.infer(own, mask, seed=seed)
            keys = sequence_keys(own, mask)
            latents = self.draw_latents(posterior, keys, 1, seed=seed, stream=Stream.SCORE)[0]
            nll[rows] = -self.log_likelihood(latents, own, mask)[:, begun:].float().sum(1)
            tokens[rows] = mask[:, begun + 1 :].sum(1)
        return nll, tokens

    # ---- what the paper trains with beside the ELBO -----------------------------------------------------------------

    def likelihood_for_training(
        self,
        latents: Float[Tensor, "batch times size"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch scored"], Float[Tensor, " batch"] | None]:
        config, text, words = self.config, self.aligned(input_ids, attention_mask), self._words()
        states = self.states_of(latents, text)
        each = self.score_states(states, text, words)
        charges: list[Tensor] = []
        targets, real = self.word_targets(text)
        if config.label_smoothing:
            # mean over v of −log p(v), less −log p(x) = s · (x − mean of v): no second pass over the vocabulary
            smoothed = (states * (words[targets] - words.mean(0))).sum(-1).float()
            charges.append(config.label_smoothing * smoothed.masked_fill(~real, 0.0))
        for ahead, horizon in enumerate(self.horizons[: max(text.tokens.shape[1] - 1, 0)], start=1):
            later = score_tokens(horizon(states[:, :-ahead]), words, targets[:, ahead:], real[:, ahead:])
            charges.append(F.pad(later, (0, ahead)) * (-config.horizon_weight / ahead))
        if config.embedding_regulariser:
            embedded = self.embedded(text.tokens)
            distance = 1 - F.cosine_similarity(states, embedded, dim=-1) + (states - embedded).square().mean(-1)
            charges.append(config.embedding_regulariser * distance.float().masked_fill(~text.real, 0.0))
        return text.back(each), torch.stack(charges).sum((0, 2)) if charges else None


def _kernel(config: GPVAEConfig) -> Kernel:
    if config.kernel == "white":
        return White()
    first, last = math.log10(config.lengthscales[0]), math.log10(config.lengthscales[-1])
    lengthscale = torch.logspace(first, last, config.kernel_groups, dtype=torch.float64, device="cpu")
    variance = [config.kernel_variance] * config.kernel_groups
    if config.kernel == "rbf":
        return RBF(lengthscale, variance)
    if config.kernel == "rational_quadratic":
        return RationalQuadratic(lengthscale, variance, [1.0] * config.kernel_groups)
    return Matern({"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}[config.kernel], lengthscale, variance)
