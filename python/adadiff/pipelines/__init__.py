"""Pipelines of diffusers: adaptive compute in existing ones (`enable`), our own `AdaDiffPipeline`, and the autoencoder
and text encoder around a network. Needs the package's extras."""
