"""Package metadata. The version ranges are for users; requirements.txt pins what make installs."""

import pathlib
import re

import setuptools

setuptools.setup(
    name="mod-jax",
    version=re.search(r'__version__ = "(.+)"', pathlib.Path("mod_jax/__init__.py").read_text())[1],
    description="LLaVA-MoD in JAX/Flax: "
    "small multimodal mixture-of-experts models distilled from large ones",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["mod_jax", "mod_jax.*"]),
    package_data={"mod_jax.rehearsal": ["cards/*.pbtxt", "published/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8",
        "transformers>=4.57",
        "tokenizers",
        "sentencepiece",
        "jinja2>=3.1.6",
        "safetensors",
        "ml-collections",
        "clu",
        "absl-py",
        "etils[epath]",
        "pillow",
        "pyarrow",
        "msgpack",
        "rich",
        "tensorboardX",
        "gcsfs",
        "importlib_resources",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]", "tokamax>=0.0.12"],  # the kernels of attention and experts
        # Prepares data on many machines. It needs older Pillow, protobuf and pyarrow than
        # requirements.txt pins, hence an environment of its own.
        "beam": ["apache-beam>=2.77"],
        # Reads pytorch_model.bin. Before 2.6, a file could run code in spite of `weights_only`
        # (CVE-2025-32434).
        "bin": ["torch>=2.6"],
        "test": [
            "hypothesis",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-cov",
            "ruff",
            "tokamax==0.0.12",
            "torch==2.13.0",
        ],
    },
)
