"""Images on disk: pictures, and folders of shards that a later run completes."""
