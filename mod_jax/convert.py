"""Models in and out (docs/checkpoints.md):

    python -m mod_jax.convert import SOURCE TARGET
    python -m mod_jax.convert import --language-model=FOLDER --vision-tower=FOLDER [--adaptor=FOLDER] TARGET
    python -m mod_jax.convert export CHECKPOINT TARGET

import reads a model, or parts of one, in any supported form, and writes a folder of ours: an Orbax checkpoint in the dtype the
numbers came in, with the processor's files. export reads a run (the student of its last stage, or of --stage), an imported folder or
any other supported one, and writes a folder that stock transformers and vLLM load.
"""

import argparse
import sys

from mod_jax.config import ConfigError, MeshConfig, ModelSource, require
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.export.folder import Options, export
from mod_jax.interop.folder import DTYPES, SHARD_BYTES
from mod_jax.interop.loading import open_pretrained, open_source
from mod_jax.interop.native import save_native
from mod_jax.sharding import AXES, make_mesh


def mesh_sizes(text: str) -> MeshConfig:
    """`fsdp=4,expert=2`; an axis that is not named has the size 1."""
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
    """The import command."""
    *sources, target = options.paths
    remedy = "Say `import SOURCE TARGET`, or `import --language-model=FOLDER --vision-tower=FOLDER TARGET`."
    require(
        len(sources) == (not options.language_model),
        "import",
        options.paths,
        "one source and a target, or parts and a target",
        remedy,
    )
    if options.language_model:
        source = ModelSource(
            language_model=options.language_model,
            vision_tower=options.vision_tower,
            adaptor=options.adaptor,
            seed=options.seed,
        )
        opened = open_source(source, load_tokenizer(options.tokenizer or options.language_model))
    else:
        require(
            not options.adaptor,
            "--adaptor",
            options.adaptor,
            "it beside --language-model and --vision-tower",
            "A whole model has its own.",
        )
        opened = open_pretrained(
            sources[0], options.vision_tower or None, options.tokenizer or None
        )
    with opened as pretrained:
        save_native(
            target, pretrained, make_mesh(mesh_sizes(options.mesh)) if options.mesh else None
        )
        print(
            f"imported {pretrained.origin} ({pretrained.size / 1e6:,.1f} M parameters, {pretrained.dtype}) to {target}"
        )


def export_(options: argparse.Namespace) -> None:
    """The export command."""
    how = Options(options.dtype, options.template, options.dropless, int(options.shard_gb * 1e9))
    export(options.checkpoint, options.target, how, options.stage)
    print(f"exported {options.checkpoint} to {options.target}")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m mod_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True)
    come = commands.add_parser("import", help="a supported folder, or parts, to a folder of ours")
    come.add_argument(
        "paths", nargs="+", metavar="[SOURCE] TARGET", help="TARGET may be on cloud storage"
    )
    come.add_argument(
        "--language-model",
        default="",
        help="folder of a plain language model: builds a student from parts",
    )
    come.add_argument(
        "--vision-tower",
        default="",
        help="folder of a CLIP or SigLIP tower: of a student from parts, or of a SOURCE that lacks its own",
    )
    come.add_argument(
        "--adaptor",
        default="",
        help="folder or file with an adaptor; without it a student from parts gets a new one",
    )
    come.add_argument("--tokenizer", default="", help="folder of a tokenizer, if SOURCE has none")
    come.add_argument("--seed", type=int, default=0, help="of a new adaptor")
    come.add_argument(
        "--mesh",
        default="",
        help="e.g. fsdp=4,expert=2: parameters are written as they lie on this mesh",
    )
    come.set_defaults(run=import_)
    go = commands.add_parser(
        "export", help="a run, an imported folder or another supported one to a Hugging Face folder"
    )
    go.add_argument("checkpoint")
    go.add_argument("target")
    go.add_argument("--stage", help="of a run; its last by default")
    go.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the tensors; by default float32 for a run, else what the checkpoint is stored in",
    )
    go.add_argument(
        "--template",
        help="chat template; by default the one of the run's stage, or of the checkpoint's folder, else qwen",
    )
    go.add_argument(
        "--dropless",
        action="store_true",
        help="a student trained with a capacity as one without: it differs where tokens were dropped",
    )
    go.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_BYTES / 1e9,
        help="a file of tensors grows to this size at most",
    )
    go.set_defaults(run=export_)
    return top


def cli() -> None:
    """The command; an expected error is one line and exit code 1."""
    options = parser().parse_args()
    try:
        options.run(options)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
