"""`mod_jax.rehearse` from end to end, on compilers for accelerators that are not here."""

import json
import pathlib
import subprocess
import sys

import pytest

from mod_jax.config import ConfigError
from mod_jax.rehearsal import topology

ROOT = pathlib.Path(__file__).parents[2]
# Topology -> (slices, mesh, axes over which something has to be sent)
CASES = {
    "v5e-16": (1, "2,2,2,2", {"expert", "tensor"}),
    "v5e-4": (2, "2,2,2,1", {"expert"}),
    "h100-8": (1, "1,2,2,2", {"expert", "tensor"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_quickstart_is_rehearsed(name, tmp_path):
    topology.prepare()
    try:
        topology.devices(name)
    except ConfigError as error:
        pytest.skip(str(error))
    slices, mesh, axes = CASES[name]
    output = tmp_path / "found.json"
    flags = (
        f"--topology={name} --slices={slices} --mesh={mesh} --stage=sparse_mimic --quick "
        f"--config=configs/quickstart.py --config.dtype=bfloat16 --output={output}"
    )
    command = [sys.executable, "-m", "mod_jax.rehearse", *flags.split()]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1].startswith("fits: 0.")
    (stage,) = json.loads(output.read_text())["stages"]
    assert axes <= stage["sent"]["axes"].keys()
    assert stage["sent"]["module"]["student experts"] > 0
    time = stage["time"]["seconds"]
    assert (time["network"] > 0) == (slices > 1)
    assert time["compute"] > 0 and time["memory"] > 0 and time["links"] > 0
