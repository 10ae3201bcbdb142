"""What the papers' optimizers are compared with."""
