"""Models small enough to know everything about: by closed form, by enumeration, or because they run at once."""

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, constraints, register_kl
from torch.utils.data import Dataset
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from latentlm import LatentLM, LatentLMConfig
from latentlm.distributions import diagonal_gaussian, sample_from_noise, standard_normal
from latentlm.families import FAMILIES

VOCABULARY = 23
BOS, EOS, PAD = 0, 1, 2

# weights of this size let latents and context matter as much as in a trained model
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "sliding_window": 4,
    "initializer_range": 0.25,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
_OF_PHI: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_OF_LLAMA = _OF_PHI | {"head_dim": 8}
_WITHOUT_DROPOUT = {"initializer_range": 0.25, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "gp_vae": {
        "latent_size": 4,
        "kernel_groups": 2,
        "kernel_lengthscale": [1.0, 4.0],
        "kernel_nugget": 0.1,
        "encoder_dilations": [1, 2],
        "encoder_layers": 1,
        "inference_start_log_variance": 0.0,
    },
    "gpt_vae": {"latent_size": 6, "encoder_layers": 1, "sliding_window": None},
    "huggingface": {"architecture_fields": {"n_embd": 16, "n_layer": 2, "n_head": 2, **_WITHOUT_DROPOUT}},
    "lang_vae": {"latent_size": 6, "latent_slots": 2},
    "ltm": {
        "latents_per_layer": 3,
        "latent_size": 8,
        "inference_steps": 4,
        # the paper's rates, whose steps are easily written out
        "inference_lr": 0.3,
        "inference_lr_final": 0.34,
        "inference_lr_decay": 1.0,
        "inference_epsilon": 1e-8,
    },
}


_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "t5": {"d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "d_ff": 32},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
}


@functools.cache
def pretrained_part(kind: str) -> str:
    """A folder with a random model of one of transformers' architectures and a tokenizer of words w3, w4, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(tempfile.mkdtemp(prefix=f"latentlm-{kind}-"))
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    fields = _PARTS.get(kind, _OF_PHI if kind.startswith("phi") else _OF_LLAMA)
    window = {"sliding_window": 4} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    config = CONFIG_MAPPING[kind](vocab_size=VOCABULARY, **ends, **fields, **window)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (AutoModel if kind in ("bert", "t5") else AutoModelForCausalLM).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    words = {"<s>": BOS, "</s>": EOS, "<pad>": PAD} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)


def stand_ins(folder: Path) -> None:
    """Random models under the names of the pretrained ones that our recipes name, for who works in this folder."""
    for name, kind in {
        "runs/gpt2-glosses": "gpt2",
        "runs/gpt2-explanations": "gpt2",
        "sentence-transformers/all-MiniLM-L6-v2": "bert",
        "google-bert/bert-base-cased": "bert",
        "google/flan-t5-base": "t5",
        "NovaSearch/stella_en_1.5B_v5": "qwen2",
        "openai-community/gpt2": "gpt2",
        "Qwen/Qwen2.5-3B": "qwen2",
        "meta-llama/Llama-3.2-3B": "llama",
        "mistralai/Mistral-7B-v0.3": "mistral",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(pretrained_part(kind))


def small_config(family: str, **changes: Any) -> LatentLMConfig:
    kind = FAMILIES[family].config_class
    given = {**_COMMON, **_OF_FAMILY[family], **changes}
    if family == "lang_vae":
        given = {"decoder_name": pretrained_part("gpt2"), "encoder_name": pretrained_part("bert"), **given}
    known = kind.__dataclass_fields__
    return kind(**{name: value for name, value in given.items() if name in known or name not in _COMMON})


def small_model(family: str, *, seed: int = 0, **changes: Any) -> LatentLM:
    """A model of a family in evaluation mode, with the same weights each time."""
    attention = changes.pop("attn_implementation", "sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family]._from_config(small_config(family, **changes), attn_implementation=attention).eval()


# each family as it comes, and each way in which it may differ
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "diagonal gp_vae": ("gp_vae", {"posterior": "diagonal", "kernel": "matern32", "encoder_type": "full"}),
    "white gp_vae": (
        "gp_vae",
        {"posterior": "diagonal", "kernel": "white", "kernel_groups": 1, "kernel_lengthscale": 1.0},
    ),
    "attention gp_vae": ("gp_vae", {"decoder_type": "attention", "encoder_type": "transformer", "kernel_groups": 4}),
    "cooperative gp_vae": (
        "gp_vae",
        {
            "posterior": "whitened",
            "inference": "cooperative",
            "inference_steps": 2,
            "encoder_type": "causal_transformer",
        },
    ),
    "gradient gp_vae": ("gp_vae", {"posterior": "whitened", "inference": "gradient", "inference_steps": 2}),
    "langevin gp_vae": (
        "gp_vae",
        {"posterior": "whitened", "inference": "langevin", "inference_steps": 2, "langevin_steps": 2},
    ),
    "gp_vae of ragged text": ("gp_vae", {"length_model": "categorical", "eos_token_id": EOS}),
    "two latent tokens": ("gpt_vae", {"latent_tokens": 2, "pooling": "attention"}),
    "cooperative gpt_vae": ("gpt_vae", {"inference": "cooperative", "inference_steps": 2, "pooling": "last"}),
    "batch norm": ("gpt_vae", {"encoder_batch_norm": 0.7}),
    "gpt_vae with a window": ("gpt_vae", {"sliding_window": 3}),
    "gradient gpt_vae": ("gpt_vae", {"inference": "gradient", "inference_steps": 2}),
    "interleaved lang_vae": ("lang_vae", {"injection": "interleaved", "latent_slots": 3, "injection_rank": 4}),
    "gradient lang_vae": ("lang_vae", {"inference": "gradient", "inference_steps": 2}),
    "cooperative lang_vae": ("lang_vae", {"inference": "cooperative", "inference_steps": 2}),
    "phi of huggingface": (
        "huggingface",
        {"architecture": "phi", "architecture_fields": {**_OF_PHI, "initializer_range": 0.25}},
    ),
    "memory": ("autoregressive", {"memory_per_layer": 3, "memory_size": 8}),
    "amortised": ("ltm", {"inference": "amortised", "encoder_layers": 1}),
    "cooperative": ("ltm", {"inference": "cooperative", "inference_steps": 2, "encoder_layers": 1}),
    "langevin": ("ltm", {"inference": "langevin", "inference_steps": 2, "langevin_steps": 2}),
    "learned start": ("ltm", {"inference_start": "learned", "inference_steps": 2}),
    "diagonal prior": ("ltm", {"latent_prior": "diagonal", "inference_steps": 2}),
    "transformer prior": ("ltm", {"latent_prior": "transformer", "prior_layers": 1, "inference_steps": 2}),
    "shared latents": ("ltm", {"shared_latents": True, "inference_steps": 2}),
}


def small_variant(name: str, **changes: Any) -> LatentLM:
    """A small model of one of `VARIANTS` in which what starts at 0 has left it, as after training."""
    family, own = VARIANTS[name]
    return moved(small_model(family, **{**own, **changes}))


def moved(model: LatentLM) -> LatentLM:
    """The model, with random numbers added to the parameters (but norms) that a new model has at 0 or at its start."""
    generator = torch.Generator().manual_seed(0)
    starts = (
        "encoder.moments.",
        "encoder.mean",
        "encoder.log_variance",
        "injection.map",
        "latent_transformer.output.",
        "prior_mean",
        "prior_log_variance",
        "start_",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(starts):
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def texts(batch: int, time: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Input ids [batch, time]: BOS and random tokens, no special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(PAD + 1, vocabulary, (batch, time), generator=generator)
    input_ids[:, 0] = BOS
    return input_ids


def padded(input_ids: Tensor, lengths: list[int], side: str, *, total: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `lengths[i]` ids of each row with padding on a side, and the mask."""
    total = total or max(lengths)
    rows = torch.full((len(input_ids), total), PAD)
    mask = torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(total - length, total)
        rows[row, place] = input_ids[row, :length]
        mask[row, place] = 1
    return rows, mask


class Rows(Dataset):
    """Rows of ids as a data set, a byte to each token."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "num_bytes": len(self.rows[index]) - 1, "index": index}


def prior_latents(model: LatentLM, input_ids: Tensor, *samples: int, seed: int = 0) -> Tensor:
    """Random latents [*samples, batch, *event] as large as the prior's."""
    shape = model.prior(len(input_ids), input_ids.shape[1] - 1).event_shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*samples, len(input_ids), *shape, generator=generator)


class ThreeVerbs(LatentLM):
    """What a user may write: prior, infer and decode, and nothing else. Logits are W z + table[previous token]."""

    config_class = LatentLMConfig

    def __init__(self, config: LatentLMConfig, size: int = 3):
        super().__init__(config)
        self.size = size
        self.previous = nn.Embedding(config.vocab_size, config.vocab_size)
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(size, config.vocab_size, bias=False)
        self.encoder = nn.Embedding(config.vocab_size, 2 * size)
        self.post_init()

    def prior(self, batch_size, lengths, condition=None):
        return standard_normal(batch_size, (self.size,))

    def infer(self, input_ids, attention_mask=None, condition=None, *, seed=0):
        scored = self.scored_tokens(input_ids, attention_mask)[..., None]
        mean, log_variance = (self.encoder(input_ids[:, 1:]) * scored).sum(1).chunk(2, -1)
        return diagonal_gaussian(mean, log_variance)

    def decode(self, latents, input_ids, attention_mask=None, condition=None):
        return self.dropout(self.output(latents))[..., None, :] + self.previous(input_ids[:, :-1])


def three_verbs(*, seed: int = 0, **changes: Any) -> ThreeVerbs:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ThreeVerbs(LatentLMConfig(vocab_size=VOCABULARY, pad_token_id=PAD, **changes))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


class LinearGaussian(LatentLM):
    """Token v is a measurement y_v = g z_j + N(0, 1/τ_v) of coordinate j = v mod size.

    Its log-likelihood is a density of the y, not a probability of tokens, so it has no `decode`. The posterior is
    Gaussian with diagonal precision, 1 + Σ_t g² τ_t at coordinate j over the tokens that measure it.
    """

    config_class = LatentLMConfig
    size = 3

    def __init__(self, config: LatentLMConfig):
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.gain = nn.Parameter(torch.tensor(0.8))
        self.register_buffer("value", torch.randn(config.vocab_size, generator=generator))
        self.register_buffer("precision", 0.3 + torch.rand(config.vocab_size, generator=generator))
        self.post_init()

    def prior(self, batch_size, lengths, condition=None):
        return standard_normal(batch_size, (self.size,))

    def log_likelihood(self, latents, input_ids, attention_mask=None, condition=None):
        tokens = input_ids[:, 1:]
        coordinate = (tokens % self.size).expand(*latents.shape[:-1], tokens.shape[-1])
        expected = self.gain * latents.gather(-1, coordinate)
        log_density = Normal(expected, self.precision[tokens].rsqrt()).log_prob(self.value[tokens])
        return log_density.masked_fill(~self.scored_tokens(input_ids, attention_mask), 0.0)

    def exact_posterior(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance, one number at a time."""
        scored = self.scored_tokens(input_ids, attention_mask)
        precision = torch.ones(len(input_ids), self.size, dtype=torch.float64)
        weighted = torch.zeros_like(precision)
        gain = self.gain.item()
        for row, text in enumerate(input_ids[:, 1:].tolist()):
            for place, token in enumerate(text):
                if scored[row, place]:
                    precision[row, token % self.size] += gain**2 * float(self.precision[token])
                    weighted[row, token % self.size] += gain * float(self.precision[token] * self.value[token])
        return weighted / precision, 1 / precision


def linear_gaussian() -> LinearGaussian:
    return LinearGaussian(LatentLMConfig(vocab_size=VOCABULARY)).eval()


class OnGrid(Distribution):
    """A distribution over the points [number, size] of a grid, with probabilities for each row of a batch."""

    arg_constraints = {"log_probabilities": constraints.real}

    def __init__(self, points: Tensor, log_probabilities: Tensor):
        self.points = points
        self.log_probabilities = log_probabilities.log_softmax(-1)
        super().__init__(self.log_probabilities.shape[:1], points.shape[1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        index = (value[..., None, :] - self.points).square().sum(-1).argmin(-1)  # [*samples, batch], or [] for all rows
        index = index.expand(torch.broadcast_shapes(index.shape, self.batch_shape))
        table = self.log_probabilities.expand(*index.shape, -1)
        return table.gather(-1, index[..., None])[..., 0]

    @property
    def mean(self) -> Tensor:
        return self.log_probabilities.exp() @ self.points

    @property
    def variance(self) -> Tensor:
        return self.log_probabilities.exp() @ self.points.square() - self.mean.square()


@register_kl(OnGrid, OnGrid)
def _(p: OnGrid, q: OnGrid) -> Tensor:
    return (p.log_probabilities.exp() * (p.log_probabilities - q.log_probabilities)).sum(-1)


@sample_from_noise.register
def _(distribution: OnGrid, noise: Tensor) -> Tensor:
    # the inverse of the cumulative distribution, at the probability of the first number of the noise
    uniform = 0.5 * (1 + torch.erf(noise[:, :1].double() / math.sqrt(2)))
    cumulative = distribution.log_probabilities.double().exp().cumsum(-1)
    index = torch.searchsorted(cumulative, uniform).clamp_max(len(distribution.points) - 1)
    return distribution.points[index[:, 0]]


class GridModel(LatentLM):
    """A latent on 5 × 5 points, and a q that is the posterior tempered and bent, so every bound is loose.

    log p(x) is a sum over 25 points.
    """

    config_class = LatentLMConfig

    def __init__(self, config: LatentLMConfig):
        super().__init__(config)
        line = torch.linspace(-1, 1, 5)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("points", torch.cartesian_prod(line, line))
        self.register_buffer("prior_logits", torch.randn(25, generator=generator))
        self.register_buffer("bend", 0.7 * torch.randn(25, generator=generator))
        self.register_buffer("previous", torch.randn(config.vocab_size, config.vocab_size, generator=generator))
        # a parameter, since transformers finds a model's device by one
        self.output = nn.Parameter(1.5 * torch.randn(2, config.vocab_size, generator=generator), requires_grad=False)
        self.post_init()

    def prior(self, batch_size, lengths, condition=None):
        return OnGrid(self.points, self.prior_logits.expand(batch_size, -1))

    def infer(self, input_ids, attention_mask=None, condition=None, *, seed=0):
        joint = self.log_joint(input_ids, attention_mask)
        return OnGrid(self.points, 0.5 * joint.T + self.bend)

    def decode(self, latents, input_ids, attention_mask=None, condition=None):
        return (latents @ self.output)[..., None, :] + self.previous[input_ids[:, :-1]]

    def log_joint(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log p(x, z) [25, batch] at each point."""
        points = self.points[:, None].expand(-1, len(input_ids), -1)
        log_likelihood = self.log_likelihood(points, input_ids, attention_mask).sum(-1)
        return log_likelihood + self.prior_logits.log_softmax(-1)[:, None]


def grid_model(vocabulary: int = VOCABULARY) -> GridModel:
    return GridModel(LatentLMConfig(vocab_size=vocabulary)).eval()
