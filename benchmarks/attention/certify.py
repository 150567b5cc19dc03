"""`manyheads-bench attention --certify`: every mechanism and backend that this machine can run against float64.

An error is ‖out - truth‖ / ‖truth‖ over the whole output, and likewise over all the gradients taken together. The truth of
softmax attention is the equation with the T×S array written out, in float64; that of another mechanism its first form, in
float64. (The tests check the float64 forms themselves, against loops in NumPy.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from benchmarks.attention.ahead import Call, compile_ahead
from benchmarks.attention.cases import HEADS, MASKS, MECHANISMS, SCORES, B, H, N, normal
from benchmarks.record import save
from transformer.attention.backends import blockwise
from transformer.attention.backends.pallas import pallas_interpret
from transformer.attention.dispatch import BACKENDS, attend
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.spec import AttentionSpec, Score
from transformer.types import wide

LENGTH = 208
"""Not a multiple of any backend's block, but divisible by a ring of 8."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-2)}
"""The largest allowed errors of an output and of a gradient."""

Row = dict[str, Any]


def run(length: int = LENGTH, compilers: dict[str, str] | None = None) -> dict[str, Any]:
    """Certify everything, write JSON and Markdown, and give the rows.

    Args:
        compilers: for `tpu` and `gpu` the interpreter of an environment whose JAX can compile for that hardware.
    """
    rows = [_ahead(platform, python) for platform, python in (compilers or {}).items()]
    for row in _softmax_rows(length):
        rows.append(row)
        _say(row)
    for row in _mechanism_rows(length):
        rows.append(row)
        _say(row)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "not run")}
    result = {"length": length, "limits": LIMITS, **counts, "worst": _worst(rows), "rows": rows}
    path = save("attention_certificate", "manyheads-bench attention --certify", result, show=False)
    table = path.with_suffix(".md")
    table.write_text(markdown(result), encoding="utf-8")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['not run']} not run; table in {table}")
    return result


def error(out: Any, truth: Any) -> float:
    """‖out - truth‖ / ‖truth‖ over all arrays of two equal trees, taken together; zeros must be zeros."""
    ours, theirs = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (out, truth)
    )
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or 1))


def with_gradients(
    function: Callable[..., jax.Array], arrays: list[Any], differentiable: bool = True
) -> tuple[Any, Any]:
    """The output, and the gradients of a fixed smooth function of it, as one compiled program."""

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*arrays)
        broad = out.astype(wide(out.dtype))
        wave = jnp.asarray(np.cos(np.arange(out.size) * 0.7).reshape(out.shape), broad.dtype)
        return jnp.sum(broad * wave), out

    # JAX's own attention mixes types in its backward pass, even if the program runs under a stricter rule.
    with jax.numpy_dtype_promotion("standard"):
        if not differentiable:
            return jax.jit(function)(*arrays), []
        gradients, out = jax.jit(jax.grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)
        return out, gradients


def markdown(result: dict[str, Any]) -> str:
    """The certificate as tables: the worst errors of each backend and mechanism, then every row."""
    lines = [
        "# Certificate of attention",
        "",
        "Made by `manyheads-bench attention --certify`. Errors are ‖out - float64‖ / ‖float64‖.",
        "",
        f"Limits: float32 {LIMITS['float32'][0]:.0e} forward and {LIMITS['float32'][1]:.0e} gradients; "
        f"bfloat16 {LIMITS['bfloat16'][0]:.0e}. {result['passed']} passed, {result['failed']} failed, "
        f"{result['not run']} not run here.",
        "",
        "| mechanism | backend or form | dtype | worst forward | worst gradient |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(key.split('/'))} | {f:.1e} | {g:.1e} |" for key, (f, g) in result["worst"].items()]
    lines += ["", "| mechanism | backend or form | mask or score | heads | dtype | forward | gradient | status |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        figures = [f"{row[name]:.1e}" if row.get(name) is not None else "–" for name in ("forward", "gradient")]
        what = [row[name] for name in ("mechanism", "backend", "case", "heads", "dtype")]
        status = row["status"] + (f": {row['reason']}" if row.get("reason") else "")
        lines.append(f"| {' | '.join([*what, *figures, status])} |")
    return "\n".join(lines) + "\n"


def _softmax_rows(length: int) -> Iterator[Row]:
    cases: list[tuple[str, AttentionMask, dict[str, Any]]] = [(name, make(length), {}) for name, make in MASKS.items()]
    cases += [(name, AttentionMask.causal(), make(length)) for name, make in SCORES.items()]
    for heads, num_kv_heads in HEADS.items():
        shapes = [(B, length, N, H), (B, length, num_kv_heads, H), (B, length, num_kv_heads, H)]
        for dtype in DTYPES:
            arrays = [jnp.asarray(x, DTYPES[dtype]) for x in normal(*shapes)]
            exact = [np.asarray(x, np.float64) for x in arrays]
            for case, mask, options in cases:
                with jax.enable_x64(True):
                    truth = _host(with_gradients(_call("reference", mask, options), [jnp.asarray(x) for x in exact]))
                ways = {backend: _call(backend, mask, options) for backend in BACKENDS}
                ways["blockwise, looped"] = ways["blockwise"]
                for platform in ("tpu", "gpu"):
                    ways[f"pallas for {platform.upper()}, interpreted"] = _interpreted(platform, mask, options)
                for backend, function in ways.items():
                    row = {"mechanism": "softmax", "backend": backend, "case": case, "heads": heads, "dtype": dtype}
                    yield row | _certified(backend, function, arrays, truth, dtype)


def _mechanism_rows(length: int) -> Iterator[Row]:
    for name, mechanism in MECHANISMS.items():
        for dtype in DTYPES:
            arrays = [jnp.asarray(x, DTYPES[dtype]) for x in mechanism.arrays(length)]
            exact = [np.asarray(x, np.float64) for x in arrays]
            definition = next(iter(mechanism.forms.values()))
            with jax.enable_x64(True):
                truth = _host(with_gradients(definition, [jnp.asarray(x) for x in exact], mechanism.differentiable))
            for form, function in mechanism.forms.items():
                row = {"mechanism": name, "backend": form, "case": "–", "heads": "–", "dtype": dtype}
                differentiable = mechanism.differentiable and not (mechanism.kinked and dtype == "bfloat16")
                yield row | _certified(form, function, arrays, truth, dtype, differentiable)


def _call(backend: str, mask: AttentionMask, options: dict[str, Any]) -> Callable[..., jax.Array]:
    return lambda q, k, v: attend(q, k, v, mask, backend=backend, **options)[0]


def _ahead(platform: str, python: str) -> Row:
    answer = compile_ahead(platform, Call(), python=python)
    row = {"mechanism": "softmax", "backend": f"pallas for {platform.upper()}", "case": "causal", "heads": "MHA"}
    print(f"{row['backend']}: {answer}", flush=True)
    return row | {"dtype": Call().dtype, "status": "not run", "reason": answer}


def _interpreted(platform: str, mask: AttentionMask, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """A kernel for hardware that is not available, run in interpret mode."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        score = Score.of(q, **options)
        return pallas_interpret(q, k, v, AttentionSpec(mask, score), platform=platform)

    return run


def _certified(
    backend: str,
    function: Callable[..., jax.Array],
    arrays: list[Any],
    truth: Any,
    dtype: str,
    differentiable: bool = True,
) -> Row:
    try:
        with _conditions(backend):
            out, gradients = _host(with_gradients(function, arrays, differentiable))
    except ValueError as refusal:
        # The backend does not support this case; the row shows the reason.
        return {"status": "not run", "reason": str(refusal).partition(": ")[2]}
    forward, gradient = error(out, truth[0]), error(gradients, truth[1]) if differentiable else None
    allowed = LIMITS[dtype]
    passed = forward < allowed[0] and (gradient or 0) < allowed[1]
    return {"forward": forward, "gradient": gradient, "status": "passed" if passed else "failed"}


@contextlib.contextmanager
def _conditions(backend: str) -> Iterator[None]:
    """What a backend needs around it: a mesh with a sequence axis, or the loops also for a short sequence."""
    if backend in ("ring", "ulysses"):
        count = max(n for n in (1, 2, 4, 8) if n <= jax.device_count() and (backend == "ring" or n <= N))
        mesh = jax.make_mesh((count,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        with jax.set_mesh(mesh), nnx.logical_axis_rules((("seq", "sequence"),)):
            yield
    elif backend.endswith("looped"):
        written_out, blockwise.MAX_BLOCKS = blockwise.MAX_BLOCKS, 0
        try:
            yield
        finally:
            blockwise.MAX_BLOCKS = written_out
    else:
        yield


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _worst(rows: list[Row]) -> dict[str, tuple[float, float]]:
    worst: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["status"] != "not run":
            key = f"{row['mechanism']}/{row['backend']}/{row['dtype']}"
            forward, gradient = worst.get(key, (0.0, 0.0))
            worst[key] = (max(forward, row["forward"]), max(gradient, row["gradient"] or 0.0))
    return worst


def _say(row: Row) -> None:
    if row["status"] == "not run":
        return
    gradient = "–" if row["gradient"] is None else f"{row['gradient']:.1e}"
    what = "  ".join(str(row[name]) for name in ("mechanism", "backend", "case", "heads", "dtype"))
    print(f"{row['status']:7} {what}: forward {row['forward']:.1e}, gradient {gradient}", flush=True)
