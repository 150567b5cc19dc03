"""Fields that configs used to have, and the fields that replace them."""

_ATTENTION = {
    name: f"model.attention.{name}"
    for name in ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "window", "sinks", "qkv_bias")
}
_MLP = {name: f"model.mlp.{name}" for name in ("activation", "experts_per_token", "balance_loss", "router_z_loss")}

MOVED: dict[str, str] = {
    "max_skipped": "stability.max_skipped",
    "log.tensorboard": "log.trackers, a list of trackers such as [tensorboard]",
    "log.wandb_project": "log.project, with wandb among log.trackers",
    "loss.temperature": "objective.temperature",
    "loss.class_weights": "objective.class_weights",
    **{f"model.{name}": to for name, to in (_ATTENTION | _MLP).items()},
    "model.attention": "model.attention.backend; a recurrent model's is model.attention.kind",
    "model.attention_soft_cap": "model.attention.soft_cap",
    "model.attention_bias": "model.attention.bias",
    "model.scale_attention": "model.attention.scale",
    "model.position": "model.attention.position (rotary, alibi, relative) or model.position_embedding",
    "model.rotary_period": "model.attention.position.theta",
    "model.rotary_fraction": "model.attention.position.fraction",
    "model.rotary_scaling": "model.attention.position.scaling",
    "model.relative_buckets": "model.attention.position.num_buckets",
    "model.relative_distance": "model.attention.position.max_distance",
    "model.mlp_dim": "model.mlp.dim",
    "model.mlp_bias": "model.mlp.bias",
    "model.num_experts": "model.mlp.num_experts, with model.mlp.kind experts",
    "model.expert_capacity": "model.mlp.capacity_factor",
    "model.use_bias": "model.attention.bias, model.mlp.bias and model.norm_bias",
    "model.norm_epsilon": "model.norm_eps",
    "model.table_dim": "model.embedding_size",
    "model.local_window": "model.pattern, whose mixers have a window; a recurrent model's is model.attention.window",
    "model.attention_dim": "model.attention.dim",
    "model.hard_temperature": "model.attention.temperature",
    "model.global_every": "model.pattern, whose mixers have a window",
    "model.local_rotary_period": "model.pattern, whose mixers have a position",
    "model.num_labels": "model.head.num_labels",
    "model.pooling": "model.head.pooling",
    "model.pooler": "model.head.pooler",
    "model.pooler_activation": "model.head.activation",
    "model.pooler_norm": "model.head.norm",
    "model.token_layer": "model.head.dense",
    "model.head_bias": "model.head.bias",
}
"""Old path → new place. `*` is the index of any item of a list."""
