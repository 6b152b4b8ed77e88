"""Operators: tensors in, tensors out, each with several backends."""
