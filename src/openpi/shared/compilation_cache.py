"""Where programs that the frameworks compile outlive the process. Neither framework is imported here: both look for the
folder when they start.
"""

import os
from pathlib import Path

FOLDERS = {"JAX_COMPILATION_CACHE_DIR": "jax", "TORCHINDUCTOR_CACHE_DIR": "openpi/torch_inductor"}


def use_compilation_cache() -> None:
    """Makes JAX keep what it compiles in `~/.cache/jax`, and PyTorch in `~/.cache/openpi/torch_inductor`; what the user
    set wins. A server that is started again, or a run that continues, then compiles nothing anew.
    """
    for variable, folder in FOLDERS.items():
        os.environ.setdefault(variable, str(Path.home() / ".cache" / folder))
