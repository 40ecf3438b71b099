"""Ways to find q(z | x) for any latent language model."""

from latentlm.inference.gradient import held, infer_by_gradient

__all__ = ["held", "infer_by_gradient"]
