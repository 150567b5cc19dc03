"""A small model for tests of plans."""

from benchmarks.sharding.planning.candidates import choices, meshes
from train.config import RunConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

MODEL = GPTConfig(vocab_size=64, max_length=32, num_layers=4, embed_dim=32, attention=SoftmaxConfig(num_heads=4))
CONFIG = RunConfig(name="small", batch_size=16, model=MODEL)
TEXT = """name: small
batch_size: 16
model: {vocab_size: 64, max_length: 32, num_layers: 4, embed_dim: 32, attention: {num_heads: 4}}
"""


def candidates(config, target):
    """The config in every layout over the target's devices."""
    return [one for mesh in meshes(config, target) for one in choices(config, mesh, target)]
