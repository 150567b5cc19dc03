"""Transformers in JAX and Flax, from attention up."""
