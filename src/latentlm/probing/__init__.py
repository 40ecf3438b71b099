"""Looking into latents: what their dimensions and directions hold."""
