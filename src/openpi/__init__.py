"""Vision-language-action models: data, training, serving and evaluation."""
