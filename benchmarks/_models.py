"""One model of each family at one size, for benchmarks that look at all of them."""

import atexit
import functools
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from lang_vae import parts

from latentlm import (
    GPTVAE,
    GPVAE,
    LTM,
    Autoregressive,
    AutoregressiveConfig,
    GPTVAEConfig,
    GPVAEConfig,
    LangVAE,
    LangVAEConfig,
    LatentLM,
    LTMConfig,
)

VOCABULARY, WIDTH, LAYERS, HEADS, WINDOW, LENGTH = 8192, 256, 4, 8, 64, 256
FAMILIES = ("autoregressive", "ltm", "gpt_vae", "gp_vae", "lang_vae")
_OF_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_OF_DECODER = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": LENGTH,
}  # fmt: skip


def model(family: str) -> LatentLM:
    """In training mode, with random weights; of LangVAE the frozen parts are GPT-2's and BERT's shapes, 6 × 384."""
    torch.manual_seed(0)
    if family == "lang_vae":
        decoder, encoder = _pretrained()
        names = {"decoder_name": decoder, "encoder_name": encoder}
        return LangVAE(LangVAEConfig(**_OF_TEXT, **names, latent_size=64, max_position_embeddings=LENGTH)).train()
    if family == "gp_vae":  # a window is of attention, which it has none of
        return GPVAE(GPVAEConfig(**_OF_TEXT, hidden_size=WIDTH, latent_size=64, max_position_embeddings=LENGTH)).train()
    if family == "gpt_vae":
        return GPTVAE(GPTVAEConfig(**_OF_TEXT, **_OF_DECODER, latent_size=64)).train()
    decoder = {**_OF_TEXT, **_OF_DECODER, "sliding_window": WINDOW}
    if family == "ltm":
        return LTM(LTMConfig(**decoder, latents_per_layer=8, inference_steps=4)).train()
    return Autoregressive(AutoregressiveConfig(**decoder)).train()


def papers_ltm(size: Literal["small", "medium", "large"], **changes: Any) -> LTMConfig:
    """Kong et al. 2025, appendix A: layers of 512, texts of 1,024 tokens of GPT-2's."""
    end = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50256)
    shapes = {"vocab_size": 50257, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1376}
    return LTMConfig.preset(size, **shapes, sliding_window=256, max_position_embeddings=1024, **end, **changes)


@functools.cache
def _pretrained() -> tuple[str, str]:
    folder = tempfile.TemporaryDirectory()  # the tokenizers are read when texts come
    atexit.register(folder.cleanup)
    return parts(Path(folder.name))


def texts(batch: int, device: str = "cpu") -> torch.Tensor:
    """BOS and `LENGTH` random tokens in each of `batch` rows."""
    input_ids = torch.randint(1, VOCABULARY, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    input_ids[:, 0] = 0
    return input_ids.to(device)
