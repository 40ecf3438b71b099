"""One file a probe: a module `name` with a function `name(space, texts, *, …) → ProbeResult`.

A module put here is a probe at once: in `latentlm probe`, with its keyword arguments as options, and in `probe all`.
The first line of the function's docstring is what the command says of it, and so are the lines of its `Args`.
"""
