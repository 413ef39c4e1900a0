"""The first layers of a real model, because compiling all layers takes minutes."""

import dataclasses

from hshare_jax.models.pretrained import Model


def first_layers(model: Model, count: int) -> Model:
    """A model that has only the first `count` layers, with the same embeddings, shapes and tokenizer."""
    config = dataclasses.replace(model.config, num_layers=count, windows=model.config.windows[:count])
    gone = {f"layers_{layer}" for layer in range(count, model.config.num_layers)}
    params = {name: leaf for name, leaf in model.params.items() if name not in gone}
    return dataclasses.replace(model, config=config, params=params)
