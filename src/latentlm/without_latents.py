"""Models of text alone: p(x) exactly, on the same contract as those with a latent."""

from typing import Any

from jaxtyping import Int64
from torch import Tensor
from torch.distributions import Independent

from latentlm.distributions import standard_normal
from latentlm.latent_lm import LatentLM


class WithoutLatents(LatentLM):
    """A latent of no numbers, so that p(x | z) is p(x). To be named before what decodes."""

    exact = True

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        return standard_normal(batch_size, (0,), self.device)

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Independent:
        return standard_normal(len(input_ids), (0,), self.device)
