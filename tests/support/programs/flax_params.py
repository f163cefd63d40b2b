"""A script that looks at a checkpoint with flax's functions on trees, and casts a part of it."""

import sys

import flax.traverse_util as traverse_util
import jax.numpy as jnp
import numpy as np

import openpi.shared.array_typing as at
import openpi.shared.nnx_utils as nnx_utils
from openpi.models import model as _model

params = _model.restore_params(f"{sys.argv[1]}/params", restore_type=np.ndarray)
flat = traverse_util.flatten_dict(params, sep="/")
for name in sorted(flat)[:3]:
    print(name, flat[name].shape, flat[name].dtype)
assert "PaliGemma/llm/embedder/input_embedding" in flat

cast = nnx_utils.state_map(params, nnx_utils.PathRegex(".*llm.*"), lambda p: jnp.asarray(p, jnp.bfloat16))
dtypes = {name: leaf.dtype for name, leaf in traverse_util.flatten_dict(cast, sep="/").items()}
assert all((dtype == jnp.bfloat16) == ("llm" in name) for name, dtype in dtypes.items())
at.check_pytree_equality(expected=params, got=cast, check_shapes=True)
print("params: ok")
