"""Environments of the peers: one for each, made where it is missing.

kronfluence asks for torchvision, which it does not use and for which no build fits every torch: it
is installed without its dependencies, and with those that it does use. bergson brings torchvision
and torchaudio, which fail to load beside torch's CPU build: they are removed.

Point pip at the index that has the torch of this machine, as for `launch/setup.sh`.
"""

import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[3] / "launch" / "constraints.txt"
VERSIONS = {"kronfluence": "1.0.1", "bergson": "2.5.1"}
TORCH = "torch==2.13.0"
KRONFLUENCE_NEEDS = ["transformers", "accelerate", "datasets", "scikit-learn"]
KRONFLUENCE_NEEDS += ["einops", "einconv", "opt_einsum", "rich"]

# The peer comes after what it needs, so that its presence tells a whole environment.
STEPS = {
    "kronfluence": [
        ["install", TORCH],
        ["install", "-c", CONSTRAINTS, *KRONFLUENCE_NEEDS],
        ["install", "--no-deps", f"kronfluence=={VERSIONS['kronfluence']}"],
    ],
    "bergson": [
        ["install", TORCH],
        ["install", TORCH, f"bergson=={VERSIONS['bergson']}"],
        ["uninstall", "--yes", "torchaudio", "torchvision"],
    ],
}
IS_READY = """
import sys
from importlib import metadata, util
name, version = sys.argv[1:]
sys.exit(metadata.version(name) != version or util.find_spec("torchvision") is not None)
"""


def is_ready(python, name):
    """Whether an environment has a peer, in the version that is compared."""
    check = [python, "-c", IS_READY, name, VERSIONS[name]]
    return python.exists() and not subprocess.run(check, stderr=subprocess.DEVNULL).returncode


def peer_python(directory, name):
    """The Python of a peer's environment, which is made if it is missing.

    Args:
        directory: Of all environments; this one is named like the peer.
        name: "kronfluence" or "bergson".

    Raises:
        SystemExit: It could not be made.
    """
    folder = directory / name
    python = folder.absolute() / "bin" / "python"
    if is_ready(python, name):
        return python
    print(f"making {folder} for {name} {VERSIONS[name]}", flush=True)
    commands = [] if python.exists() else [[sys.executable, "-m", "venv", folder]]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    commands += [[*pip, *step] for step in STEPS[name]]
    for command in commands:
        words = [str(part) for part in command]
        if subprocess.run(words).returncode:
            sys.exit(f"{folder} could not be made; what failed: {' '.join(words)}")
    if not is_ready(python, name):
        sys.exit(f"{folder} was made, but has no {name} {VERSIONS[name]} without torchvision")
    return python
