"""Vision-language-action models: data, training, serving and evaluation."""

from openpi.shared import moved_modules as _moved_modules

_moved_modules.install()
