"""stand-in"""
from __future__ import annotations
import jax, jax.numpy as jnp
from flax import nnx
from transformer.sharding import with_axes
def layer_norm(x, scale, bias=None, *, epsilon):
    y=x.astype(jnp.float32); m=y.mean(-1,keepdims=True); y=y-m; v=jnp.square(y).mean(-1,keepdims=True)
    y=y*jax.lax.rsqrt(v+epsilon)*scale
    if bias is not None: y=y+bias
    return y.astype(x.dtype)
def rms_norm(x, scale, *, epsilon):
    y=x.astype(jnp.float32)
    return (y*jax.lax.rsqrt(jnp.square(y).mean(-1,keepdims=True)+epsilon)*scale).astype(x.dtype)
class LayerNorm(nnx.Module):
    def __init__(self, dim, *, use_bias=True, epsilon=1e-5, axis="embed", param_dtype=jnp.float32, rngs):
        self.epsilon=epsilon
        self.scale=nnx.Param(with_axes(nnx.initializers.ones, axis)(rngs.params(),(dim,),param_dtype))
        self.bias=nnx.Param(with_axes(nnx.initializers.zeros, axis)(rngs.params(),(dim,),param_dtype)) if use_bias else None
    def __call__(self,x): return layer_norm(x,self.scale[...],None if self.bias is None else self.bias[...],epsilon=self.epsilon)
class RMSNorm(nnx.Module):
    def __init__(self, dim, *, epsilon=1e-6, axis="embed", param_dtype=jnp.float32, rngs):
        self.epsilon=epsilon
        self.scale=nnx.Param(with_axes(nnx.initializers.ones, axis)(rngs.params(),(dim,),param_dtype))
    def __call__(self,x): return rms_norm(x,self.scale[...],epsilon=self.epsilon)
