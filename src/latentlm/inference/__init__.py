"""Ways to find q(z | x), or samples of p(z | x), for any latent language model."""

from latentlm.inference.gradient import held, infer_by_gradient
from latentlm.inference.langevin import langevin
from latentlm.inference.sharded import gathered

__all__ = ["gathered", "held", "infer_by_gradient", "langevin"]
