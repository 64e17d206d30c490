"""Configures JAX for the tests before any of them imports it.

The tests run on eight virtual CPU devices and share a persistent compilation cache. JAX keys the
cache by XLA_FLAGS and by the features of the processor, so that runs under different ones can
share a folder.
"""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # The older code generator: its programs run as fast, and are made in half of the time.
    "--xla_cpu_use_fusion_emitters=false",
    os.environ.get("XLA_FLAGS", ""),
]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # after the environment is set
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Halves the time of compilation: most programs run once.

    A module that reads what the compiler makes of a program sets `OPTIMIZED = True`.
    """
    jax.config.update("jax_disable_most_optimizations", not hasattr(request.module, "OPTIMIZED"))
    yield
