"""Training: sampler, cache, augmentation, losses, trainer, run, tracking."""
