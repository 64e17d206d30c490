"""Imports and exports models (docs/checkpoints.md):

    python -m mod_jax.convert import SOURCE TARGET
    python -m mod_jax.convert import --language-model=FOLDER --vision-tower=FOLDER \\
        [--adaptor=FOLDER] TARGET
    python -m mod_jax.convert export CHECKPOINT TARGET

import reads a model, or its parts, in any supported format, and writes a native folder: an Orbax
checkpoint in the dtype of the source, and the processor's files. export reads a run (the student of
its last stage, or of --stage), a native folder, or any other supported one, and writes a Hugging
Face folder that stock transformers and vLLM load.
"""

import argparse
import contextlib
import pathlib
import sys

from mod_jax.config import ConfigError, MeshConfig, ModelConfig, ModelSource, require
from mod_jax.data.samples.tokenizer import READERS, load_tokenizer
from mod_jax.export.folder import Options, export
from mod_jax.interop.folder import DTYPES, SHARD_BYTES
from mod_jax.interop.loading import open_pretrained, open_source
from mod_jax.interop.native import save_native
from mod_jax.interop.pretrained import Config, Pretrained
from mod_jax.interop.processor import check_picture_id, check_rows
from mod_jax.sharding import AXES, check_platform, make_mesh


def mesh_sizes(text: str) -> MeshConfig:
    """Parses the sizes of a mesh, e.g. `fsdp=4,expert=2`; an axis that is left out has size 1.

    Raises:
      ConfigError: For an unknown axis or a size that is not an integer.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        require(
            axis in AXES and size.lstrip("-").isdigit(),
            "--mesh",
            text,
            f"AXIS=SIZE,... with axes of {AXES}",
        )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def import_(options: argparse.Namespace) -> None:
    """Runs the import command."""
    *sources, target = options.paths
    num_sources = 0 if options.language_model else 1
    require(
        len(sources) == num_sources,
        "import",
        options.paths,
        "one source and a target, or parts and a target",
        "Use `import SOURCE TARGET`, or "
        "`import --language-model=FOLDER --vision-tower=FOLDER TARGET`.",
    )
    mesh = make_mesh(mesh_sizes(options.mesh)) if options.mesh else None
    with _open(options, sources) as pretrained:
        _check_tokenizer(pretrained)
        save_native(target, pretrained, mesh)
        print(
            f"imported {pretrained.origin} ({pretrained.size / 1e6:,.1f} M parameters, "
            f"{pretrained.dtype}) to {target}"
        )


def _check_tokenizer(pretrained: Pretrained[Config]) -> None:
    """Checks that the tokenizer of a whole model, if its folder has one, is that of the model."""
    folder = pathlib.Path(pretrained.folder)
    if isinstance(pretrained.config, ModelConfig) and any((folder / f).is_file() for f in READERS):
        tokenizer = load_tokenizer(folder)
        check_picture_id(tokenizer, pretrained.config, folder)
        check_rows(tokenizer, pretrained.config, folder)


def _open(
    options: argparse.Namespace, sources: list[str]
) -> contextlib.AbstractContextManager[Pretrained[Config]]:
    """Opens the one source, or the parts that the options name."""
    if options.language_model:
        source = ModelSource(
            language_model=options.language_model,
            vision_tower=options.vision_tower,
            adaptor=options.adaptor,
            seed=options.seed,
        )
        return open_source(source, load_tokenizer(options.tokenizer or options.language_model))
    require(
        not options.adaptor,
        "--adaptor",
        options.adaptor,
        "an adaptor beside --language-model and --vision-tower only",
        "A whole model has its own.",
    )
    return open_pretrained(sources[0], options.vision_tower or None, options.tokenizer or None)


def export_(options: argparse.Namespace) -> None:
    """Runs the export command."""
    how = Options(
        dtype=options.dtype,
        template=options.template,
        dropless=options.dropless,
        shard_bytes=int(options.shard_gb * 1e9),
    )
    export(options.checkpoint, options.target, how, options.stage)
    print(f"exported {options.checkpoint} to {options.target}")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m mod_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True)
    _add_import(
        commands.add_parser("import", help="write a model, or its parts, as a native folder")
    )
    _add_export(commands.add_parser("export", help="write a model as a Hugging Face folder"))
    return top


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "paths",
        nargs="+",
        metavar="[SOURCE] TARGET",
        help="folder of the model, and folder to write, which may be on cloud storage",
    )
    command.add_argument(
        "--language-model",
        default="",
        help="folder of a language model: builds a student from parts, without a SOURCE",
    )
    command.add_argument(
        "--vision-tower",
        default="",
        help="folder of a CLIP or SigLIP tower: for a student from parts, or for a SOURCE that "
        "lacks its tower",
    )
    command.add_argument(
        "--adaptor",
        default="",
        help="folder or file of an adaptor for a student from parts; without it the adaptor is new",
    )
    command.add_argument(
        "--tokenizer", default="", help="folder of the tokenizer if SOURCE has none"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of a new adaptor")
    command.add_argument(
        "--mesh",
        default="",
        help="write the parameters sharded as on this mesh, e.g. fsdp=4,expert=2",
    )
    command.set_defaults(run=import_)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", help="folder of a run or of a model in a supported format")
    command.add_argument("target", help="folder to write")
    command.add_argument("--stage", help="stage of a run; by default the last one")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the tensors; by default float32 for a run, else that of the checkpoint",
    )
    command.add_argument(
        "--template",
        help="name of the chat template; by default that of the run's stage, or of the "
        "checkpoint's folder, or qwen if it has none",
    )
    command.add_argument(
        "--dropless",
        action="store_true",
        help="export a student trained with an expert capacity as one without; its outputs differ "
        "wherever tokens were dropped",
    )
    command.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_BYTES / 1e9,
        help="largest size of one file of tensors, in GB (default: %(default)g)",
    )
    command.set_defaults(run=export_)


def cli() -> None:
    """Runs the command; an expected error is printed on one line, with exit code 1."""
    options = parser().parse_args()
    try:
        check_platform()
        options.run(options)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
