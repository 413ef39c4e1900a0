"""Models on meshes: random parameters on devices, and the same model on one device with its kv heads repeated."""

import jax
from jax.sharding import Mesh, NamedSharding
from random_weights import random_params

from hshare_jax.mesh import make_mesh
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_layouts
from hshare_jax.models.pretrained import Model
from hshare_jax.models.weights import repeated_kv_rows


def mesh_of(data: int, model: int) -> Mesh:
    """A mesh of the first devices."""
    return make_mesh(data, model, jax.devices()[: data * model])


def random_model(config: ModelConfig, parts: int = 1) -> Model:
    """A model with random parameters, whose kv heads are repeated for so many devices."""
    rows, params = repeated_kv_rows(config, parts), random_params(config)
    for layer in config.kv_layers:
        qkv = params[f"layers_{layer}"]["qkv"]
        params[f"layers_{layer}"]["qkv"] = {kind: array[rows] for kind, array in qkv.items()}
    return Model(config.for_parts(parts), params, None, (), "random", "0" * 16)


def on_mesh(model: Model, mesh: Mesh | None) -> Model:
    """The same model with its parameters on a mesh."""
    if mesh is None:
        return model
    layouts = parameter_layouts(model.params, mesh)
    params = jax.tree.map(lambda x, layout: jax.device_put(x, NamedSharding(mesh, layout.spec)), model.params, layouts)
    return Model(model.config, params, model.tokenizer, model.eos_token_ids, model.name, model.identity, mesh)
