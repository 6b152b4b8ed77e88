"""Text from a trained model: sampling, streaming generation, chat."""
