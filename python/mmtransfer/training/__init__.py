"""Training of adapted models: settings, the loop on transformers' Trainer, caches of features and inputs."""
