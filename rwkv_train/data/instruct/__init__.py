"""Conversations: from records of any chat format to tokens, with a mask that says which of them are learned."""
