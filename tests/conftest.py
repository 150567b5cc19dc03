"""Settings of the whole suite: 8 virtual CPU devices, strict types, and a cache of compiled programs."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Read when jax and flax start, so they stand before the first import of either.
os.environ["JAX_PLATFORMS"] = "cpu"
# Shapes are tiny: a test's time is the compiler's. It falls to a quarter when LLVM does not optimize what it emits, when
# fused operations are not written through MLIR first, and when a program is one module and not several.
_flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # A virtual device that a busy machine does not run for 40 seconds would abort the process.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=900",
]
# A jaxlib without the choice stops at the flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_flags))
# Threads enough for all collectives that 8 devices can be in at once; see `make_cpu_devices`, which JAX's start forbids here.
os.environ.setdefault("PJRT_NPROC", "64")
os.environ["NNX_GRAPH_MODE"] = "false"
os.environ["NNX_GRAPH_UPDATES"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "manyheads-tests")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# A run's own data cache is never the developer's.
os.environ["MANYHEADS_CACHE"] = tempfile.mkdtemp(prefix="manyheads-tests-")

import jax
import jaxtyping
import pytest

from tests.devices import on_one_device

jax.config.update("jax_numpy_dtype_promotion", "strict")


def _check_shapes(fn=None, *, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """jaxtyping's decorator, which the tests' import hook puts on every function, without its cost where it has no use.

    Decorating a function compiles four others. One that is made within a function is decorated again in each call, which
    took a tenth of the suite's time.
    """
    if fn is None:
        return lambda fn: _check_shapes(fn, typechecker=typechecker)
    made_in_a_call = "<locals>" in getattr(fn, "__qualname__", "")
    annotated = not callable(fn) or isinstance(fn, type) or getattr(fn, "__annotations__", None)
    return jaxtyped(fn, typechecker=typechecker) if annotated and not made_in_a_call else fn


jaxtyping.jaxtyped = _check_shapes


_BROWSER_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

# Files that take longest, in this order: a worker that got one of them last would work alone at the end.
_LONG = (
    "test_mechanisms.py", "test_pipeline.py", "test_configs.py", "test_docs.py", "test_loop.py", "test_processes.py",
    "test_verify_resume.py", "test_mutations.py", "test_faults.py", "test_remote.py", "test_stability.py",
    "test_gpt.py", "test_adapter_runs.py", "test_families.py", "test_init_from.py", "test_step.py", "test_tasks.py",
    "test_hf_parity.py", "test_onnx.py", "test_recurrent.py", "test_hf_import.py", "test_protocol.py", "test_ring.py",
    "test_mixture_of_experts.py", "test_sharding_measure.py", "test_adapters.py", "test_task_losses.py",
    "test_compile_ahead.py", "test_differentiation.py", "test_pallas.py", "test_attention_bench.py",
    "test_blockwise.py", "test_history.py", "test_manyheads.py", "test_contrastive.py", "test_freezing.py",
    "test_beam.py", "test_pmap.py", "test_sharding_plan.py", "test_objectives.py", "test_fast_weights.py",
    "test_benchmarks.py", "test_adapter.py", "test_capture.py", "test_pretraining.py", "test_encoder_bench.py",
    "test_translate.py", "test_generate.py", "test_wheel.py", "test_page_browser.py", "test_softmax.py",
    "test_linear_attention.py", "test_position.py", "test_optimizer.py", "test_self_attention_before.py",
    "test_inputs.py", "test_classification.py", "test_data_objectives.py", "test_attend.py", "test_norm.py",
    "test_seeds.py", "test_interpret_capture.py", "test_latent.py", "test_cli.py", "test_hf_checkpoint.py",
    "test_source_attention.py", "test_hf_peft.py", "test_data_resume.py", "test_streams.py", "test_identity.py",
    "test_integrity.py", "test_score.py", "test_replay.py", "test_inspect_data.py", "test_data_evaluation.py",
    "test_look_command.py", "test_interventions_families.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first (with xdist's `--no-loadscope-reorder`, which else begins with those of most tests), marked `slow`."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    for item in items:
        if item.path.name in _LONG:
            item.add_marker("slow")


def pytest_collection_finish():
    """Tracing makes objects by the million: the collector walks the new ones seldom, and those of the imports never."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_left_behind():
    yield
    shutil.rmtree(os.environ["MANYHEADS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _programs_do_not_pile_up():
    """Each compiled program takes memory maps, of which Linux gives a process 65,530: thousands of tests would use them up."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. Without one, tests are skipped unless MANYHEADS_REQUIRE_BROWSER=1 says that there must be one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        reason = "needs the package playwright and one of the programs " + ", ".join(names)
        if os.environ.get("MANYHEADS_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_BROWSER_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def one_device(request):
    """Whatever a test runs takes one device, unless the test is marked with `all_devices`."""
    with contextlib.nullcontext() if request.node.get_closest_marker("all_devices") else on_one_device():
        yield
