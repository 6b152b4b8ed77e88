"""Settings: pydantic classes and YAML. Nothing here imports torch."""
