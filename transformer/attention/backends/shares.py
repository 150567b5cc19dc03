"""A kernel that the compiler cannot partition, on each device's share of the batch and the heads.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer.sharding import axes_size, axes_to_map, mesh_axes
from transformer.types import Array


def shard_map_kernel(kernel: Any, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, rows: Any = None) -> Array:
    """`kernel(q, k, v, rows)` on each device's share, or on the whole arrays without a mesh.

    Args:
        rows: a pytree of arrays whose first dim is the batch, or None.
    """
    if (free := axes_to_map()) is None:
        return kernel(q_BTNH, k_BSKH, v_BSKH, rows)
    batch, heads = mesh_axes("batch"), mesh_axes("heads")
    # Every device computes the whole of what does not divide, such as a batch of one.
    batch = batch if q_BTNH.shape[0] % axes_size(batch) == 0 else ()
    heads = heads if q_BTNH.shape[2] % axes_size(heads) == 0 else ()
    # With fewer key/value heads than devices, there are enough copies for each device to have those of its queries.
    copies = math.lcm(k_BSKH.shape[2], axes_size(heads)) // k_BSKH.shape[2]
    k, v = (x if copies == 1 else jnp.repeat(x, copies, axis=2) for x in (k_BSKH, v_BSKH))
    layout, by_row = PartitionSpec(batch or None, None, heads or None, None), PartitionSpec(batch or None)
    return jax.shard_map(
        kernel,
        in_specs=(layout, layout, layout, jax.tree.map(lambda _: by_row, rows)),
        out_specs=layout,
        axis_names=free,
        check_vma=False,
    )(q_BTNH, k, v, rows)
