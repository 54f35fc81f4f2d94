"""Training: `main` (the command), `model` (plain modules), `loss`, `engine` (all DeepSpeed), `checkpoint`."""
