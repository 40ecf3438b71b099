"""Weights that torch's `fully_shard` (FSDP2) spreads over processes, where they are used outside of its bookkeeping."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed import is_available

if is_available():
    from torch.distributed.fsdp import FSDPModule

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def gathered(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """The whole weights on every process, and modules that leave them so; nothing at all where none are sharded.

    `fully_shard` gathers and frees weights by hooks that expect one forward of the root and one backward after it. A
    gradient taken within that forward (gradient inference) ends it for them: they free the root's weights in the middle
    of it, and gather every block twice for every step. A method other than forward (`infer`, `log_likelihood`) runs no
    hook of the root at all, so its weights are not there. Here the hooks are out of the way and the weights are
    gathered once, however many steps are taken; what the hooks know of the forward around is what they knew before.

    All processes must enter together, since gathering is a collective. Hooks of others on a sharded module still run.

    Args:
        keep: leave the weights gathered, for a forward that goes on: it need not gather them again, and frees them as
            `reshard_after_forward` says. Otherwise they are sharded again afterwards.
    """
    sharded = [module for module in model.modules() if is_available() and isinstance(module, FSDPModule)]
    taken = []
    for module in sharded:
        module.unshard()
        for hooks in (getattr(module, name) for name in _HOOKS):
            # torch has no switch for its hooks
            own = {key: hook for key, hook in hooks.items() if hook.__module__.startswith("torch.distributed.fsdp.")}
            if own:
                taken.append((hooks, dict(hooks)))
            for key in own:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)  # in their order
        for module in sharded:
            if not keep:
                module.reshard()
