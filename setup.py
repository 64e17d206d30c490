"""Package metadata; pinned versions for running are in requirements.txt."""

import setuptools

setuptools.setup(
    name="mod-jax",
    version="0.1.0",
    description="LLaVA-MoD in JAX/Flax: small multimodal mixture-of-experts models distilled from large ones",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["mod_jax", "mod_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.12", "flax>=0.12.8", "optax>=0.2.8", "orbax-checkpoint>=0.12.8", "grain>=0.2.18", "tensorflow-datasets>=4.9.10",
        "array_record>=0.8", "transformers>=4.57", "tokenizers", "safetensors", "ml-collections", "clu", "absl-py", "etils[epath]",
        "pillow", "rich", "tensorboardX", "gcsfs", "importlib_resources",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": ["pytest", "pytest-cov", "hypothesis", "ruff", "torch==2.13.0"],
    },
)
