"""What a run comes to before it starts: sizes, steps, memory."""
