"""stand-in"""
from __future__ import annotations
import jax, jax.numpy as jnp
from flax import nnx
from transformer.sharding import with_axes
class Embedding(nnx.Module):
    def __init__(self, vocab_size, dim, *, axes=("vocab","embed"), init, dtype=jnp.float32, param_dtype=jnp.float32, rngs):
        self.dtype=dtype
        self.table=nnx.Param(with_axes(init,*axes)(rngs.params(),(vocab_size,dim),param_dtype))
    def __call__(self,t): return jnp.take(self.table[...],t,axis=0).astype(self.dtype)
    def attend(self,x): return jnp.einsum("BTD,VD->BTV",x.astype(self.dtype),self.table[...].astype(self.dtype),preferred_element_type=jnp.float32)
