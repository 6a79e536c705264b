"""Samples on disk: folders of pictures or shards, which a later run can complete."""
