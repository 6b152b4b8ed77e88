"""Ways to finetune: adapters, learned states, quantized bases, losses on preferences."""
