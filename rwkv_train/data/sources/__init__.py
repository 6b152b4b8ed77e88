"""Text as it lies on disk or on the hub, cut into blocks that any process can turn into documents."""
