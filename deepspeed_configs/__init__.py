"""DeepSpeed configurations by name; read by trainer.engine through importlib.resources."""
