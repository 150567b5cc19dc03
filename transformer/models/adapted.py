"""A model whose blocks have adapters."""

from __future__ import annotations

from flax import nnx

from transformer.errors import UserError, nearest
from transformer.layers.adapter import Adapter, AdapterConfig
from transformer.layers.linear import Linear
from transformer.models.families import Model, ModelConfig, make_model

_ROUTER = "router"


def make_adapted(config: ModelConfig, adapter: AdapterConfig | None, rngs: nnx.Rngs) -> Model:
    """The model for a config, with fresh parameters, and, if requested, adapters in its blocks.

    Raises:
        UserError: a target that is not a linear layer of the blocks, or a model without blocks.
    """
    model = make_model(config, rngs)
    if adapter is not None:
        adapt(model, adapter, rngs)
    return model


def adapt(model: nnx.Module, config: AdapterConfig, rngs: nnx.Rngs) -> None:
    """Add adapters to the linear layers of a model's blocks; existing parameters are unchanged. Raises as
    `make_adapted`."""
    layers = [
        (path[-1], module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and "blocks" in path
    ]
    names = {str(name) for name, _ in layers}
    if not names:
        raise UserError(
            f"adapter: {type(model).__name__} has no blocks whose linear layers could be adapted; set it to null"
        )
    for target in config.targets or ():
        if target not in names:
            raise UserError(
                f"adapter.targets: {target!r} is not a linear layer in the blocks; there are {', '.join(sorted(names))}."
                f"{nearest(target, names)}"
            )
    targets = names - {_ROUTER} if config.targets is None else set(config.targets)
    adapted = [linear for name, linear in layers if name in targets]
    for number, linear in enumerate(adapted):
        linear.adapter = Adapter(linear.kernel, linear.num_in, config, number=number, rngs=rngs)
