"""Looking into a latent space: probes, functions of a model with texts that give a table and a picture."""

from latentlm.probing.all_probes import probe_all, probe_named, probe_names
from latentlm.probing.result import ProbeResult, Scatter
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts, read_texts

__all__ = ["LatentSpace", "ProbeResult", "Scatter", "Texts", "probe_all", "probe_named", "probe_names", "read_texts"]
