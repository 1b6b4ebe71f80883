"""Calls under meshes: operands of shard_map vary alike, explicit meshes are left for a while."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def run(fn, operands, like, axes, results):
    """`fn(operands)`, whose results are sharded as `like` is.

    Under `shard_map(check_vma=True)` all operands are made to vary over the union of their manual
    axes, so that JAX sums the gradients of those that did not. On a mesh with explicit axes the
    call runs under `jax.sharding.auto_axes`.

    Args:
      fn: Called with the pytree `operands`; returns a flat tuple of arrays.
      operands: A pytree of arrays; on an explicit mesh some may be on no mesh.
      like: The array that gives the shardings.
      axes: A letter for each axis of `like`.
      results: For each result the letters of its axes; those that `axes` lacks are not sharded.
    """
    operands = _vary_alike(operands)
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return fn(operands)
    names = dict(zip(axes, jax.typeof(like).sharding.spec))
    names["H"] = None
    specs = tuple(PartitionSpec(*(names.get(axis) for axis in result)) for result in results)
    if jax.sharding.get_abstract_mesh().empty:
        specs = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.sharding.auto_axes(fn, out_sharding=specs)(operands)


def _vary_alike(operands):
    leaves, tree = jax.tree.flatten(operands)
    varying = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    union = frozenset().union(*varying)
    if not union:
        return operands
    leaves = [
        x if have == union else jax.lax.pcast(x, tuple(sorted(union - have)), to="varying")
        for x, have in zip(leaves, varying)
    ]
    return jax.tree.unflatten(tree, leaves)
