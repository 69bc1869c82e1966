"""What the commands of `peftfn` do, one module each; on_adapters, on_models and training have their options."""
