"""How well a model predicts text: perplexity and bits per byte."""
